"""Wanda (arXiv 2306.11695): pruning by magnitude times the norm of the input.

    S_ij = |W_ij| n_j     n_j = ‖X_:j‖₂ over all calibration tokens

W (o, i) is the weight, X (t, i) its inputs. Of each group of a row, or of each row, the entries of
least S become zero. The others stay as they are.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from trainer.shrinking.patterns import Pattern


class InputNorms:
    """Sums the squares of each input of a linear, (i,), in fp32 or more."""

    def __init__(self, linear: object = None):
        self.squares: Tensor | None = None

    def add(self, inputs: Float[Tensor, "t i"]) -> None:
        """Add the inputs of some tokens."""
        exact = inputs if inputs.dtype.itemsize == 8 else inputs.float()
        squares = exact.square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares

    @property
    def norms(self) -> Float[Tensor, " i"]:
        """‖X_:j‖₂ of each input."""
        assert self.squares is not None
        return self.squares.sqrt()


def prune(
    weight: Float[Tensor, "o i"], norms: Float[Tensor, " i"], pattern: Pattern
) -> Float[Tensor, "o i"]:
    """Return the pruned weight, in the same dtype."""
    return weight * pattern.keep(weight.abs().to(norms.dtype) * norms)
