"""The gradient of a weight at few of its entries: sampled dense-dense matrix multiplication.

    g_j = Σ_t dy[t, row_j] x[t, col_j]        j = 1 … k

    dy  (t, o)  gradient of the layer's output        x  (t, i)  the layer's input        k ≪ o i

`native` takes k dot products of length t, in fp32, by sddmm.c, for which a C compiler must be
there. `sampled` takes them by torch, in two to five times as long, of which half is transposing dy
and x in memory. `gathered` multiplies densely, some rows of the weight at a time, and keeps the k
entries. Which of these two is faster depends on the density and on the hardware: on CPU cores
without matrix units `sampled` costs a tenth to a fifth of the dense product at 0.5 % density, with
them a third, so `fastest` measures. It does not where `native` can be had, which is faster than
both up to a tenth of the entries or more: two runs of one command should take the same way.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger(__name__)

WAYS = ("native", "sampled", "gathered")
CHUNK = 1 << 24  # numbers of the dense gradient that exist at one time
TOKENS = 256  # whose fp32 copies fit into a CPU core's cache: twice as fast as all at once


def sampled(
    dy: Float[Tensor, "t o"],
    x: Float[Tensor, "t i"],
    crow: Int[Tensor, " o1"],
    col: Int[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """g in fp32 (float64 for float64 inputs), by torch.sparse.sampled_addmm. crow and col are the
    support in CSR."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not len(x):
        return torch.zeros(len(col), dtype=wide, device=x.device)
    with warnings.catch_warnings():
        # said once a process, of a beta state
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant).*")
        zeros = torch.zeros(len(col), dtype=wide, device=x.device)
        found = torch.sparse_csr_tensor(
            crow, col, zeros, (dy.shape[1], x.shape[1]), check_invariants=False
        )
        step = TOKENS if x.device.type == "cpu" else len(x)
        for start in range(0, len(x), step):
            # Transposed while they are narrow: the dot products run along the tokens.
            left = dy[start : start + step].t().contiguous().to(wide)
            right = x[start : start + step].t().contiguous().to(wide).t()
            found = torch.sparse.sampled_addmm(found, left, right)
        return found.values()


NATIVE = {torch.bfloat16: "sampled_bf16", torch.float32: "sampled_fp32"}  # sddmm.c's functions
NATIVE_SHARE = 0.1  # of a weight's entries
WORDS = 128  # of sddmm.c: 4-byte words of a column in a tile


# Not -ffast-math: a library that is linked with it rounds small numbers to zero in the whole
# process.
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC")


def _processor() -> str:
    """What -march=native looks at, since machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.node()}"
    return "".join(
        sorted(
            {
                line
                for line in lines
                if line.startswith(("model name", "flags", "Features", "CPU part"))
            }
        )
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """sddmm.c, compiled for this machine in a second and kept in the cache; None where there is no
    compiler for it.

    The compiler is $CC, cc, gcc or clang; the cache is $GRAFT_CACHE, else graft in the user's cache
    folder.
    """
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    compiler = shlex.split(os.environ.get("CC", "")) or [path for path in found if path][:1]
    if not compiler:
        return None
    source = Path(__file__).with_suffix(".c")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"
    folder = Path(os.environ.get("GRAFT_CACHE") or default) / "native"
    built = (
        folder
        / f"sddmm-{hashlib.sha256(repr((source.read_bytes(), compiler, FLAGS, _processor())).encode()).hexdigest()[:16]}.so"
    )
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Next to its place, where a kill leaves nothing in others' way, the compiler's own
            # files too.
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                command = [*compiler, *FLAGS, str(source), "-o", f"{beside}/made.so"]
                environment = os.environ | {"TMPDIR": beside}
                subprocess.run(
                    command, check=True, capture_output=True, timeout=60, env=environment
                )
                os.replace(f"{beside}/made.so", built)
        loaded = ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("sddmm.c is not used: %s %s", error, getattr(error, "stderr", b""))
        return None
    for name in NATIVE.values():
        getattr(loaded, name).argtypes = (
            [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
        )
        getattr(loaded, name).restype = None
    return loaded


def native(
    dy: Float[Tensor, "t o"],
    x: Float[Tensor, "t i"],
    crow: Int[Tensor, " o1"],
    col: Int[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """g in fp32, by sddmm.c, for CPU tensors in bf16 or fp32. crow and col are the support in CSR,
    in int32."""
    dy, x = dy.contiguous(), x.contiguous()
    (t, o), i = dy.shape, x.shape[1]
    call = getattr(library(), NATIVE[x.dtype])
    tile = 2 * WORDS if x.dtype == torch.bfloat16 else WORDS
    share = -(-t // (tile * torch.get_num_threads())) * tile  # tokens of a thread

    def part(start: int) -> Tensor:
        out, scratch = torch.zeros(len(col)), torch.empty((o + i) * WORDS, dtype=torch.int32)
        left, right = dy[start : start + share], x[start : start + share]
        given = (left.data_ptr(), right.data_ptr(), crow.data_ptr(), col.data_ptr(), out.data_ptr())
        call(*given, len(left), o, i, scratch.data_ptr())
        return out

    if t <= share:
        return part(0) if t else torch.zeros(len(col))
    # ctypes lets go of the interpreter's lock
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.stack(list(pool.map(part, range(0, t, share)))).sum(0)


def gathered(
    dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"], flat: Int[Tensor, " k"], chunk: int = CHUNK
) -> Float[Tensor, " k"]:
    """g in the inputs' dtype, from at most `chunk` numbers of the dense gradient at a time. flat
    are sorted row i + col."""
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


def possible(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `native` can be had for tensors of this kind, here."""
    return device.type == "cpu" and dtype in NATIVE and library() is not None


@functools.cache
def fastest(
    o: int, i: int, k: int, dtype: torch.dtype, device: torch.device, tokens: int = 1024
) -> str:
    """The way for such a layer: native where it can be had and k is small, else what took less time
    on random numbers, here and now."""
    if possible(dtype, device) and k <= NATIVE_SHARE * o * i:
        return "native"
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
