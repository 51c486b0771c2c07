"""Whether a run folder holds the run that is asked for, and from which of its checkpoints it goes
on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from trainer.assembly import build as build_module
from trainer.callbacks import progress
from trainer.data.batches import BatchOrder
from trainer.data.identity import changed
from trainer.schedules import factor
from trainer.session import fork
from trainer.storage import checkpoints, run_folder
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.journal import Journal
from trainer.storage.run_folder import RunFolder

log = logging.getLogger("trainer")


def where_to_go_on(
    place: RunFolder,
    config: dict[str, Any],
    plan: BatchOrder | None,
    identity: dict[str, Any],
    earlier: dict[str, Any],
    restart: int,
) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, if the folder holds this very run; and whether it is the one
    from before a cooldown, which a run that was made longer leaves out.

    Raises:
        CheckpointError, FolderError: it holds another one, or its checkpoints or its record are
        damaged.
    """
    run_folder.complete(earlier, place.file)
    then = earlier["identity"]
    different = run_folder.differences(
        earlier["config"], config, run_folder.FREE + run_folder.LENGTHS
    )
    different += run_folder.differences(
        then, identity, ("choices", "steps", "base", "data", "target.run")
    )
    if then["base"] != identity["base"]:
        different.append("base: its weights are others now")
    different += [
        f"data: the rows of {split}, or how they are tokenised, have changed"
        for split in changed(place.path, then["data"], identity["data"])
    ]
    path = checkpoints.newest(place.checkpoints)
    done, steps, longer = int(path.stem[5:]) if path else 0, identity["steps"], False
    same = _same_until(place, config, plan, then["steps"], steps, done, restart)
    if same < done:
        before = checkpoints.marked(place.checkpoints, "constant")
        if before is not None and int(before.stem[5:]) <= same and steps >= then["steps"]:
            path, done, longer = before, int(before.stem[5:]), True
        else:
            different.append(
                f"steps: {then['steps']} in the run, {steps} now, with which its schedule would"
                f" have had other rates from step {same} on. What is a fraction of the run, as a"
                " warm-up may be, changes with its length: give it in steps from the start"
            )
    if done > steps:
        different.append(f"steps: {done} are done, {steps} are asked for")
    if different:
        raise CheckpointError(
            f"{place.path} holds another run, which cannot go on as this one:\n  "
            + "\n  ".join(different)
            + "\nGive its settings, or another name="
        )
    if path is not None:
        log.info(
            "going on after step %d%s%s",
            done,
            progress.of(steps),
            ", from before the cooldown" * longer,
        )
    return path, longer


def _same_until(
    place: RunFolder,
    config: dict[str, Any],
    plan: BatchOrder | None,
    then: int,
    now: int,
    done: int,
    restart: int,
) -> int:
    """The first of the `done` steps whose rate would be another one in a run of `now` steps, `done`
    if there is none."""
    began = [row["step"] for row in Journal(place.path, [], False).rows("cooldown")]
    ended = [
        row
        for row in Journal(place.path, [], False).rows("stopped")
        if row["reason"].startswith("cooled down")
    ]
    if began and ended and _made_longer(ended[-1], now, config["max_time"]):
        return began[-1]
    if now == then:
        return done
    schedule = build_module.schedule(config, plan)
    cooling = fork.cooling(config["branch"]) if config["branch"] else None
    others = (
        step
        for step in range(done)
        if factor(schedule, step, now, restart, cooling)
        != factor(schedule, step, then, restart, cooling)
    )
    return next(others, done)


def _made_longer(stopped: dict[str, Any], steps: int, max_time: float | None) -> bool:
    """Whether a run that stopped is given more than it had."""
    had = stopped.get("max_time")
    return steps > stopped.get("steps", steps) or (
        had is not None and (max_time is None or max_time > had)
    )


def leave_out(place: RunFolder, done: int, steps: int) -> None:
    """Take away what a run that goes on from before its cooldown trains anew; the adapter stays
    under the name of its step."""
    for path in checkpoints.complete(place.checkpoints):
        if int(path.stem[5:]) > done:
            checkpoints.remove(path)
    best = checkpoints.marked(place.checkpoints, "best")
    if best is not None and not best.exists():
        (place.checkpoints / "best.json").unlink()
    kept = place.path / f"adapter-{steps}"
    if (place.path / "adapter").exists() and not kept.exists():
        (place.path / "adapter").rename(kept)
        log.info("the cooled-down adapter stays in %s", kept)


def ended(
    place: RunFolder, journal: Journal, done: int, steps: int, max_time: float | None
) -> str | None:
    """How an earlier start of this run ended it for good, if it did."""
    if not (place.path / "report.html").exists():
        return None
    if done >= steps:
        return f"has done its {steps} steps"
    for row in journal.rows("stopped"):
        if row["reason"].startswith("cooled down") and _made_longer(row, steps, max_time):
            continue
        if row["reason"].startswith("max_time") and (max_time is None or max_time > row["minutes"]):
            continue
        return f"was stopped after step {row['step']}: {row['reason']}"
    return None
