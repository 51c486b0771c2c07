"""The page of `graft draft`: what was done, how well the head drafts, and where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.evaluation import stale


def page(out: Path, record: dict[str, Any]) -> str:
    """Return draft.md, made from a folder's results."""
    settings = record["settings"]
    parts = [
        f"# A draft head for {settings['run']}\n",
        "| step | minutes |",
        "|---|---|",
        *(f"| {name} | {step['seconds'] / 60:.1f} |" for name, step in record["steps"].items()),
        "",
        "## Drafting\n",
        _categories(json.loads((out / "speculation.json").read_text("utf-8"))),
    ]
    if (out / "stale.json").exists():
        rows = json.loads((out / "stale.json").read_text("utf-8"))
        parts += [
            "## The old head\n",
            "Tokens of a pass, and how often the first drafted token was accepted:\n",
            stale.table(rows),
        ]
    exports = [name.partition(" ")[2] for name in record["steps"] if name.startswith("export ")]
    parts += ["## Exports\n", *(f"- `{out / name}`" for name in exports)]
    return "\n".join(parts) + "\n"


def _categories(summary: dict[str, Any]) -> str:
    lines = [
        "| category | questions | tokens a pass | times transformers' speed |",
        "|---|---|---|---|",
    ]
    for name, figures in [("all", summary), *summary["categories"].items()]:
        tau, speed = figures["tau"], figures["speed_up"]["transformers"]
        lines.append(f"| {name} | {figures['questions']} | {_interval(tau)} | {_interval(speed)} |")
    return "\n".join(lines) + "\n"


def _interval(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return ""
    ends = "" if value["low"] is None else f" ({value['low']:.2f} to {value['high']:.2f})"
    return f"{value['value']:.2f}{ends}"
