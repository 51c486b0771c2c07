"""docs/families.md from the results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from scripts.zoo import running
from scripts.zoo.families import every

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "families.md"


def counts(results: Path) -> str:
    """How many cells have which outcome."""
    cells = [
        cell["outcome"]
        for name in every()
        for cell in running.read(results / f"{name}.json")["checks"].values()
    ]
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(cells).most_common())


def write(results: Path) -> None:
    """Write the page."""
