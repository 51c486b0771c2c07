"""The report of a run as one HTML file."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import yaml

from trainer.storage import atomic, journal

_PAGE = Path(__file__).with_name("report.jinja")

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


def write(folder: Path) -> Path:
    """Write report.html from the files of a run folder and return its path."""
    record = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in journal.read(folder / "metrics.jsonl"):
        rows[row["kind"]].append(row)
    checked = (
        json.loads((folder / "preflight.json").read_text())
        if (folder / "preflight.json").exists()
        else {}
    )
    page = jinja2.Environment(autoescape=True).from_string(_PAGE.read_text("utf-8"))
    text = page.render(
        name=record["name"],
        subtitle=_subtitle(record, rows),
        notes=_notes(rows),
        plots=_plots(rows),
        samples=_samples(folder),
        data=_data(checked),
        data_rows=_DATA_ROWS,
        warnings=checked.get("warnings", []),
        facts=_facts(record, rows, checked),
        config=yaml.safe_dump(record["config"], sort_keys=False),
        **_outcome(folder, rows),
    )
    path = folder / "report.html"
    atomic.write_text(path, text)
    return path


def _subtitle(record: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> str:
    choices = record["identity"]["choices"]
    steps = rows["step"][-1]["step"] if rows["step"] else 0
    base = record["config"]["base"].get("path") or choices["base"]
    return (
        f"{base} with adapter {choices['adapter']}, {steps} of {record['identity']['steps']} steps"
    )


def _notes(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    notes = [
        f"The rate cools down from step {row['step']} on, over {row['steps']} steps:"
        f" {row['reason']}."
        for row in rows["cooldown"]
    ]
    notes += [f"Stopped after step {row['step']}: {row['reason']}." for row in rows["stopped"]]
    if rows["skipped"]:
        notes.append(
            f"{len(rows['skipped'])} steps were skipped because their loss or gradient was not"
            " finite."
        )
    return notes


def _outcome(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    evaluations = rows["evaluation"]
    if not evaluations:
        return {"outcome": [], "best": None}
    first, last = evaluations[0], evaluations[-1]
    file = folder / "checkpoints" / "best.json"
    step = json.loads(file.read_text())["step"] if file.exists() else last["step"]
    best = next((row for row in reversed(evaluations) if row["step"] == step), last)
    names = [name for name in last if name not in ("kind", "step", "seconds")]
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
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _samples(folder: Path) -> list[dict[str, Any]]:
    rows = journal.read(folder / "samples.jsonl")
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
    return ", ".join(f"{name} {value:.2g}" for name, value in row["scores"].items())


def _data(checked: dict[str, Any]) -> list[dict[str, Any]]:
    splits = [(name, checked.get("data", {}).get(name)) for name in ("train", "eval")]
    return [
        {"name": name, **{key: _number(split[key]) for key, _ in _DATA_ROWS}}
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
        ("command", start["command"]),
        (
            "started",
            f"{start['time']} on {start['host']}, start {len(record['starts'])} of this run",
        ),
        ("git revision", start["git"] or "unknown"),
        (
            "versions",
            ", ".join(
                f"{name} {version}" for name, version in start["versions"].items() if version
            ),
        ),
        ("run id", record["id"]),
        ("precision", record["identity"]["precision"]),
    ]
    if parent := record.get("parent"):
        facts.append(("branched off", f"{parent['run']} after step {parent['step']}"))
    if model:
        facts.append(
            ("parameters", f"{model['parameters']:,}, {counted(model['trainable'])} trained")
        )
    if rows["step"]:
        steps = rows["step"]
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


Curve = tuple[str, list[dict[str, Any]], str, str]  # label, rows, key, matplotlib's format


def _curves(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[Curve], bool]]:
    """Return (title, curves, whether the axis is logarithmic) of each plot."""
    steps, evaluations = rows["step"], rows["evaluation"]
    plots: list[tuple[str, list[Curve], bool]] = [
        (
            "loss",
            [
                ("training", steps, "loss", "-"),
                ("held out", evaluations, "loss", "o-"),
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
        if any(row.get("accepted", 1) > 1 for row in evaluations):
            plots.append(("held out, tokens a step", [("", evaluations, "accepted", "o-")], False))
    scores = [
        name
        for name in (evaluations[-1] if evaluations else {})
        if name not in ("kind", "step", "seconds", "loss", "perplexity", "accepted")
        and not name.startswith("offset")
    ]
    if scores:
        plots.append(("held out", [(name, evaluations, name, "o-") for name in scores], False))
    return plots


def _plots(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Draw the plots as base64-encoded SVG, {title, data}."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "svg.fonttype": "none",
        }
    )
    plots = []
    for title, curves, logarithmic in _curves(rows):
        figure, axes = pyplot.subplots(figsize=(5.4, 2.9))
        for label, source, key, style in curves:
            points = [(row["step"], row[key]) for row in source if row.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    label=label or None,
                    linewidth=1.2,
                    markersize=3,
                )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        if logarithmic and axes.has_data() and axes.dataLim.y1 > 0:
            axes.set_yscale("log")
        if any(label for label, *_ in curves) and axes.has_data():
            axes.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        plots.append({"title": title, "data": base64.b64encode(picture.getvalue()).decode()})
    return plots
