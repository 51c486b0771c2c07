"""Regression: a text, or a pair of texts, and its number, such as a rating or a similarity.

{"text": "hide new secretions from the parental units", "label": 1.8}
"""

from __future__ import annotations

import math
from typing import Any

from tasks.classification import Classification
from tasks.reading import DataError
from tasks.task import column

LARGEST = 1e18  # the largest float32 is 3.4e38, and the loss is a sum of squares


class Regression(Classification):
    """Texts, each with a number."""

    problem = "regression"
    labels = ["value"]  # type: ignore[assignment]  # the name of the model's only output

    def __init__(
        self,
        path: str | list[str],
        split: str,
        eval_path: str | list[str] | None,
        eval_split: str,
        eval_fraction: float,
        limit: int | None,
        eval_limit: int | None,
        columns: dict[str, str],
        on_bad: str,
        **more: Any,
    ):
        super().__init__(
            path,
            split,
            eval_path,
            eval_split,
            eval_fraction,
            limit,
            eval_limit,
            columns,
            None,
            on_bad,
            **more,
        )

    def target(self, row: dict[str, Any]) -> float:
        """Return the number of a row.

        Raises:
            DataError: the row has none.
        """
        value = column(row, self.columns, "label")
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"label must be a number, and is {str(value)[:60]!r}")
        if abs(number) >= LARGEST:
            raise DataError(
                f"label must be below {LARGEST:.0e}, and is {str(value)[:60]!r}: its square would"
                " be infinite in float32. Scale the numbers"
            )
        return number
