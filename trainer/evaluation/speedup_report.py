"""Summaries of trainer.evaluation.speedup as tables, lines and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from trainer.evaluation.decode_ways import WAYS
from trainer.storage import atomic


def prompts_report(summary: dict[str, Any]) -> Iterator[Table | str]:
    """Yield the tables and lines of a summary of prompts."""
    table = Table("", "tokens", "target steps", "tokens/s", "ratio")
    for way, name in WAYS.items():
        row = summary[way]
        table.add_row(
            name,
            f"{row['tokens']}",
            f"{row['steps']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        )
    yield table
    if summary["accepted"] is not None:
        yield (
            f"tokens per step with the drafter: {summary['accepted']:.2f}, including the target's"
            " own"
        )
        table = Table("draft position", "proposed", "accepted", "accepted of those reached")
        for k, position in enumerate(summary["positions"], 1):
            proposed, reached, taken = (position[key] for key in ("proposed", "reached", "taken"))
            table.add_row(
                f"{k}",
                f"{proposed}",
                f"{taken / proposed:.1%}",
                f"{taken / reached:.1%}" if reached else "-",
            )
        yield table
    if summary["temperature"] > 0:
        yield _comparison(summary["prompts"], None)
    else:
        different = {way: summary[way]["different_texts"] for way in ("plain", "drafter")}
        yield _comparison(summary["prompts"], different)


def categories_report(summary: dict[str, Any]) -> Iterator[Table | str]:
    """Yield the tables and lines of a summary by category."""
    table = Table("", "tokens", "target passes", "tokens/s", "speed-up of the drafter")
    for way, name in WAYS.items():
        row = summary["ways"][way]
        rate = row["tokens_per_second"]
        speed_up = _interval(summary["speed_up"][way]) if way in summary["speed_up"] else ""
        table.add_row(
            name,
            f"{row['tokens']}",
            f"{row['target_passes']}",
            "-" if rate is None else f"{rate:.1f}",
            speed_up,
        )
    yield table
    table = Table("draft position", "proposed", "conditional acceptance", "survival")
    for k, position in enumerate(summary["positions"], 1):
        conditional = "-" if position["conditional"] is None else f"{position['conditional']:.1%}"
        table.add_row(f"{k}", f"{position['proposed']}", conditional, f"{position['survival']:.1%}")
    yield table
    table = Table("", "answers", "tau", "speed-up over transformers", "over the same decoder")
    for name, row in _rows(summary).items():
        table.add_row(
            name,
            f"{row['answers']}",
            _interval(row["tau"]),
            _interval(row["speed_up"]["transformers"]),
            _interval(row["speed_up"]["plain"]),
        )
    yield table
    times = summary["pass"]
    if times["draft_ms"] is not None and times["plain_ms"] is not None:
        yield (
            f"A pass: {times['draft_ms']:.1f} ms to draft {times['nodes']:.1f} tokens,"
            f" {times['verify_ms']:.1f} ms to verify them; {times['plain_ms']:.1f} ms without a"
            " draft."
        )
    if summary["left_out"]:
        yield (
            f"{summary['left_out']} turns were left out: with max_new_tokens they are longer than"
            " the model takes."
        )
    if summary["compared"] < summary["answers"]:
        yield (
            f"{summary['compared']} of {summary['answers']} answers were decoded by all ways, and"
            " have the speeds; tau and acceptance are of all."
        )
    yield _comparison(summary["compared"], summary.get("different_texts"))


def _comparison(texts: int, different: dict[str, int] | None) -> str:
    """Say how many texts differ from transformers'; `different` is None if they were sampled."""
    if different is None:
        return "Sampled texts have the target's distribution, and are not compared one by one."
    if different["drafter"]:
        return (
            f"{different['drafter']} of {texts} texts differ from transformers'"
            f" ({different['plain']} without the drafter): rounding decides between tokens that are"
            " equally likely."
        )
    return f"All {texts} texts are those of transformers' greedy decoding, token by token."


def _rows(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    categories = summary["categories"]
    return {"all": summary} | (categories if len(categories) > 1 else {})


def _interval(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    return f"{value['value']:.2f}" + (
        f" ({value['low']:.2f} to {value['high']:.2f})" if value["low"] is not None else ""
    )


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw acceptance by position, and tau and speed-up by category with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = _rows(summary)
    with pyplot.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
        }
    ):
        figure, (left, middle, right) = pyplot.subplots(
            1, 3, figsize=(11, 1.6 + 0.22 * max(6, len(rows))), layout="constrained"
        )
        numbers = range(1, len(summary["positions"]) + 1)
        for key in ("conditional", "survival"):
            values = [
                np.nan if position[key] is None else position[key]
                for position in summary["positions"]
            ]
            left.plot(numbers, values, "o-", label=key, linewidth=1.2, markersize=3)
        left.set(xlabel="draft position", ylim=(0, 1))
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_title("acceptance", loc="left", fontsize=10)
        left.legend(frameon=False)
        _bars(
            middle, {name: row["tau"] for name, row in rows.items()}, "tau: tokens of a target pass"
        )
        speeds = {name: row["speed_up"]["transformers"] for name, row in rows.items()}
        _bars(right, speeds, "tokens/s over transformers' generate")
        right.axvline(1, color="black", linewidth=0.8)
        right.set_yticklabels([])
        with atomic.file(path) as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def _bars(panel: Any, values: dict[str, dict[str, float | None]], title: str) -> None:
    known = {name: value for name, value in values.items() if value["value"] is not None}
    middles = np.array([value["value"] for value in known.values()], dtype=float)
    ends = [
        (
            v["value"] if v["low"] is None else v["low"],
            v["value"] if v["high"] is None else v["high"],
        )
        for v in known.values()
    ]
    errors = np.abs(np.array(ends, dtype=float).reshape(-1, 2).T - middles)
    panel.barh(list(known), middles, xerr=errors, height=0.6, error_kw={"linewidth": 0.8})
    panel.invert_yaxis()
    panel.set_title(title, loc="left", fontsize=10)
