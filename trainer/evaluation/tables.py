"""Tables for a terminal, a Markdown file and a page; and numbers of several runs as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 40  # characters of a cell in a terminal


@dataclass(frozen=True)
class Table:
    """Cells of text. The first column names the row; columns in `texts` are not numbers."""

    columns: list[str]
    rows: list[list[str]]
    texts: frozenset[int] = frozenset({0})

    def show(self, longest: int = LONGEST) -> None:
        """Print the table. A file's lines are wider than a terminal's."""
        from rich import get_console

        console = get_console()
        if not console.is_terminal:
            console.width = 160
        console.print(self.rich(longest))

    def rich(self, longest: int = LONGEST) -> Any:
        """The table for a terminal, with long cells cut."""
        from rich.table import Table as Rich
        from rich.text import Text

        table = Rich()
        for at, column in enumerate(self.columns):
            table.add_column(Text(column), justify="left" if at in self.texts else "right")
        for row in self.rows:
            table.add_row(*(Text(_cut(cell, longest)) for cell in row))
        return table

    def markdown(self) -> str:
        """The table as Markdown, ending in a new line."""
        marks = ["---" if at in self.texts else "---:" for at in range(len(self.columns))]
        lines = [self.columns, marks, *self.rows]
        return "".join("| " + " | ".join(map(_escaped, line)) + " |\n" for line in lines)


def _cut(cell: str, longest: int) -> str:
    return cell if len(cell) <= longest else cell[: longest - 1] + "…"


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split())


def mean_sd(values: Sequence[float | None], form: str = "{:.4f}") -> str:
    """Format the mean of values, with the sample standard deviation if there are several: `0.139 ±
    0.004`. Missing values are left out; without any, the text is empty."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return ""
    mean = form.format(statistics.fmean(numbers))
    return mean if len(numbers) == 1 else f"{mean} ± {form.format(statistics.stdev(numbers))}"


def spread(values: Sequence[int | None]) -> str:
    """Format counts that should be equal: one number, or the least and the largest."""
    numbers = sorted({value for value in values if value is not None})
    return "–".join(f"{number:,}" for number in dict.fromkeys((*numbers[:1], *numbers[-1:])))  # noqa: RUF001


def size(count: float | None) -> str:
    """Format a number of bytes in decimal units."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float | None) -> str:
    """Format seconds as `12 s`, `3.4 min` or `5.6 h`."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
