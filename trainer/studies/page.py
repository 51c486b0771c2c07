"""The results of a study: study.md and study.html with tables, and the commands of its runs."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import Any

from trainer.evaluation.pictures import Curve, picture
from trainer.evaluation.tables import Table
from trainer.session import report_html
from trainer.storage import atomic, journal
from trainer.studies.pieces import UNTESTED, Piece, Results
from trainer.studies.plan import Study
from trainer.studies.statistics import summary

WINDOW = 25  # steps that a point of a training curve is the mean of, at most


def write(study: Study, results: Results) -> str:
    """Write study.md, study.html and commands.sh into the study's folder. Return the text of the
    table."""
    numbers = summary(study, results)
    tables = [table(study, data, rows) for data, rows in numbers.items()]
    commands = [line for result in results.values() for line in commands_of(study, result)]
    text = "\n".join(_markdown(part) for part in tables)
    failures = [
        {"key": key, "message": result["message"]}
        for key, result in results.items()
        if "failed" in result
    ]
    text += f"\n{subtitle(study, results)}\n"
    atomic.write_text(study.folder / "study.md", f"# {study.name}\n\n{text}")
    atomic.write_text(study.folder / "commands.sh", "".join(f"{line}\n" for line in commands))
    html = report_html.page("study.jinja").render(
        name=study.name,
        subtitle=subtitle(study, results),
        tables=tables,
        plots=_plots(study, results),
        failures=failures,
        commands=commands,
    )
    atomic.write_text(study.folder / "study.html", html.encode("utf-8", "replace").decode("utf-8"))
    return text


def subtitle(study: Study, results: Results) -> str:
    """Say in a sentence what the study is."""
    budget = "as set" if study.parameters is None else f"{study.parameters:,} each"
    seeds = ", ".join(map(str, study.seeds))
    failed = sum("failed" in result for result in results.values())
    untested = sum(UNTESTED in result for result in results.values())
    left_out = f" {untested} runs were tested with other settings and are left out."
    return (
        f"{len(study.methods)} methods, {len(study.data)} data sets, seeds {seeds}; trained"
        f" parameters: {budget}; {len(results)} runs, {failed} of them failed. Rates are chosen by"
        f" {study.choose} on validation rows.{left_out if untested else ''}"
    )


def command(study: Study, piece: Piece) -> str:
    """Return the command line that repeats a run of the study."""
    return "graft " + shlex.join([*piece.words(study), f"name={piece.key}"])


def evaluation_command(study: Study, piece: Piece, run: str) -> str:
    """Return the command line that measures a run on the test rows again."""
    words = [f"run={run}", *piece.tests(study), f"batch_size={study.data[piece.data].batch_size}"]
    return "graft evaluate " + shlex.join(words)


def next_command(study: Study, piece: Piece, results: Results) -> str:
    """Return the command line of a piece that is missing, or of its test alone."""
    if piece.key not in results:
        return command(study, piece)
    return evaluation_command(study, piece, str(study.folder / "runs" / piece.key))


def commands_of(study: Study, result: dict[str, Any]) -> list[str]:
    """Return the command lines that repeat a result: its run, and its test if it has one."""
    piece = Piece(**result["piece"])
    if "test" not in result:
        return [command(study, piece)]
    return [command(study, piece), evaluation_command(study, piece, f"runs/{piece.key}")]


def table(study: Study, data: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the table of a data set as text: name, head, rows and notes."""
    tested = bool(study.data[data].test)
    names = [n for n in _names(rows) if n not in ("perplexity",)]
    where = "test" if tested else "validation"
    head = ["method", "rate", "seeds", "trained", *(f"{name}, {where}" for name in names)]
    versus = [name for name in names if name == "loss" or name == _score(names)]
    head += [f"{name} - {study.baseline} [seeds] [rows]" for name in versus]
    head += ["wins : losses", "steps", "s a step", "peak MB", "adapter MB"]
    lines = [_line(method, row, names, versus) for method, row in rows.items()]
    notes = [
        "Mean ± standard deviation over seeds. Differences are paired by seed and row, with 95 %"
        " intervals: by Student's t over seeds, by 10,000 bootstraps over rows."
    ]
    if not tested:
        notes.append("There is no test set: the rows that chose the rate are those of the table.")
    edge = [method for method, row in rows.items() if row["edge"]]
    if edge:
        notes.append(f"The best rate is at an end of those tried: {', '.join(edge)}.")
    if len({row["steps"] for row in rows.values()}) > 1:
        notes.append(
            "The methods differ in `steps`: those that choose their entries first, or stop early,"
            " are not compared at equal steps."
        )
    if waiting := [name for name in study.methods if name not in rows]:
        notes.append(f"No finished runs: {', '.join(waiting)}.")
    return {"name": data, "cells": Table(head, lines), "notes": notes}


def _names(rows: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row["metrics"]))


def _score(names: list[str]) -> str | None:
    """Return the first metric that is a score of answers or classes."""
    return next((name for name in names if name not in ("loss", "accuracy")), None)


def _line(method: str, row: dict[str, Any], names: list[str], versus: list[str]) -> list[str]:
    size = row["adapter_bytes"]
    against = row.get("against") or {}
    score = next((name for name in versus if name != "loss" and name in against), None)
    wins = against[score] if score else {}
    return [
        method,
        f"{row['rate']:g}" + ("*" if row["edge"] else ""),
        str(row["seeds"]) + (f" ({row['failed']} failed)" if row["failed"] else ""),
        report_html.counted(row["parameters"]),
        *(_spread(row["metrics"].get(name)) for name in names),
        *(_difference(against.get(name)) for name in versus),
        f"{wins['wins']} : {wins['losses']}" if "wins" in wins else "",
        f"{row['steps']:,}",
        "" if row["step_seconds"] is None else f"{row['step_seconds']:.2f}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{size / 1e6:.1f}" if size else "",
    ]


def _spread(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return ""
    mean, deviation = value
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")


def _difference(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    intervals = [
        f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else " [-]"
        for interval in (value["over_seeds"], value["over_rows"])
    ]
    return f"{value['difference']:+.4f}" + "".join(intervals)


def _markdown(part: dict[str, Any]) -> str:
    notes = "".join(f"{note}\n" for note in part["notes"])
    return f"## {part['name']}\n\n{part['cells'].markdown()}\n{notes}"


def _plots(study: Study, results: Results) -> list[dict[str, str]]:
    """Draw the curves of each data set: training and validation loss by method."""
    plots = []
    for data, rows in summary(study, results).items():
        training, validation = [], []
        for number, (method, row) in enumerate(rows.items()):
            runs = [
                study.folder / "runs" / Piece(data, method, row["rate"], seed, False).key
                for seed in study.seeds
            ]
            colour = f"C{number}"
            steps = smoothed(averaged([_rows(run, "step") for run in runs]))
            training.append(Curve(method, steps, "-", colour))
            held_out = averaged([_rows(run, "evaluation") for run in runs])
            validation.append(Curve(method, held_out, "o-", colour))
        plots.append(picture(f"{data}: training loss", training))
        plots.append(picture(f"{data}: validation loss", validation))
    return plots


def _rows(run: Path, kind: str) -> list[dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == kind]


def averaged(runs: list[list[dict[str, Any]]]) -> list[tuple[float, float]]:
    """Return (step, mean loss) of each step over several runs that have it."""
    losses: dict[int, list[float]] = {}
    for rows in runs:
        for row in rows:
            if row.get("loss") is not None:
                losses.setdefault(row["step"], []).append(row["loss"])
    return [(step, statistics.mean(each)) for step, each in sorted(losses.items())]


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means over windows of steps, at their ends."""
    width = max(1, min(WINDOW, len(points) // 20))
    windows = [points[start : start + width] for start in range(0, len(points), width)]
    return [(window[-1][0], statistics.mean(loss for _, loss in window)) for window in windows]
