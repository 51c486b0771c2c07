"""The report of a run as one HTML file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import NoneType
from typing import Any

import jinja2
import yaml

from trainer.assembly import guarded
from trainer.evaluation import harness_table
from trainer.evaluation.pictures import Curve, picture
from trainer.evaluation.run_summary import is_number, points, record_of
from trainer.storage import atomic, door, journal
from trainer.storage.journal import NO_METRICS

_PAGES = jinja2.FileSystemLoader(Path(__file__).parent)

_DATA_ROWS = [
    ("rows", "rows read"),
    ("kept", "kept"),
    ("dropped", "too long, dropped"),
    ("truncated", "truncated"),
    ("answers_lost", "answers lost to truncation"),
    ("skipped", "broken, skipped"),
    ("tokens", "tokens"),
    ("trained_tokens", "trained tokens"),
    ("longest", "longest row"),
    ("duplicates", "duplicates"),
]


# what the page shows of preflight.json
_SPLIT = {"*": object} | {f"{key}?": (int, NoneType) for key, _ in _DATA_ROWS}
_CHECKED = {
    "data?": {"train?": _SPLIT, "eval?": _SPLIT, "*": object},
    "model?": {"parameters": int, "trainable": (int, NoneType), "*": object},
    "warnings?": [str],
    "*": object,
}


def write(folder: Path) -> Path:
    """Write report.html from the files of a run folder and return its path. Files that are damaged
    are left out with a warning.

    Raises:
        FolderError: it is no run folder, or run.yaml is damaged.
    """
    record = record_of(folder)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in journal.read(folder / "metrics.jsonl"):
        rows[row["kind"]].append(row)
    checked = door.decoration(folder / "preflight.json", _CHECKED, {})
    text = page("report.jinja").render(
        name=record["name"],
        subtitle=_subtitle(record, rows),
        notes=_notes(rows) + _guard(folder),
        plots=_plots(rows),
        samples=_samples(folder),
        data=_data(checked),
        data_rows=_DATA_ROWS,
        warnings=checked.get("warnings", []),
        facts=_facts(record, rows, checked),
        config=yaml.safe_dump(record["config"], sort_keys=False),
        benchmarks=harness_table.table(rows["harness"]),
        **_outcome(folder, rows),
    )
    path = folder / "report.html"
    # data may hold half a character, which UTF-8 cannot write
    atomic.write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def page(name: str) -> jinja2.Template:
    """Return the template of a page in this folder."""
    return jinja2.Environment(loader=_PAGES, autoescape=True).get_template(name)


def _subtitle(record: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> str:
    choices = record["identity"]["choices"]
    steps = rows["step"][-1]["step"] if rows["step"] else 0
    base = record["config"].get("base", {}).get("path") or choices.get("base")
    planned = record["identity"].get("steps")
    return f"{base} with adapter {choices.get('adapter')}, {steps} of {planned} steps"


def _notes(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    notes = [
        f"The rate cools down from step {row['step']} on, over {row['steps']} steps:"
        f" {row['reason']}."
        for row in rows["cooldown"]
    ]
    notes += [f"Stopped after step {row['step']}: {row['reason']}." for row in rows["stopped"]]
    notes += [
        f"The loss exploded up to step {row.get('from')}: the run went back to step {row['step']}"
        f" and skipped the rows of {row.get('skipped_steps')} steps."
        for row in rows["rollback"]
    ]
    notes += [
        f"From step {row['step']} on, at most {row.get('rows')} rows were run at a time, since"
        f" {row.get('rows_before')} did not fit into memory."
        for row in rows["memory"]
    ]
    if rows["skipped"]:
        notes.append(
            f"{len(rows['skipped'])} steps were skipped because their loss or gradient was not"
            " finite."
        )
    return notes


def _guard(folder: Path) -> list[str]:
    verdict = guarded.read(folder)
    return [] if verdict is None else [f"{verdict.text()}."]


def _outcome(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    evaluations = rows["evaluation"]
    if not evaluations:
        return {"outcome": [], "best": None}
    first, last = evaluations[0], evaluations[-1]
    file = folder / "checkpoints" / "best.json"
    step = door.decoration(file, {"step": int}, {"step": last["step"]})["step"]
    best = next((row for row in reversed(evaluations) if row["step"] == step), last)
    names = [
        name for name in last if name not in set(NO_METRICS) - {"answers"} and is_number(last[name])
    ]
    table = [
        {
            "name": name,
            "before": _number(first.get(name)),
            "after": _number(last.get(name)),
            "best": _number(best.get(name)),
        }
        for name in names
    ]
    return {"outcome": table, "best": best if best["step"] != last["step"] else None}


def _number(value: Any) -> str:
    if not is_number(value):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _samples(folder: Path) -> list[dict[str, Any]]:
    shown = ("where", "prompt", "expected", "answer", "scores")
    rows = [
        row for row in journal.read(folder / "samples.jsonl") if all(key in row for key in shown)
    ]
    steps = [row["step"] for row in rows]
    if not steps or min(steps) == max(steps):
        return []
    before = {row["where"]: row for row in rows if row["step"] == min(steps)}
    after = {row["where"]: row for row in rows if row["step"] == max(steps)}
    return [
        {
            "where": where,
            "prompt": row["prompt"],
            "expected": row["expected"],
            "before": row["answer"],
            "after": after[where]["answer"],
            "before_scores": _scores(row),
            "after_scores": _scores(after[where]),
        }
        for where, row in before.items()
        if where in after
    ]


def _scores(row: dict[str, Any]) -> str:
    scores = ((name, value) for name, value in row["scores"].items() if value is not None)
    return ", ".join(f"{name} {value:.2g}" for name, value in scores)


def _data(checked: dict[str, Any]) -> list[dict[str, Any]]:
    data = checked.get("data", {})
    names = ("train", "eval", *(name for name in data if name.startswith("eval/")))
    splits = [(name, data.get(name)) for name in names]
    return [
        {"name": name, **{key: _number(split.get(key)) for key, _ in _DATA_ROWS}}
        for name, split in splits
        if split
    ]


def counted(number: int | None) -> str:
    """Format a count; None is a count that is not known yet."""
    return "unknown" if number is None else f"{number:,}"


def _facts(
    record: dict[str, Any], rows: dict[str, list[dict[str, Any]]], checked: dict[str, Any]
) -> list[tuple[str, str]]:
    start = record["starts"][-1]
    model = checked.get("model", {})
    facts = [
        ("command", start.get("command")),
        (
            "started",
            f"{start.get('time')} on {start.get('host')}, start {len(record['starts'])} of this"
            " run",
        ),
        ("git revision", start.get("git") or "unknown"),
        (
            "versions",
            ", ".join(
                f"{name} {version}"
                for name, version in start.get("versions", {}).items()
                if version
            ),
        ),
        ("run id", record["id"]),
        ("precision", record["identity"].get("precision")),
    ]
    if parent := record.get("parent"):
        facts.append(("branched off", f"{parent['run']} after step {parent['step']}"))
    if model:
        facts.append(
            ("parameters", f"{model['parameters']:,}, {counted(model['trainable'])} trained")
        )
    timed = ("tokens_per_s", "seconds", "tokens")
    steps = [row for row in rows["step"] if all(row.get(key) is not None for key in timed)]
    if steps:
        speeds = sorted(row["tokens_per_s"] for row in steps)
        facts.append(
            (
                "trained for",
                (
                    f"{steps[-1]['seconds'] / 60:.1f} minutes, {steps[-1]['tokens']:,} tokens,"
                    f" median {speeds[len(speeds) // 2]:,.0f} tokens/s"
                ),
            )
        )
    return facts


Line = tuple[str, list[dict[str, Any]], str, str]  # label, rows, key, matplotlib's format


def _curves(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[Line], bool]]:
    """Return (title, curves, whether the axis is logarithmic) of each plot."""
    steps, evaluations = rows["step"], rows["evaluation"]
    # of task.eval_sets; those of a drafter's offsets have a plot of their own
    further = [
        name
        for name in (evaluations[-1] if evaluations else {})
        if name.endswith("/loss") and "offset" not in name
    ]
    plots: list[tuple[str, list[Line], bool]] = [
        (
            "loss",
            [
                ("training", steps, "loss", "-"),
                ("held out", evaluations, "loss", "o-"),
                *((name.removesuffix("/loss"), evaluations, name, "o-") for name in further),
                ("averaged", rows["average"], "loss", "s-"),
            ],
            False,
        ),
        ("learning rate", [("", steps, "lr", "-")], False),
        (
            "tokens per second",
            [("processed", steps, "tokens_per_s", "-"), ("trained", steps, "trained_per_s", "-")],
            False,
        ),
        ("gradient norm", [("", steps, "grad_norm", "-")], True),
    ]
    names = list(dict.fromkeys(name for row in evaluations for name in row))
    top1 = sorted(name for name in names if name.startswith("offset") and name.endswith("/top1"))
    if top1:
        curves = [(name.partition("/")[0], evaluations, name, "o-") for name in top1]
        plots.append(("held out, top-1 by offset", curves, False))
        accepted = [row.get("accepted") for row in evaluations]
        if any(value and is_number(value) and value > 1 for value in accepted):
            plots.append(("held out, tokens a step", [("", evaluations, "accepted", "o-")], False))
    scores = [
        name
        for name in (evaluations[-1] if evaluations else {})
        if name not in (*NO_METRICS, "loss", "perplexity", "accepted")
        and not name.startswith("offset")
        and not name.endswith(("/loss", "/perplexity"))
    ]
    if scores:
        plots.append(("held out", [(name, evaluations, name, "o-") for name in scores], False))
    return plots


def _plots(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Draw the plots as base64-encoded SVG, {title, data}."""
    return [
        picture(
            title,
            [Curve(label, points(source, key), style) for label, source, key, style in lines],
            logarithmic,
        )
        for title, lines, logarithmic in _curves(rows)
    ]
