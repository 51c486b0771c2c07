"""The token that stands for tokens that are not drafted yet, in drafters that draft them in one
pass."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from trainer.drafters import DrafterError


def check_mask(requested: int | None, vocabulary: int) -> None:
    """Refuse drafter.mask_token outside a table of `vocabulary` rows.

    Raises:
        DrafterError: it is.
    """
    if requested is not None and requested >= vocabulary:
        raise DrafterError(
            f"drafter.mask_token={requested}: the model has tokens 0 .. {vocabulary - 1}"
        )


def chosen_mask(requested: int | None, frequency: Int[Tensor, " V"]) -> int:
    """Return `requested`, or for None the highest token that no row trains.

    Raises:
        DrafterError: the rows train the token, or all.
    """
    if requested is None:
        unused = (frequency == 0).nonzero()[:, 0]
        if not len(unused):
            raise DrafterError(
                "drafter.mask_token=null is a token that no row trains, and the rows train all"
                f" {len(frequency)}: name one, drafter.mask_token=ID"
            )
        return int(unused[-1])
    if frequency[requested]:
        raise DrafterError(
            f"drafter.mask_token={requested} is trained {int(frequency[requested])} times in the"
            " rows, and has to stand for tokens that are not known yet: set"
            " drafter.mask_token=null, or a token that no row has"
        )
    return requested
