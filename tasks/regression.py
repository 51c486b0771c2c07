"""Regression: a text, or a pair of texts, and its number, such as a rating or a similarity.

{"text": "hide new secretions from the parental units", "label": 1.8}
"""

from __future__ import annotations

import math
from typing import Any

from tasks.classification import Classification
from tasks.reading import DataError
from tasks.task import column


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
        return number
