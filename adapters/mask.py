"""The support of a sparse delta: the entries of a weight that it may change, as sorted flat int32
indices row · in + column.

    masks.safetensors   one tensor of indices for each adapted layer, by the layer's name;
                        metadata: {"shapes": JSON}

An exported adapter (adapter_model.safetensors of Super-Tuning) can be read as a mask too.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.delta import AdapterError
from adapters.io import save_tensors

INT32 = 2**31
EXACT = 1024  # eigenvectors of 1024 x 1024 take half a second of a core, and ten are needed
EXPORTED = ".supertuning_indices"  # the ending of PEFT's keys of indices in an adapter folder


def entries(o: int, i: int, density: float, name: str) -> int:
    """Return the number of entries of an (o, i) weight at a density. The expression is the one of
    PEFT's Super-Tuning, and rounds the same way.

    Raises:
        AdapterError: the density is not in (0, 1], it leaves no entry, or the weight is too large
        for int32 indices.
    """
    if not 0 < density <= 1:
        raise AdapterError(
            f"the density of {name} is {density}: expected more than 0 and at most 1, as 0.006 for"
            " 0.6 %"
        )
    if o * i >= INT32:
        raise AdapterError(
            f"{name} has {o} x {i} entries, and indices are int32, below {INT32}: leave it out with"
            " adapter.exclude_modules"
        )
    k = int(o * i * (1 - (1 - density)))
    if k < 1:
        raise AdapterError(
            f"density {density:g} of {name} is less than one of its {o * i} entries: raise it, or"
            " leave the layer out with adapter.exclude_modules"
        )
    return k


def top(scores: Float[Tensor, "*shape"], k: int, name: str) -> Int[Tensor, " k"]:
    """Return the k entries of largest score.

    Raises:
        AdapterError: a score is NaN, or there are fewer than k.
    """
    flat = scores.reshape(-1)
    if k > flat.numel():
        raise AdapterError(f"{name} has {flat.numel()} entries, and {k} of them are to be chosen")
    if torch.isnan(flat).any():
        raise AdapterError(f"the scores of {name} hold NaN, so no mask can be made from them")
    return torch.topk(flat, k, sorted=False).indices.sort().values.int()


def among(
    scores: Float[Tensor, "*shape"], allowed: Bool[Tensor, " n"] | None
) -> Float[Tensor, "*shape"]:
    """Return scores of which those outside `allowed`, if there is one, are -inf."""
    return scores if allowed is None else scores.masked_fill(~allowed.view(scores.shape), -math.inf)


def decompose(
    weight: Float[Tensor, "o i"],
    k: int,
    rank: int,
    name: str,
    allowed: Bool[Tensor, " n"] | None = None,
    rounds: int = 10,
) -> Int[Tensor, " k"]:
    """Return the support of S in W ≈ L + S, L of a rank and S of k entries, of the allowed ones if
    these are given: DSEE's choice (Chen et al. 2021, arXiv 2111.00160).

    From S = 0, in each round
        L = the largest `rank` singular triplets of W - S
        S = the k entries of W - L of largest size
    """
    sparse = torch.zeros_like(weight)
    for _ in range(rounds):
        rest = weight - _low_rank(weight - sparse, rank)
        support = top(among(rest.abs(), allowed), k, name)
        sparse = torch.zeros_like(weight)
        places = support.long()
        sparse.view(-1)[places] = rest.reshape(-1)[places]
    return support


def _low_rank(matrix: Float[Tensor, "o i"], rank: int) -> Float[Tensor, "o i"]:
    """Return the nearest matrix of a rank. Where the smaller side is longer than EXACT, it is
    computed by block power iterations from a fixed draw, which are close to it."""
    if rank == 0:
        return torch.zeros_like(matrix)
    if matrix.shape[0] < matrix.shape[1]:
        return _low_rank(matrix.t(), rank).t()
    if matrix.shape[1] <= EXACT:
        v = torch.linalg.eigh(matrix.t().double() @ matrix.double())[1][:, -rank:].to(matrix.dtype)
        return matrix @ v @ v.t()
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 10, matrix.shape[1]), niter=4)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].t()


def refuse_outside(
    support: Int[Tensor, " k"], allowed: Bool[Tensor, " n"] | None, name: str
) -> None:
    """Refuse a support that was read from a file and has entries that are not allowed.

    Raises:
        AdapterError: counts these entries.
    """
    if allowed is not None and not allowed[support.long()].all():
        outside = int((~allowed[support.long()]).sum())
        raise AdapterError(
            f"adapter.within=nonzero: {outside} of the {len(support)} entries of adapter.mask at"
            f" {name} are zeros of the base. Use a mask that was made on this base, or within=all"
        )


def random(
    o: int,
    i: int,
    k: int,
    generator: torch.Generator,
    allowed: Bool[Tensor, " n"] | None = None,
) -> Int[Tensor, " k"]:
    """Draw k uniformly random entries of an (o, i) weight, with a generator on the CPU; of the
    allowed ones, if these are given."""
    if allowed is not None:
        places = allowed.cpu().nonzero().squeeze(1)
        return places[torch.randperm(len(places), generator=generator)[:k]].sort().values.int()
    if k > o * i // 4:
        return torch.randperm(o * i, generator=generator)[:k].sort().values.int()
    drawn = torch.zeros(0, dtype=torch.int64)
    while len(drawn) < k:  # cheaper than a permutation of all entries
        drawn = torch.cat(
            [drawn, torch.randint(o * i, (k + k // 8 + 8,), generator=generator)]
        ).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:k]].sort().values.int()


def save(file: Path, supports: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> None:
    """Write supports by their layers' names."""
    temporary = file.with_name(file.name + ".tmp")
    tensors = {name: indices.detach().cpu().contiguous() for name, indices in supports.items()}
    save_tensors(tensors, temporary, {"shapes": json.dumps(shapes)})
    temporary.rename(file)


def load(file: Path, layers: dict[str, tuple[tuple[int, int], int]]) -> dict[str, Tensor]:
    """Return the supports of `layers`, {name: ((o, i), k)}, from a mask file or an adapter folder.

    Raises:
        AdapterError: the file is missing or unreadable, or is of another model or density.
    """
    setting = f"adapter.mask={file}"
    masks, shapes = _read(file, setting)
    missing, unknown = sorted(layers.keys() - masks.keys()), sorted(masks.keys() - layers.keys())
    if missing or unknown:
        raise AdapterError(
            f"{setting} is of another model or other target modules: {len(missing)} layers are"
            f" missing {missing[:2]}, {len(unknown)} are not adapted here {unknown[:2]}"
        )
    for name, (shape, k) in layers.items():
        if tuple(shapes.get(name, shape)) != shape:
            raise AdapterError(
                f"{setting} is of another model: {name} is {tuple(shapes[name])} there and {shape}"
                " here"
            )
        masks[name] = _checked(masks[name], k, shape[0] * shape[1], name, setting)
    return masks


def _read(file: Path, setting: str) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return the indices and, where the file has them, the weights' shapes, by layer name."""
    if file.is_dir():
        names = ("masks.safetensors", "adapter_model.safetensors")
        file = next((file / name for name in names if (file / name).exists()), file)
    if not file.is_file():
        raise AdapterError(
            f"{setting}: there is no such file. Give masks.safetensors of a run, or an exported"
            " adapter's folder"
        )
    try:
        with safe_open(file, "pt") as opened:
            shapes = json.loads((opened.metadata() or {}).get("shapes", "{}"))
            masks = {
                key.removesuffix(EXPORTED).removeprefix("base_model.model."): opened.get_tensor(key)
                for key in opened.keys()  # noqa: SIM118
                if key.endswith(EXPORTED) or key in shapes
            }
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"{setting} cannot be read as masks: {error}") from error
    if not masks:
        raise AdapterError(
            f"{setting} holds no masks. Give masks.safetensors of a run, or an adapter that was"
            " exported with to=peft"
        )
    return masks, shapes


def _checked(indices: Tensor, k: int, numel: int, name: str, setting: str) -> Int[Tensor, " k"]:
    """Return a layer's k indices, sorted."""
    # Super-Tuning has one density for all layers: padding follows the layer's k indices
    if len(indices) > k and indices[k] < indices[k - 1]:
        indices = indices[:k]
    if len(indices) != k:
        raise AdapterError(
            f"{setting} has {len(indices)} entries for {name} (density {len(indices) / numel:g})"
            f" where the settings ask for {k} ({k / numel:g}). Set adapter.density to the"
            " mask's"
        )
    ascending = indices.long().sort().values
    if ascending[0] < 0 or ascending[-1] >= numel or (ascending[1:] == ascending[:-1]).any():
        raise AdapterError(
            f"{setting}: the indices of {name} leave the weight's {numel} entries, or repeat"
        )
    return ascending.int()


def statistics(support: Int[Tensor, " k"], weight: Float[Tensor, "o i"]) -> dict[str, float]:
    """Return the shares of rows and of columns that a support touches, and the share of its entries
    that are among the k largest weights."""
    o, i = weight.shape
    flat = support.long()
    largest = torch.zeros(o * i, dtype=torch.bool, device=weight.device)
    largest[torch.topk(weight.reshape(-1).abs(), len(flat), sorted=False).indices] = True
    return {
        "rows": len(torch.unique(flat // i)) / o,
        "columns": len(torch.unique(flat % i)) / i,
        "among_largest": float(largest[flat].float().mean()),
    }


def processes() -> int:
    """Return the number of processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def refuse_divergence(supports: dict[str, Tensor]) -> None:
    """Check that all processes have the same supports.

    Raises:
        AdapterError: another process has other supports.
    """
    if processes() == 1:
        return
    digest = hashlib.sha256()
    for name in sorted(supports):
        digest.update(name.encode())
        digest.update(supports[name].cpu().numpy().tobytes())
    digests: list[str | None] = [None] * processes()
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise AdapterError(
            "the processes of this run have different supports, so their values cannot be averaged"
        )
