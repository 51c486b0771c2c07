"""Tables of scores of lm-eval, read from rows of a journal that may be a stranger's."""

from __future__ import annotations

import math
from typing import Any

from trainer.evaluation.run_summary import is_number
from trainer.evaluation.tables import Table

STDERR = "/stderr"  # ends the name of a standard error
OWN = ("kind", "step", "model", "settings", "rows", "seconds")  # of a row, which are no scores
INTERVAL = 1.959964  # standard errors on each side of a 95 % interval


def names(rows: list[dict[str, Any]]) -> list[str]:
    """Return the scores that the rows have, in their order."""
    every = dict.fromkeys(name for row in rows for name in row if name not in OWN)
    scores = [name for name in every if not name.endswith(STDERR)]
    return [name for name in scores if any(is_number(row.get(name)) for row in rows)]


def newest(rows: list[dict[str, Any]], which: str, name: str) -> dict[str, Any] | None:
    """Return the newest row of a model, base or adapted, that has a score."""
    of_model = [row for row in rows if row.get("model") == which]
    return next((row for row in reversed(of_model) if is_number(row.get(name))), None)


def text(row: dict[str, Any] | None, name: str) -> str:
    """Format a score with its 95 % interval, `0.4210 ± 0.0196`."""
    if row is None or not is_number(row.get(name)):
        return ""
    value, error = f"{row[name]:.4f}", row.get(name + STDERR)
    return f"{value} ± {INTERVAL * float(error or 0):.4f}" if is_number(error) else value


def table(rows: list[dict[str, Any]]) -> Table | None:
    """Return the newest scores of the base and of the adapted model side by side; None without
    any."""
    lines = []
    for name in names(rows):
        base, adapted = newest(rows, "base", name), newest(rows, "adapted", name)
        # Scores of other settings are no comparison.
        if base and adapted and base.get("settings") != adapted.get("settings"):
            base = None
        used = adapted or base or {}
        step = str(used.get("step", "")) if adapted else ""
        lines.append([name, text(base, name), text(adapted, name), step, _settings(used, name)])
    columns = ["task and metric", "base", "adapted", "step", "asked"]
    return Table(columns, lines, frozenset({0, 4})) if lines else None


def _settings(row: dict[str, Any], name: str) -> str:
    counts = row.get("rows")
    count = counts.get(name.rpartition("/")[0]) if isinstance(counts, dict) else None
    conditions = str(row.get("settings") or "")
    return f"{conditions}; {count:.0f} rows" if is_number(count) else conditions


def paired(
    base: dict[str, list[dict[str, Any]]], adapted: dict[str, list[dict[str, Any]]]
) -> dict[str, tuple[float, float]]:
    """Return the mean difference, adapted minus base, of each score that is a mean over rows, and
    the standard error of that mean: sd(dᵢ) / √n over the differences dᵢ of the same rows.

    Args:
        base, adapted: what lm-eval keeps of each row, by task.
    """
    result = {}
    for task, rows in adapted.items():
        before = {(row["doc_id"], row["filter"]): row for row in base.get(task, ())}
        differences: dict[str, list[float]] = {}
        for row in rows:
            earlier = before.get((row["doc_id"], row["filter"]), {})
            for metric in row["metrics"]:
                if is_number(row.get(metric)) and is_number(earlier.get(metric)):
                    way = "" if row["filter"] == "none" else f",{row['filter']}"
                    name = f"{task}/{metric}{way}"
                    differences.setdefault(name, []).append(row[metric] - earlier[metric])
        for name, values in differences.items():
            count = len(values)
            mean = sum(values) / count
            if count > 1:
                variance = sum((value - mean) ** 2 for value in values) / (count - 1)
                result[name] = mean, math.sqrt(variance / count)
    return result
