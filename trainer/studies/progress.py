"""A line about the runs of a study that have a process."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from trainer.storage import journal


def line(folder: Path, running: Collection[str], ended: int) -> str:
    """Return a line about the runs of a study's folder that have a process, by their keys."""
    parts = [f"{key}: {position(folder / 'runs' / key)}" for key in running]
    return f"running: {'; '.join(parts)}. Ended: {ended}"


def position(run: Path) -> str:
    """Return a run's step, and the minutes that its training still takes at the speed so far."""
    try:
        total = json.loads((run / "preflight.json").read_text("utf-8"))["run"]["steps"]
        every = journal.read(run / "metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return "starting"
    rows = [row for row in every if row["kind"] == "step" and row.get("seconds")]
    if not rows:
        return "starting"
    last, newest = rows[-1], every[-1]
    # a run may end before its last step, by max_time
    ended = newest["kind"] != "step" and newest["step"] == last["step"]
    if ended or last["step"] == total:
        return f"step {last['step']}, in its evaluation"
    if not total:
        return f"step {last['step']}"
    pace = last["seconds"] / last["step"]
    return f"step {last['step']} of {total}, {pace * (total - last['step']) / 60:.0f} min left"
