"""SparseGPT (arXiv 2301.00774): pruning that moves the other entries of a row to make up for it.

    H = (2/N) XᵀX + λ mean(diag) I          X (N, i) inputs of all calibration tokens, λ = 0.01
    U = upper Cholesky factor of H⁻¹        H⁻¹ = UᵀU
    for j = 0, 1, ...:                       from left to right
        where j begins a group: of each row the entries of least W_p² / U_pp² of the group will go
        q_j = w_j, or 0 where it goes        e = (w_j - q_j) / U_jj
        W_:,j: -= e U_j,j:

The update of a column reaches those to its right. Columns are worked on in blocks of 128, and the
columns behind a block are updated once, by all errors of the block. Without groups the entries that
go are chosen for a whole block at once, over all rows. An input that is always 0 loses its weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.models.base import BaseError
from trainer.shrinking.patterns import Pattern

BLOCK = 128
DAMPING = 0.01
TRIES = 4  # each with ten times the damping of the one before


class Gram:
    """Sums XᵀX of a linear's inputs, (i, i), in fp32 or more."""

    def __init__(self, linear: object = None):
        self.product: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Float[Tensor, "t i"]) -> None:
        """Add the inputs of some tokens."""
        exact = inputs if inputs.dtype.itemsize == 8 else inputs.float()
        product = exact.T @ exact
        self.product = product if self.product is None else self.product.add_(product)
        self.tokens += len(inputs)


def prune(weight: Float[Tensor, "o i"], gram: Gram, pattern: Pattern) -> Float[Tensor, "o i"]:
    """Return the pruned weight, in the same dtype.

    Raises:
        BaseError: H has no Cholesky factor, even with much damping.
    """
    assert gram.product is not None
    hessian = gram.product * (2 / gram.tokens)
    rest = weight.to(hessian.dtype, copy=True)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    rest[:, dead] = 0
    upper = _upper_factor(hessian)
    width = BLOCK // pattern.group * pattern.group if pattern.group else BLOCK
    for start in range(0, rest.shape[1], width):
        columns = slice(start, min(start + width, rest.shape[1]))
        errors = _prune_block(rest[:, columns], upper[columns, columns], pattern)
        rest[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
    return rest.to(weight.dtype)


def _prune_block(
    block: Float[Tensor, "o b"], upper: Float[Tensor, "b b"], pattern: Pattern
) -> Float[Tensor, "o b"]:
    """Prune the columns of a block in place. Return their errors, divided by the diagonal of U."""
    errors = torch.zeros_like(block)
    gone = torch.zeros_like(block, dtype=torch.bool)
    diagonal = upper.diagonal()
    if pattern.group is None:
        scores = (block / diagonal).square().flatten()
        count = round((1 - pattern.density) * scores.numel())
        gone.view(-1)[scores.topk(count, largest=False).indices] = True
    for j in range(block.shape[1]):
        if pattern.group is not None and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            gone[:, group] = ~pattern.keep((block[:, group] / diagonal[group]).square())
        error = torch.where(gone[:, j], block[:, j], 0) / diagonal[j]
        block[:, j:] -= error.unsqueeze(1) * upper[j, j:]
        block[gone[:, j], j] = 0  # exactly, without the rounding of the line before
        errors[:, j] = error
    return errors


def _upper_factor(hessian: Float[Tensor, "i i"]) -> Float[Tensor, "i i"]:
    """Return the upper Cholesky factor of the inverse of a damped H."""
    mean = hessian.diagonal().mean()
    damping = DAMPING
    for _ in range(TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, fault = torch.linalg.cholesky_ex(damped)
        if not fault:
            upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not fault and bool(upper.isfinite().all()):
                return upper
        damping *= 10
    raise BaseError(
        "method=sparsegpt: the inputs of a layer have no usable covariance. Use more or other"
        " calibration rows, or method=wanda"
    )
