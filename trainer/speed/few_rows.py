"""The two parts of a pass over a few tokens that read memory, in bf16 on a CPU: by few_rows.c.

    products     y = x wᵀ + b                      x (n, i), w (o, i)
    attention    o = softmax(s q kᵀ + mask) v      q (B, H, n, d), k and v (B, G, T, d)

H is a multiple of G: heads of q share a head of k and v.

Sums are in fp32. Numbers of a row do not depend on how many rows there are, so a pass over drafted
tokens rounds as one over a single token. torch's kernels are made for many rows: for one, its
product reads weights at a third of the memory's speed, and its attention takes six times as long.
On processors without AVX-512 there is no library, and torch is faster.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import native
from trainer.speed import elementwise

MOST = 64  # rows of a product, or of an attention's queries
LANES = 16  # numbers of a vector
SHARE = 1 << 21  # weights of a thread, at least: less is read before a thread has started
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_ARGUMENTS = {"product": "pppiiiii", "attended": "ppppppfp", "layer": "pppppipppppp"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return few_rows.c, compiled for this machine, or None if it has no AVX-512 or no compiler."""
    loaded = native.library(Path(__file__).with_suffix(".c"))
    for name, kinds in _ARGUMENTS.items() if loaded is not None else ():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [_TYPES[kind] for kind in kinds], None
    return loaded


def is_product(linear: nn.Module) -> bool:
    """Return whether the products of a layer can be computed here."""
    weight = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and type(weight) is nn.Parameter
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[1] % (2 * LANES) == 0
    )


def product(
    x: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Tensor | None = None
) -> Float[Tensor, "*b o"]:
    """Return x wᵀ + b for a layer of `is_product` and x in bf16."""
    x = x.contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    call: Any = library().product  # type: ignore[union-attr]
    places = x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // inputs, inputs, outputs
    if outputs * inputs < 2 * SHARE:
        call(*places, 0, outputs)
    else:
        elementwise.shared(lambda a, b: call(*places, a, b), outputs, inputs, SHARE)
    return y if bias is None else y.add_(bias)


class Steps(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("sequence", "head", "row")]


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "G", "n", "count", "d", "kind")),
        *((name, Steps) for name in ("mask", "q", "k", "v")),
    ]


def can_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether `attended` can be called with these tensors, of which q has as many places as
    the mask, or one."""
    n, d = q.shape[2:]
    return (
        n <= MOST
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and k.shape == v.shape
        and k.shape[3] == d
        and d % LANES == 0
        and q.shape[1] % k.shape[1] == 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and (
            n == 1
            if mask is None
            else mask.dtype in (torch.bool, torch.bfloat16)
            and mask.shape in ((1, 1, n, k.shape[2]), (q.shape[0], 1, n, k.shape[2]))
            and mask.stride(3) == 1
        )
    )


@dataclass
class LowRank:
    """b a x, which a pass adds to a linear layer's y at the last places of each sequence. A layer
    has it as the attribute `low_rank`."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    rows: int  # places of a sequence
    last: int
    used: bool = False  # in this pass


def low_rank(
    A: Float[Tensor, "r i"], B: Float[Tensor, "o r"], scale: float
) -> tuple[Tensor, Tensor]:
    """Return (a, b) in bf16 with b a = scale B A, and as many rows and columns of zeros as
    `product` needs."""
    more = -len(A) % (2 * LANES)
    a = F.pad(A.detach(), (0, 0, 0, more)).bfloat16()
    return a, F.pad(scale * B.detach(), (0, more)).bfloat16()


def corrected(
    x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"], low: LowRank
) -> Float[Tensor, "*b o"]:
    """Add b a x to the last places of y, in place, as few_rows.c does in a whole layer."""
    x, to = x[..., -low.last :, :], y[..., -low.last :, :]
    by = product if x.numel() <= MOST * x.shape[-1] else F.linear
    to += by(by(x, low.a), low.b)
    return y


def attended(
    q: Float[Tensor, "B H n d"],
    k: Float[Tensor, "B G T d"],
    v: Float[Tensor, "B G T d"],
    mask: Tensor | None,
    scale: float,
) -> Float[Tensor, "B n H d"]:
    """Return the attention of q over all keys. A mask (1 or B, 1, n, T) is True for a key that is
    seen, or added to the scores in bf16."""
    B, H, n, d = q.shape
    G, count = k.shape[1:3]
    shape = Shape(
        B, H, G, n, count, d, *described(mask), *(Steps(*x.stride()[:3]) for x in (q, k, v))
    )
    out = q.new_empty(B, n, H, d)
    place = None if mask is None else mask.data_ptr()
    pointers = [x.data_ptr() for x in (q, k, v)]
    scratch = scratch_of(shape)
    call: Any = library().attended  # type: ignore[union-attr]
    call(*pointers, place, out.data_ptr(), ctypes.addressof(shape), scale, scratch.data_ptr())
    return out


def described(mask: Tensor | None) -> tuple[int, Steps]:
    """Return (kind, steps) of a mask, as few_rows.c has them."""
    if mask is None:
        return 0, Steps()
    kind = 2 if mask.dtype == torch.bool else 1
    return kind, Steps(mask.stride(0) if len(mask) > 1 else 0, 0, mask.stride(2))


def scratch_of(shape: Shape) -> Tensor:
    """Return the memory in which an attention of this shape computes."""
    T = -(-shape.count // LANES) * LANES
    rows = shape.n * shape.H // shape.G
    return torch.empty((shape.d + T) * (rows + 3) + shape.d * LANES, dtype=torch.float32)
