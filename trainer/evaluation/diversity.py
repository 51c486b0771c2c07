"""The diversity of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence

LAST = 96  # tokens that are counted, those of the hyperfitting paper (arXiv 2412.04318)


def type_token_ratio(ids: Sequence[int], last: int = LAST) -> float:
    """Return the number of different tokens over the number of all among the `last` ones: 1 where
    none occurs twice, near 0 where one is repeated, 0 without a token."""
    end = list(ids)[-last:]
    return len(set(end)) / len(end) if end else 0.0
