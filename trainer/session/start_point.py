"""The start of a run: from nothing, from its own last checkpoint, or from another run's.

A branch keeps weights, optimiser, data position and random draws of its parent. Only its later
rates differ (conf/branch), and its rows if it has a task of its own. The parent is read and never
written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.assembly.build import schedule as make_schedule
from trainer.assembly.recipe import Recipe
from trainer.callbacks import progress
from trainer.data.identity import changed
from trainer.schedules import factor
from trainer.schedules.cooldown import RuntimeCooldown
from trainer.session import same_step
from trainer.storage import atomic, checkpoints, run_folder
from trainer.storage.checkpoints import Checkpoint, UnusableCheckpoint
from trainer.storage.journal import Journal, read_lines
from trainer.storage.run_folder import RunFolder, rollbacks_of

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class StartPoint:
    """The start of a run: fresh, resumed or branched off."""

    step: int = 0  # optimiser steps that are done
    checkpoint: Checkpoint | None = None
    earlier: dict[str, Any] | None = None  # run.yaml of an earlier start, known to rank 0 alone
    parent: dict[str, Any] | None = None  # the run that a branch starts from
    # whether the run was extended, so that it resumes from before its cooldown
    drops_cooldown: bool = False
    ended: str | None = None  # why nothing is left to do
    # the kernels of attention and of elementwise parts; see trainer.session.kernels
    attention: dict[str, Any] | None = None
    elementwise: dict[str, Any] | None = None

    @property
    def fresh(self) -> bool:
        """Return whether the run starts at its first step."""
        return self.checkpoint is None

    def kernels(self) -> dict[str, dict[str, Any] | None]:
        """Return the records of the kernels, as run.yaml has them."""
        return {"attention": self.attention, "elementwise": self.elementwise}

    def to_json(self) -> str:
        """Write as text, for the other ranks. run.yaml is left out: only rank 0 uses it."""
        content = asdict(replace(self, earlier=None))
        checkpoint = str(self.checkpoint.path) if self.checkpoint is not None else None
        return json.dumps(content | {"checkpoint": checkpoint})

    @classmethod
    def from_json(cls, text: str) -> StartPoint:
        """Read what `to_json` wrote."""
        content = json.loads(text)
        path = content["checkpoint"]
        checkpoint = Checkpoint.of(Path(path)) if path is not None else None
        return cls(**content | {"checkpoint": checkpoint})


def find_start_point(folder: RunFolder, recipe: Recipe, identity: dict[str, Any]) -> StartPoint:
    """Decide where the run in `folder` starts. For a branch this copies the parent's checkpoint.

    Raises:
        UnusableCheckpoint, FolderError: the folder or the parent holds a run with other settings,
        or is damaged.
    """
    earlier = folder.earlier()
    if earlier is None:
        if not recipe.config["branch"]:
            return StartPoint()
        parent, copied = branch_off(folder, recipe.config, identity)
        return StartPoint(copied.step, copied, parent=parent)
    checkpoints.set_damaged_aside(folder.checkpoints)
    checkpoint, drops_cooldown = _checkpoint_to_resume(folder, recipe, identity, earlier)
    start = StartPoint(
        checkpoint.step if checkpoint is not None else 0,
        checkpoint,
        earlier,
        drops_cooldown=drops_cooldown,
    )
    if not folder.is_finished(earlier):
        return start
    return replace(start, ended=_ended(folder, start.step, recipe))


def cooldown_of(branch: dict[str, Any]) -> RuntimeCooldown:
    """Make the cooldown of a branch from its config node."""
    return RuntimeCooldown(
        branch["step"], branch["steps"], branch["level"], branch["shape"], branch["final"]
    )


def branch_off(
    folder: RunFolder, config: dict[str, Any], identity: dict[str, Any]
) -> tuple[dict[str, Any], Checkpoint]:
    """Copy the parent's checkpoint, and its journal up to there, into a new run folder. Return the
    parent as run.yaml records it, and the copied checkpoint.

    Raises:
        FolderError, UnusableCheckpoint: the parent or its checkpoint cannot be used, or is a run
        with other settings.
    """
    step = config["branch"]["step"]
    path, content, _ = run_folder.read(config["branch"]["run"])
    source = checkpoints.chosen(path / "checkpoints", str(step))
    differences = run_folder.differences(
        content["config"], config, (*run_folder.FREE, *run_folder.LENGTHS, "branch", "task")
    )
    differences += _identity_differences(content["identity"], identity)
    if differences:
        raise UnusableCheckpoint(
            f"{path} cannot be branched off with other settings:\n  " + "\n  ".join(differences)
        )
    if changed(path, {"train": content["identity"]["data"]["train"]}, identity["data"]):
        log.info("from step %d on, this branch trains on other rows than its parent", step)
    fault = checkpoints.fault(source)
    if fault is not None:
        raise UnusableCheckpoint(f"{source.path} cannot be used: {fault}")
    parent = {
        "id": content["id"],
        "run": str(path.resolve()),
        "step": step,
        "sha256": source.sha256,
    }
    if rollbacks := [back for back in content.get("rollbacks", []) if back["at"] <= step]:
        parent["rollbacks"] = rollbacks
    target = Checkpoint.at(folder.checkpoints, step)
    for file, copy in ((source.path, target.path), (source.manifest, target.manifest)):
        copy.unlink(missing_ok=True)
        try:
            # checkpoints are never changed in place, so that both runs can have the same file
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [
            line
            for line, row in read_lines(path / name)
            if row["step"] <= step and row.get("kind") != "stopped"
        ]
        atomic.write_text(folder.path / name, "".join(f"{line}\n" for line in lines))
    log.info("branching off %s after step %d", path, step)
    return parent, target


def drop_cooldown(folder: RunFolder, start: StartPoint) -> None:
    """Remove the checkpoints of the cooldown that an extended run leaves out. The adapter that it
    exported is kept under the name of its step."""
    assert start.earlier is not None
    checkpoints.remove_after(folder.checkpoints, start.step)
    renamed = folder.path / f"adapter-{start.earlier['identity']['steps']}"
    if (folder.path / "adapter").exists() and not renamed.exists():
        (folder.path / "adapter").rename(renamed)
        log.info("the cooled-down adapter stays in %s", renamed)


def _identity_differences(
    recorded: dict[str, Any], identity: dict[str, Any], same_ranks: bool = True
) -> list[str]:
    """List how the parts of a recorded run differ from those of this one. Rows are left out."""
    free = ("choices", "steps", "base", "data", "target.run", *(() if same_ranks else ("ranks",)))
    differences = run_folder.differences(recorded, identity, free)
    if recorded["base"] != identity["base"]:
        differences.append("base: its weights have changed")
    return differences


def _checkpoint_to_resume(
    folder: RunFolder, recipe: Recipe, identity: dict[str, Any], earlier: dict[str, Any]
) -> tuple[Checkpoint | None, bool]:
    """Return (checkpoint, drops_cooldown). drops_cooldown is True if the run was extended and
    restarts from before its cooldown.

    Raises:
        UnusableCheckpoint, FolderError: the folder holds another run, or its checkpoints or its
        record are damaged.
    """
    run_folder.complete(earlier, folder.file)
    recorded = earlier["identity"]
    split = same_step.Split(earlier["config"], recorded.get("ranks", 1), recipe)
    fault = split.fault()
    free: tuple[str, ...] = same_step.KEYS if fault is None else ()
    free += same_step.LAUNCH if fault is None and split.other_ranks else ()
    other_rows = changed(folder.path, recorded["data"], identity["data"])
    free += _places(recipe.config, not other_rows, recorded["base"] == identity["base"])
    differences = run_folder.differences(
        earlier["config"], recipe.config, (*run_folder.FREE, *run_folder.LENGTHS, *free)
    )
    if fault is not None:
        differences.append(fault)
    differences += _identity_differences(recorded, identity, same_ranks=fault is not None)
    differences += [
        f"data: the rows of {rows}, or how they are tokenised, have changed" for rows in other_rows
    ]
    checkpoint = checkpoints.newest(folder.checkpoints)
    done, steps, drops_cooldown = checkpoint.step if checkpoint else 0, recipe.steps, False
    same_until = _same_rates_until(folder, recipe, recorded["steps"], done)
    if same_until < done:
        constant = checkpoints.marked(folder.checkpoints, "constant")
        if constant is not None and constant.step <= same_until and steps >= recorded["steps"]:
            checkpoint, done, drops_cooldown = constant, constant.step, True
        else:
            differences.append(
                f"steps: {recorded['steps']} in the run, {steps} now. With that length its schedule"
                f" would have had other rates from step {same_until} on. A fraction of the run, as"
                " of a warm-up, changes with the length: give it in steps from the start"
            )
    if done > steps:
        differences.append(f"steps: {done} are done, {steps} are requested")
    if differences:
        raise UnusableCheckpoint(
            f"{folder.path} holds another run, which cannot be resumed as this one:\n  "
            + "\n  ".join(differences)
            + "\nGive its settings, or another name="
        )
    if checkpoint is not None:
        log.info(
            "resuming after step %d%s%s",
            done,
            progress.of(steps),
            ", from before the cooldown" * drops_cooldown,
        )
        if (explanation := split.explanation()) is not None:
            log.info("%s", explanation)
    return checkpoint, drops_cooldown


def _places(config: dict[str, Any], same_rows: bool, same_base: bool) -> tuple[str, ...]:
    """Return the settings that only say where something is, of what is compared by its content."""
    parts = [f"parts.{name}." for name in config["task"].get("parts") or {}]
    files = ("path", "eval_path", "chat_template")
    rows = tuple(f"task.{part}{file}" for part in ("", *parts) for file in files)
    return (*(rows if same_rows else ()), *(("base.path",) if same_base else ()))


def record_places(folder: RunFolder, plain: dict[str, Any]) -> None:
    """Record in run.yaml where the base and the rows of a finished run are now. What they hold was
    compared when its start point was found."""
    content: Any = folder.earlier()
    config = content["config"]
    moved = config | {"task": plain["task"], "base": config["base"]}
    if "path" in plain["base"]:
        moved["base"] = config["base"] | {"path": plain["base"]["path"]}
    if moved != config:
        run_folder.rewrite(folder.file, content | {"config": moved})


def _same_rates_until(folder: RunFolder, recipe: Recipe, recorded_steps: int, done: int) -> int:
    """Return the first of the `done` steps whose rate would have been different with the run's new
    length; `done` if there is none."""
    config, steps, restart = recipe.config, recipe.steps, recipe.adapter.restart
    journal = Journal(folder.path, [], False)
    starts = [row["step"] for row in journal.rows("cooldown")]
    ends = [row for row in journal.rows("stopped") if row["reason"].startswith("cooled down")]
    if starts and ends and _extended(ends[-1], steps, config["max_time"]):
        return starts[-1]
    if steps == recorded_steps:
        return done
    schedule = make_schedule(config, recipe.order)
    cooldown = cooldown_of(config["branch"]) if config["branch"] else None
    different_steps = (
        step
        for step in range(done)
        if factor(schedule, step, steps, restart, cooldown)
        != factor(schedule, step, recorded_steps, restart, cooldown)
    )
    return next(different_steps, done)


def _extended(stopped: dict[str, Any], steps: int, max_time: float | None) -> bool:
    """Return whether a stopped run has more steps or more time now than it had."""
    earlier_limit = stopped.get("max_time")
    return steps > stopped.get("steps", steps) or (
        earlier_limit is not None and (max_time is None or max_time > earlier_limit)
    )


def _ended(folder: RunFolder, done: int, recipe: Recipe) -> str | None:
    """Say how a finished run ended; None if it has more steps or more time now."""
    steps, max_time = recipe.steps, recipe.config["max_time"]
    if done >= steps:
        return f"has done its {steps} steps"
    for row in Journal(folder.path, [], False).rows("stopped"):
        if row["reason"].startswith("cooled down") and _extended(row, steps, max_time):
            continue
        if row["reason"].startswith("max_time") and (max_time is None or max_time > row["minutes"]):
            continue
        return f"was stopped after step {row['step']}: {row['reason']}"
    return None


def skips_of(earlier: dict[str, Any], branch: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the steps whose rows rollbacks have skipped, as BatchOrder.skips. `earlier` is the
    run.yaml of the run, or of the parent of a new branch."""
    return [
        (back["at"], back["steps"])
        for back in rollbacks_of(earlier)
        if not branch or back["at"] <= branch["step"] or earlier.get("parent")
    ]
