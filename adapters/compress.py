"""Compression of an adapter's tensors: sparse, ternary, and coded in few bits.

    DARE      τ̃ = m ⊙ τ / (1 - p)    m ~ Bernoulli(1 - p)
                                      Yu et al. 2023, arXiv 2311.03099
    DAREx-q   τ̃ = m ⊙ τ / q          1 - p <= q <= 1
                                      Deng et al. 2024, arXiv 2410.09344
    ComPEFT   τ̃ = α σ(τ) sign(τ)     at the k n entries of largest |τ|, zero elsewhere
                                      Yadav et al. 2023, arXiv 2311.13171

    τ  the update: the change by training since a start at which the model answered as its base

Which tensors are τ:

  * A sparse delta's values start at zero, so they are τ.
  * B of a low-rank pair starts at zero too. Dropping in B alone keeps DARE's expectation,
    E[m ⊙ B / (1 - p)] A = B A. Its noise is that of dropping in single entries of a matrix,
    p / (1 - p) Σ_r |b_r|² |a_r|². Dropping in both, as PEFT's `dare_linear` does, gives
    (1 / (1 - p)² - 1) Σ_r |b_r|² |a_r|², eleven times as much at p = 0.9.
  * A starts at random numbers A₀, and its largest entries say little about the update. ComPEFT's
    task vector is A - A₀, which is useful only to those who have the same A₀. An adapter's file
    does not contain it. So before both factors are compressed, `balanced` replaces the pair by the
    two halves of the singular value decomposition of B A. The product is the same, and the factors
    are zero where it is, so that both are τ.

DARE in both factors does not balance the pair: in a balanced pair a few columns have most of the
update, and dropping in those gives more noise.

A file stores the positions of nonzero entries as gaps in Golomb's code (Golomb 1966). If all
magnitudes are the same, as in ComPEFT, it stores one sign bit for each entry and one scale, else
the values. A tensor without zeros that has 16 values at most, as BiLoRA's factors, is stored as
these values and 1, 2 or 4 bits for each entry.
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
WITH_LEVELS = "graft-compact-2"  # the same, with tensors of kind levels
MAX_INDEX_BYTES = 1 << 26  # of JSON: about 100 bytes for each tensor
PACKED = {":signs", ":levels"}  # streams of bits
# endings of PEFT's keys, which Super-Tuning's keys share
LOW_RANK = ("lora_A.weight", "lora_B.weight")
SPARSE = ("supertuning_values", "shira_weight")


def dare(
    update: Float[Tensor, "*s"], drop: float, rescale: float, generator: torch.Generator
) -> Float[Tensor, "*s"]:
    """Keep each entry with probability 1 - drop and divide it by `rescale`, which is 1 - drop for
    DARE and q for DAREx-q. The mask is one draw of torch.rand from the (CPU) generator, in the
    tensor's order."""
    mask = torch.rand(update.shape, generator=generator) >= drop
    return torch.where(mask.to(update.device), update.float() / rescale, 0.0).to(update.dtype)


def compeft(update: Float[Tensor, "*s"], keep: float, alpha: float) -> Float[Tensor, "*s"]:
    """Return α σ(τ) sign(τ) at the keep · n entries of largest magnitude (at least one), and zero
    elsewhere. σ is the standard deviation of all n entries."""
    flat = update.flatten().float()
    top = flat.abs().topk(max(1, round(keep * len(flat)))).indices
    ternary = torch.zeros_like(flat)
    ternary[top] = alpha * flat.std(correction=0) * flat[top].sign()
    return ternary.view(update.shape).to(update.dtype)


def compeft_together(updates: list[Tensor], keep: float, alpha: float) -> list[Tensor]:
    """Return `compeft` of all updates as one vector, as its paper has it: one threshold and one σ.
    A tensor of small entries may become all zero."""
    flat = torch.cat([update.flatten().float() for update in updates])
    parts = compeft(flat, keep, alpha).split([update.numel() for update in updates])
    return [
        part.view(update.shape).to(update.dtype)
        for part, update in zip(parts, updates, strict=True)
    ]


def balanced(
    B: Float[Tensor, "o r"], A: Float[Tensor, "r i"]
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """Return factors of the same product, B' = U √Σ and A' = √Σ Vᵀ of B A = U Σ Vᵀ. They are
    computed in fp64 and have the dtypes of B and A."""
    left, small_left = torch.linalg.qr(B.double())
    right, small_right = torch.linalg.qr(A.double().t())
    u, s, vt = torch.linalg.svd(small_left @ small_right.t(), full_matrices=False)
    rank = len(s)  # less than r if a side of the layer is smaller than r
    new_B, new_A = torch.zeros_like(B), torch.zeros_like(A)
    new_B[:, :rank] = (left @ u * s.sqrt()).to(B.dtype)
    new_A[:rank] = (s.sqrt()[:, None] * (vt @ right.t())).to(A.dtype)
    return new_B, new_A


def low_rank_pairs(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return the keys of A and B of each low-rank update of a matrix."""
    end_A, end_B = LOW_RANK
    pairs = [(key, key.removesuffix(end_A) + end_B) for key in tensors if key.endswith(end_A)]
    return [(a, b) for a, b in pairs if b in tensors and tensors[a].ndim == tensors[b].ndim == 2]


def updates(tensors: dict[str, Tensor], factors: str) -> list[str]:
    """Return the keys of an adapter file's tensors that are an update τ. With factors=both A is
    one, as `balanced` computes it.

    Other tensors are not: indices, magnitudes, biases and whole modules such as a classification
    head.
    """
    pairs = low_rank_pairs(tensors)
    keys = {b for _, b in pairs} | ({a for a, _ in pairs} if factors == "both" else set())
    return [key for key in tensors if key in keys or key.endswith(SPARSE)]


def golomb_parameter(count: int, n: int) -> int:
    """Return Golomb's M for `count` positions among n: the smallest M with
    (1 - d)^M + (1 - d)^(M + 1) <= 1, d = count / n (Gallager and van Voorhis 1975)."""
    density = count / n
    if count == 0 or density >= 0.5:
        return 1
    return max(1, math.ceil(-math.log(2 - density) / math.log1p(-density)))


def golomb_encode(positions: Int[Tensor, " k"], m: int) -> UInt8[Tensor, " bytes"]:
    """Encode the gaps between sorted positions in Golomb's code of parameter M, most significant
    bit first.

    A gap g (the number of skipped positions) is g // M ones and a zero, then g % M in truncated
    binary. The bits are stored in three parts, one after the other, so that all gaps can be read
    at once:
        1. the unary parts
        2. the first ⌈log₂ M⌉ - 1 bits of each remainder
        3. the last bit of those remainders that have one more
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
    """Decode `count` positions from the code of `golomb_encode`.

    Raises:
        AdapterError: the code is too short.
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
    """Return the number of bits of the longer words for remainders below M, and the number of
    remainders with one bit less."""
    bits = (m - 1).bit_length()
    return bits, (1 << bits) - m


def entropy(count: int, n: int) -> float:
    """Return the bits that `count` positions among n need at least on average: n H(count / n)."""
    d = count / n
    return 0.0 if d in (0, 1) else -n * (d * math.log2(d) + (1 - d) * math.log2(1 - d))


def pack_bits(bits: UInt8[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
    """Pack zeros and ones, eight per byte, the first as the most significant bit. The last byte is
    padded with ones."""
    filled = torch.cat([bits, torch.ones(-len(bits) % 8, dtype=torch.uint8)]).view(-1, 8)
    return (filled << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " bytes"]) -> Int[Tensor, " n"]:
    """Return the bits that `pack_bits` packed, with the padding of the last byte, as int64."""
    return ((packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1).flatten().long()


def write(path: Path, tensors: dict[str, Tensor], keys: Iterable[str]) -> None:
    """Write tensors to one safetensors file. Those of `keys` are coded by their nonzero entries;
    the others are stored unchanged. `read` restores all of them bit for bit (except -0, which
    becomes 0).

    Coded tensors share streams, since headers of hundreds of small tensors would be larger than the
    tensors:
        :about         uint8, deflated JSON: a list of [key, shape, dtype, kind, count, M, bytes of
                       its code], in the order of the streams
        :golomb        uint8, the positions
        :signs         uint8, of kind signs: one bit for each entry, 1 for a negative number
        :scales        fp32, of kind signs: the magnitude
        :values.DTYPE  of kind values: the numbers; of kind levels: the different ones, rising
        :levels        uint8, of kind levels: M bits for each entry, the number of its value
    A tensor of kind indices is a list of sorted indices padded with zeros. Its code has the indices
    as positions.
    """
    coded = set(keys)
    stored: dict[str, Tensor] = {}
    index: list[list[Any]] = []
    streams: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        kind, positions, n = "indices", None, tensor.numel()
        if key in coded:
            flat = tensor.flatten()
            if (bits := _level_bits(flat)) is not None:
                values, codes = flat.unique(return_inverse=True)
                streams.setdefault(f":values.{_name(tensor.dtype)}", []).append(values)
                streams.setdefault(":levels", []).append(_bits_of(codes, bits))
                about = [key, list(tensor.shape), _name(tensor.dtype), "levels"]
                index.append([*about, len(values), bits, 0])
                continue
            positions = torch.nonzero(flat).flatten()
            values = flat[positions]
            kind = "signs" if _equal_magnitudes(values) else "values"
            if kind == "signs":
                streams.setdefault(":signs", []).append((values < 0).to(torch.uint8))
                streams.setdefault(":scales", []).append(values[:1].abs().float())
            else:
                streams.setdefault(f":values.{_name(tensor.dtype)}", []).append(values)
        elif key.endswith("supertuning_indices") and tensor.ndim == 1 and n:
            positions, n = _support(tensor), int(tensor.max()) + 1
        if positions is None:
            # safetensors refuses tensors that share memory
            stored[key] = tensor.contiguous().clone()
            continue
        m = golomb_parameter(len(positions), max(n, 1))
        code = golomb_encode(positions, m)
        streams.setdefault(":golomb", []).append(code)
        index.append(
            [key, list(tensor.shape), _name(tensor.dtype), kind, len(positions), m, len(code)]
        )
    stored |= {key: torch.cat(parts) for key, parts in streams.items()}
    for name in PACKED & stored.keys():
        stored[name] = pack_bits(stored[name])
    text = zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
    stored[":about"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(stored, path, {"format": WITH_LEVELS if ":levels" in stored else FORMAT})


def _equal_magnitudes(values: Tensor) -> bool:
    """Return whether numbers differ in their signs alone, so that one fp32 scale holds them."""
    if not len(values) or values.dtype == torch.float64:
        return False
    return bool((values.abs() == values[0].abs()).all())


def _level_bits(flat: Tensor) -> int | None:
    """Return the bits that number the values of a tensor: 1, 2 or 4, or None if it has zeros or
    more than 16 values."""
    if not len(flat) or not flat.all() or not flat.isfinite().all():
        return None
    count = len(flat.unique())
    return next((bits for bits in (1, 2, 4) if count <= 2**bits), None)


def _bits_of(codes: Int[Tensor, " n"], bits: int) -> UInt8[Tensor, " m"]:
    places = torch.arange(bits - 1, -1, -1)
    return ((codes[:, None] >> places) & 1).flatten().to(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _support(indices: Int[Tensor, " k"]) -> Tensor | None:
    """Return sorted indices without their padding of zeros, or None if they are not sorted."""
    rising = torch.diff(indices) > 0
    count = len(indices) if bool(rising.all()) else int(torch.nonzero(~rising)[0]) + 1
    return indices[:count].long() if not indices[count:].any() else None


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `write` wrote.

    Raises:
        AdapterError: the file does not exist, has another format, or is damaged.
    """
    if not path.is_file():
        raise AdapterError(f"there is no {path}: graft compress writes {FILE} next to the adapter")
    try:
        with safe_open(path, framework="pt") as file:
            file_format = (file.metadata() or {}).get("format")
            if file_format not in (FORMAT, WITH_LEVELS):
                raise AdapterError(
                    f"its format is {file_format!r}, expected {FORMAT!r}: it is no compressed"
                    " adapter"
                )
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        text = bytes(stored[":about"].tolist())
        index = json.loads(zlib.decompressobj().decompress(text, MAX_INDEX_BYTES))
        for name in PACKED & stored.keys():
            stored[name] = unpack_bits(stored[name])
        offsets: dict[str, int] = {}

        def take(stream: str, count: int) -> Tensor:
            start = offsets.get(stream, 0)
            offsets[stream] = start + count
            if count < 0 or offsets[stream] > len(stored[stream]):
                raise AdapterError(f"its stream {stream} is cut off")
            return stored[stream][start : offsets[stream]]

        tensors = {str(entry[0]): _decoded(take, *entry[1:]) for entry in index}
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
    if kind == "levels":
        codes = (take(":levels", n * m).view(n, m) << torch.arange(m - 1, -1, -1)).sum(1)
        return take(f":values.{dtype}", count)[codes].view(shape)
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
