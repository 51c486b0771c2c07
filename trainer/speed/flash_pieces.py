"""torch's flash attention on a CPU, for what the queries of a row see.

The kernel knows causal masks, and any other mask at twice the work. So the mask of a row is cut
into rectangular pieces: the rows of a packed sequence are causal pieces of their own, and padding
is split off. Queries of different pieces are different; keys of different pieces may be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Piece(NamedTuple):
    """Queries a to b, which see nothing but keys low to high."""

    a: int
    b: int
    low: int
    high: int
    causal: bool  # the piece is a square, and its mask a triangle
    mask: Tensor | None  # added to the scores, (1, 1, b - a, high - low)


def available() -> bool:
    """Return whether this torch has the kernel."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def of_mask(mask: Tensor) -> list[list[Piece]] | None:
    """Return the pieces of each row of a mask (B | 1, 1, T, T), which is True or 0 where a query
    sees a key. None if this torch has no such kernel."""
    if not available():
        return None
    floating = mask.is_floating_point()
    seen = mask[:, 0] > torch.finfo(mask.dtype).min / 2 if floating else mask[:, 0]
    rows = []
    for number, row in enumerate(seen):
        added = mask[number, 0] if floating else None
        rows.append([_piece(row, added, *place) for place in _places(row)])
    return rows


def _places(seen: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first query, last query + 1, first key, last key + 1) of each piece."""
    T = len(seen)
    first = seen.int().argmax(-1)
    last = T - 1 - seen.int().flip(-1).argmax(-1)
    # A cut before t leaves nobody on one side who sees the other one.
    earliest = first.flip(0).cummin(0).values.flip(0)
    latest = last.cummax(0).values
    t = torch.arange(1, T, device=seen.device)
    cuts = t[(earliest[1:] >= t) & (latest[:-1] < t)].tolist()
    for a, b in zip([0, *cuts], [*cuts, T], strict=True):
        high = int(latest[b - 1]) + 1
        low = int(earliest[a])
        if low == a and a < high < b:  # keys from `high` on are padding
            yield a, high, a, high
            a = high
        yield a, b, low, high


def _piece(seen: Tensor, added: Tensor | None, a: int, b: int, low: int, high: int) -> Piece:
    part = seen[a:b, low:high]
    bias = None if added is None else added[a:b, low:high].masked_fill(~part, 0)
    if bias is None or not bool(bias.any()):
        if bool(part.all()):
            return Piece(a, b, low, high, False, None)
        if (a, b) == (low, high) and torch.equal(part, torch.ones_like(part).tril()):
            return Piece(a, b, low, high, True, None)
    mask = torch.zeros(part.shape, dtype=torch.float32) if bias is None else bias
    return Piece(a, b, low, high, False, mask.masked_fill(~part, float("-inf"))[None, None])


def _rows(pieces: list[list[Piece]], B: int) -> Iterator[tuple[slice, Piece]]:
    """Yield the rows of a batch with each of their pieces. One list is for all rows."""
    for number, row in enumerate(pieces):
        for piece in row:
            yield slice(0, B) if len(pieces) == 1 else slice(number, number + 1), piece


def forward(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K T d"],
    v: Float[Tensor, "B K T d"],
    scale: float,
    pieces: list[list[Piece]],
) -> tuple[Float[Tensor, "B T H d"], list[Tensor]]:
    """Return the output, and the log of the softmax' sums for each piece."""
    B, H, T, d = q.shape
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = q.new_empty(B, T, H, d), []
    for rows, (a, b, low, high, causal, mask) in _rows(pieces, B):
        part, logsumexp = kernel(
            q[rows, :, a:b],
            k[rows, :, low:high],
            v[rows, :, low:high],
            0.0,
            causal,
            attn_mask=None if mask is None else mask.to(q.dtype),
            scale=scale,
        )
        sums.append(logsumexp)
        if part.shape[0] == B and b - a == T:
            return part.transpose(1, 2), sums  # the kernel's own layout
        out[rows, a:b] = part.transpose(1, 2)
    return out, sums


def backward(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K T d"],
    v: Float[Tensor, "B K T d"],
    out: Float[Tensor, "B T H d"],
    sums: Sequence[Tensor],
    dout: Float[Tensor, "B T H d"],
    scale: float,
    pieces: list[list[Piece]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. At most two pieces share a key, so that sums in the
    dtype of q round once."""
    B, T = len(q), q.shape[2]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dout, out = dout.to(q.dtype).transpose(1, 2), out.transpose(1, 2)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (rows, (a, b, low, high, causal, mask)), logsumexp in zip(
        _rows(pieces, B), sums, strict=True
    ):
        grads = kernel(
            dout[rows, :, a:b],
            q[rows, :, a:b],
            k[rows, :, low:high],
            v[rows, :, low:high],
            out[rows, :, a:b],
            logsumexp,
            0.0,
            causal,
            attn_mask=None if mask is None else mask.to(q.dtype),
            scale=scale,
        )
        if len(grads[0]) == B and b - a == high - low == T:
            return grads
        dq[rows, :, a:b] = grads[0]
        dk[rows, :, low:high] += grads[1]
        dv[rows, :, low:high] += grads[2]
    return dq, dk, dv
