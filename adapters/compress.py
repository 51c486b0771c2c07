"""What an adapter's tensors become when they are made small: sparse, ternary, and coded in few
bits.

    DARE      τ̃ = m ⊙ τ / (1 - p)          m ~ Bernoulli(1 - p)        Yu et al. 2023, arXiv 2311.03099
    DAREx-q   τ̃ = m ⊙ τ / q                1 - p <= q <= 1             Deng et al. 2024, arXiv 2410.09344
    ComPEFT   τ̃ = α σ(τ) sign(τ)           at the k n entries of largest |τ|, zero elsewhere
                                                                       Yadav et al. 2023, arXiv
                                                                       2311.13171
    τ  the update: what training has changed since a start at which the model answered as its base

Which tensors are τ. A sparse delta's values start at zero, so they are. So does B of a low-rank
pair, and dropping in B alone keeps DARE's expectation, E[m ⊙ B / (1 - p)] A = B A, with the noise
of dropping in single entries of a matrix, p / (1 - p) Σ_r |b_r|² |a_r|²; dropping in both, as
PEFT's `dare_linear` does, makes that (1 / (1 - p)² - 1) Σ_r |b_r|² |a_r|², eleven times as much at
p = 0.9. A starts at random numbers, and the largest of them say little of what was learnt.
ComPEFT's task vector is A - A₀ there, which is of use only to those who hold the same A₀; an
adapter's file does not. So before both factors are compressed, `balanced` writes the pair anew, as
the two halves of the singular value decomposition of B A: the same product, in factors that are
zero where it is, so that both are τ. DARE in both factors leaves the pair as it is: written anew,
few columns hold most of it, and dropping in those makes more noise.

A file holds the positions of what is not zero as gaps in Golomb's code (Golomb 1966), and a sign
bit each and one scale where all magnitudes are the same, which is ComPEFT's, or else the values.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.delta import AdapterError

FILE = "compact.safetensors"
FORMAT = "graft-compact-1"
MOST_ABOUT = 1 << 26  # bytes of text: some 100 for each tensor
LOW_RANK = ("lora_A.weight", "lora_B.weight")  # ends of PEFT's keys; Super-Tuning's end in the same
SPARSE = ("supertuning_values", "shira_weight")


def dare(
    update: Float[Tensor, "*s"], drop: float, rescale: float, generator: torch.Generator
) -> Float[Tensor, "*s"]:
    """Entries kept with probability 1 - drop and divided by `rescale`: 1 - drop for DARE, q for
    DAREx-q. The mask is one draw of torch.rand from the (CPU) generator, in the tensor's order."""
    kept = torch.rand(update.shape, generator=generator) >= drop
    return torch.where(kept.to(update.device), update.float() / rescale, 0.0).to(update.dtype)


def compeft(update: Float[Tensor, "*s"], keep: float, alpha: float) -> Float[Tensor, "*s"]:
    """α σ(τ) sign(τ) at the keep · n entries of largest magnitude (at least one), zero elsewhere; σ
    is over all n entries."""
    flat = update.flatten().float()
    top = flat.abs().topk(max(1, round(keep * len(flat)))).indices
    ternary = torch.zeros_like(flat)
    ternary[top] = alpha * flat.std(correction=0) * flat[top].sign()
    return ternary.view(update.shape).to(update.dtype)


def balanced(
    B: Float[Tensor, "o r"], A: Float[Tensor, "r i"]
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """Factors of the same product: B' = U √Σ and A' = √Σ Vᵀ of B A = U Σ Vᵀ, computed in fp64, in
    the dtypes given."""
    left, small_left = torch.linalg.qr(B.double())
    right, small_right = torch.linalg.qr(A.double().t())
    u, s, vt = torch.linalg.svd(small_left @ small_right.t(), full_matrices=False)
    thin = len(s)  # less than r where a side of the layer is
    new_B, new_A = torch.zeros_like(B), torch.zeros_like(A)
    new_B[:, :thin] = (left @ u * s.sqrt()).to(B.dtype)
    new_A[:thin] = (s.sqrt()[:, None] * (vt @ right.t())).to(A.dtype)
    return new_B, new_A


def low_rank_pairs(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Keys of A and B of each low-rank update of a matrix."""
    end_A, end_B = LOW_RANK
    pairs = [(key, key.removesuffix(end_A) + end_B) for key in tensors if key.endswith(end_A)]
    return [(a, b) for a, b in pairs if b in tensors and tensors[a].ndim == tensors[b].ndim == 2]


def updates(tensors: dict[str, Tensor], factors: str) -> list[str]:
    """Keys of an adapter file's tensors that hold an update; with factors=both A is one, as
    `balanced` makes it.

    Everything else is none: indices, magnitudes, biases and whole modules such as a classification
    head.
    """
    pairs = low_rank_pairs(tensors)
    keys = {b for _, b in pairs} | ({a for a, _ in pairs} if factors == "both" else set())
    return [key for key in tensors if key in keys or key.endswith(SPARSE)]


def golomb_parameter(count: int, n: int) -> int:
    """Golomb's M for `count` positions among n: the smallest with (1 - d)^M + (1 - d)^(M + 1) <= 1,
    d = count / n (Gallager and van Voorhis 1975)."""
    density = count / n
    if count == 0 or density >= 0.5:
        return 1
    return max(1, math.ceil(-math.log(2 - density) / math.log1p(-density)))


def golomb_encode(positions: Int[Tensor, " k"], m: int) -> UInt8[Tensor, " bytes"]:
    """The gaps between sorted positions in Golomb's code of parameter M, most significant bit
    first.

    A gap g (positions skipped) is g // M ones and a zero, then g % M in truncated binary. These
    bits are those of Golomb's code, in three streams one after the other, so that all gaps can be
    read at once: the unary parts; the first ⌈log₂ M⌉ - 1 bits of each remainder; the last bit of
    those remainders that have one more.
    """
    gaps = torch.diff(positions.long(), prepend=torch.tensor([-1])) - 1
    quotients, remainders = gaps // m, gaps % m
    bits, short = _truncated_binary(m)
    unary = torch.ones(int(quotients.sum()) + len(gaps), dtype=torch.uint8)
    unary[torch.cumsum(quotients + 1, 0) - 1] = 0
    if m == 1:
        return pack_bits(unary)
    long = remainders >= short
    words = torch.where(long, remainders + short, remainders)
    heads = torch.where(long, words >> 1, words)
    head_bits = (heads[:, None] >> torch.arange(bits - 2, -1, -1)) & 1
    return pack_bits(
        torch.cat([unary, head_bits.flatten().to(torch.uint8), (words[long] & 1).to(torch.uint8)])
    )


def golomb_decode(code: UInt8[Tensor, " bytes"], count: int, m: int) -> Int[Tensor, " k"]:
    """The `count` positions that `golomb_encode` was given.

    Raises:
        AdapterError: the code is too short for them.
    """
    stream = unpack_bits(code)
    bits, short = _truncated_binary(m)
    zeros = torch.nonzero(stream == 0).flatten()[:count]
    unary = int(zeros[-1]) + 1 if len(zeros) else 0
    heads_end = unary + count * max(bits - 1, 0)
    if len(zeros) < count or len(stream) < heads_end:
        raise AdapterError(
            f"the Golomb code of {count} positions is cut off after {len(code)} bytes"
        )
    gaps = (torch.diff(zeros, prepend=torch.tensor([-1])) - 1) * m
    if m > 1:
        weights = 1 << torch.arange(bits - 2, -1, -1)
        words = (stream[unary:heads_end].view(count, bits - 1) * weights).sum(1)
        long = words >= short
        tails = stream[heads_end : heads_end + int(long.sum())]
        if len(tails) < int(long.sum()):
            raise AdapterError(
                f"the Golomb code of {count} positions is cut off after {len(code)} bytes"
            )
        words[long] = 2 * words[long] + tails - short
        gaps += words
    return torch.cumsum(gaps + 1, 0) - 1


def _truncated_binary(m: int) -> tuple[int, int]:
    """Bits of the longer words for remainders below M, and how many remainders have one bit
    less."""
    bits = (m - 1).bit_length()
    return bits, (1 << bits) - m


def entropy(count: int, n: int) -> float:
    """Bits that `count` positions among n take at least on average: n H(count / n)."""
    d = count / n
    return 0.0 if d in (0, 1) else -n * (d * math.log2(d) + (1 - d) * math.log2(1 - d))


def pack_bits(bits: UInt8[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
    """Zeros and ones, eight to the byte, the first in the most significant place; the last byte is
    filled with ones."""
    filled = torch.cat([bits, torch.ones(-len(bits) % 8, dtype=torch.uint8)]).view(-1, 8)
    return (filled << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " bytes"]) -> Int[Tensor, " n"]:
    """The bits of `pack_bits`, with those that fill the last byte, as int64."""
    return ((packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1).flatten().long()


def write(path: Path, tensors: dict[str, Tensor], keys: Iterable[str]) -> None:
    """Write tensors to one safetensors file, those of `keys` by what is not zero in them, the
    others as they are. Nothing is lost: `read` gives all of them back, bit for bit (but for -0,
    which becomes 0).

    Coded tensors share streams, since headers of hundreds of small tensors would be larger than the
    tensors. `:about` (uint8) is JSON, deflated: a list of [key, shape, dtype, kind, count, M, bytes
    of its code], in the order of the streams. `:golomb` (uint8) holds the positions. Of kind signs,
    `:signs` (uint8) has a bit each, 1 for a negative number, and `:scales` (fp32) the magnitude; of
    kind values, `:values.DTYPE` has the numbers; kind indices is a list of sorted indices, padded
    with zeros, which are the positions.
    """
    coded = set(keys)
    stored: dict[str, Tensor] = {}
    about: list[list[Any]] = []
    streams: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        kind, positions, n = "indices", None, tensor.numel()
        if key in coded:
            flat = tensor.flatten()
            positions = torch.nonzero(flat).flatten()
            values = flat[positions]
            alike = (
                len(values)
                and values.dtype != torch.float64
                and bool((values.abs() == values[0].abs()).all())
            )
            kind = "signs" if alike else "values"
            if alike:
                streams.setdefault(":signs", []).append((values < 0).to(torch.uint8))
                streams.setdefault(":scales", []).append(values[:1].abs().float())
            else:
                streams.setdefault(f":values.{_name(tensor.dtype)}", []).append(values)
        elif key.endswith("supertuning_indices") and tensor.ndim == 1 and n:
            positions, n = _support(tensor), int(tensor.max()) + 1
        if positions is None:
            stored[key] = tensor.contiguous().clone()  # safetensors refuses shared memory
            continue
        m = golomb_parameter(len(positions), max(n, 1))
        code = golomb_encode(positions, m)
        streams.setdefault(":golomb", []).append(code)
        about.append(
            [key, list(tensor.shape), _name(tensor.dtype), kind, len(positions), m, len(code)]
        )
    stored |= {key: torch.cat(parts) for key, parts in streams.items()}
    if ":signs" in stored:
        stored[":signs"] = pack_bits(stored[":signs"])
    text = zlib.compress(json.dumps(about, separators=(",", ":")).encode(), 9)
    stored[":about"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(stored, path, {"format": FORMAT})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _support(indices: Int[Tensor, " k"]) -> Tensor | None:
    """Sorted indices without the zeros that pad them; None where they are something else."""
    rising = torch.diff(indices) > 0
    count = len(indices) if bool(rising.all()) else int(torch.nonzero(~rising)[0]) + 1
    return indices[:count].long() if not indices[count:].any() else None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write` wrote.

    Raises:
        AdapterError: there is no such file, or it is another one or damaged.
    """
    if not path.is_file():
        raise AdapterError(
            f"there is no {path}: {FILE} is what python -m trainer.compress writes beside the"
            " adapter"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FORMAT:
                raise AdapterError(
                    f"its format is {found!r}, expected {FORMAT!r}: it is no compressed adapter"
                )
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        about = json.loads(
            zlib.decompressobj().decompress(bytes(stored[":about"].tolist()), MOST_ABOUT)
        )
        if ":signs" in stored:
            stored[":signs"] = unpack_bits(stored[":signs"])
        places: dict[str, int] = {}

        def take(stream: str, count: int) -> Tensor:
            start = places.get(stream, 0)
            places[stream] = start + count
            if count < 0 or places[stream] > len(stored[stream]):
                raise AdapterError(f"its stream {stream} is cut off")
            return stored[stream][start : places[stream]]

        tensors = {str(entry[0]): _decoded(take, *entry[1:]) for entry in about}
        return tensors | {key: tensor for key, tensor in stored.items() if not key.startswith(":")}
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    except (
        SafetensorError,
        zlib.error,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
    ) as error:
        raise AdapterError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _decoded(
    take: Callable[[str, int], Tensor],
    shape: list[int],
    dtype: str,
    kind: str,
    count: int,
    m: int,
    size: int,
) -> Tensor:
    as_dtype = getattr(torch, dtype)
    if (
        not isinstance(as_dtype, torch.dtype)
        or min([*shape, count]) < 0
        or m < 1
        or count > math.prod(shape)
    ):
        raise AdapterError(f"it is damaged: {count} entries of {shape} {dtype}, M = {m}")
    n = math.prod(shape)
    positions = golomb_decode(take(":golomb", size), count, m)
    if kind == "indices":
        return (
            torch.cat([positions, torch.zeros(n - count, dtype=torch.int64)])
            .to(as_dtype)
            .view(shape)
        )
    if count and int(positions[-1]) >= n:
        raise AdapterError(f"it is damaged: {count} positions reach past {n} entries")
    tensor = torch.zeros(n, dtype=as_dtype)
    if kind == "signs":
        tensor[positions] = ((1 - 2 * take(":signs", count)) * take(":scales", 1)).to(as_dtype)
    else:
        tensor[positions] = take(f":values.{dtype}", count)
    return tensor.view(shape)
