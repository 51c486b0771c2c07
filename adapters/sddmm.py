"""The gradient of a weight at few of its entries: sampled dense-dense matrix multiplication.

    g_j = Σ_t dy[t, row_j] x[t, col_j]        j = 1 … k

    dy  (t, o)  gradient of the layer's output        x  (t, i)  the layer's input        k ≪ o i

`sampled` takes k dot products of length t, in fp32. `gathered` multiplies densely, some rows of the weight at a time, and
keeps the k entries. Which is faster depends on the density and on the hardware: on CPU cores without matrix units `sampled`
costs a tenth to a fifth of the dense product at 0.5 % density, with them a third, so `fastest` measures.
"""

from __future__ import annotations

import functools
import time
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

WAYS = ("sampled", "gathered")
CHUNK = 1 << 24  # numbers of the dense gradient that exist at one time
TOKENS = 256  # whose fp32 copies fit into a CPU core's cache: twice as fast as all at once


def sampled(
    dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"], crow: Int[Tensor, " o1"], col: Int[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """g in fp32 (float64 for float64 inputs), by torch.sparse.sampled_addmm. crow and col are the support in CSR."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not len(x):
        return torch.zeros(len(col), dtype=wide, device=x.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant).*")  # said once a process, of a beta state
        zeros = torch.zeros(len(col), dtype=wide, device=x.device)
        found = torch.sparse_csr_tensor(crow, col, zeros, (dy.shape[1], x.shape[1]), check_invariants=False)
        step = TOKENS if x.device.type == "cpu" else len(x)
        for start in range(0, len(x), step):
            # Transposed while they are narrow: the dot products run along the tokens.
            left = dy[start : start + step].t().contiguous().to(wide)
            right = x[start : start + step].t().contiguous().to(wide).t()
            found = torch.sparse.sampled_addmm(found, left, right)
        return found.values()


def gathered(
    dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"], flat: Int[Tensor, " k"], chunk: int = CHUNK
) -> Float[Tensor, " k"]:
    """g in the inputs' dtype, from at most `chunk` numbers of the dense gradient at a time. flat are sorted row i + col."""
    (o, i), rows = (dy.shape[1], x.shape[1]), max(1, chunk // x.shape[1])
    if rows >= o:
        return (dy.t() @ x).view(-1).index_select(0, flat)
    starts = range(0, o, rows)
    ends = torch.tensor([min(start + rows, o) * i for start in starts], device=flat.device)
    bounds = [0, *torch.searchsorted(flat, ends.to(flat.dtype)).tolist()]
    parts = []
    for start, low, high in zip(starts, bounds, bounds[1:], strict=False):
        if high > low:
            part = dy[:, start : start + rows].t() @ x
            parts.append(part.view(-1).index_select(0, flat[low:high] - start * i))
    return torch.cat(parts)


@functools.cache
def fastest(o: int, i: int, k: int, dtype: torch.dtype, device: torch.device, tokens: int = 1024) -> str:
    """The way that took less time for such a layer on random numbers, here and now."""
    draw = torch.Generator().manual_seed(0)
    flat = (torch.arange(k, dtype=torch.float64) * (o * i / k)).long()
    crow = torch.searchsorted(flat // i, torch.arange(o + 1)).int().to(device)
    col, flat = (flat % i).int().to(device), flat.int().to(device)
    dy = torch.randn(tokens, o, generator=draw).to(device, dtype)
    x = torch.randn(tokens, i, generator=draw).to(device, dtype)
    times = {
        "sampled": _time(lambda: sampled(dy, x, crow, col), device),
        "gathered": _time(lambda: gathered(dy, x, flat), device),
    }
    return min(times, key=times.__getitem__)


def _time(call: object, device: torch.device) -> float:
    least = float("inf")
    for _ in range(4):  # the first warms up, and is never the least
        started = time.perf_counter()
        call()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - started)
    return least
