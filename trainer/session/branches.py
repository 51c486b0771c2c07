"""Cooldown branches of a run, and their family."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# A branch sets these itself, so the run's values are not inherited.
_SET_BY_BRANCH = (
    "resume",
    "name",
    "runs",
    "max_steps",
    "max_epochs",
    "max_tokens",
    "max_time",
    "branch",
)


@dataclass(frozen=True)
class Branch:
    """A cooldown to branch off, as the command line says it. Its length is either `fraction` or
    `steps`."""

    source: str  # RUN[@STEP|last|best]
    fraction: str | None = None
    steps: str | None = None
    shape: str = "1-sqrt"
    final: str = "0"
    name: str | None = None
    force: bool = False


def sweep(branch: Branch) -> tuple[list[Branch], str | None]:
    """Return (every combination of the values that are separated by commas, the first option with
    several values). `source=RUN@10,20` is RUN@10 and RUN@20."""
    values: dict[str, Any] = {
        name: str(value).split(",")
        for name in ("source", "fraction", "steps", "shape", "final")
        if (value := getattr(branch, name)) is not None
    }
    values["source"] = places(values["source"])
    swept = next((name for name, several in values.items() if len(several) > 1), None)
    combinations = itertools.product(*values.values())
    return [replace(branch, **dict(zip(values, each, strict=True))) for each in combinations], swept


def arguments(branch: Branch, more: list[str]) -> tuple[str, list[str]]:
    """Return (name, arguments of `graft`) of one branch.

    Raises:
        ConfigError, FolderError, UnusableCheckpoint: the branch does not fit the run.
    """
    from trainer.config.errors import ConfigError
    from trainer.config.overrides import is_inherited
    from trainer.storage import run_folder
    from trainer.storage.run_folder import FolderError

    path, content, _ = run_folder.read(branch.source)
    config = content["config"]
    if config["branch"]:
        raise FolderError(
            f"{path} is itself a cooldown: branch off {config['branch']['run']} at another step or"
            " with another length"
        )
    step = _step(path, branch.source)
    length = _length(branch, step)
    rates = _rates(path, content, step)
    if rates[-1] <= 0:
        raise ConfigError(
            f"{path} has a rate of 0 after step {step}, which cannot fall any further: branch off"
            " an earlier checkpoint"
        )
    if rates[-1] < max(rates) and not branch.force:
        raise ConfigError(
            f"after step {step} of {path} the rate is already falling ({rates[-1]:.3g} of the peak,"
            f" {max(rates):.3g} before): a cooldown branches off the constant phase. Give an"
            " earlier checkpoint, or force=true to cool down from there"
        )
    shape = "" if branch.shape == "1-sqrt" else f"-{branch.shape}"
    name = branch.name or f"{path.name}-cooldown-{step}-{length}{shape}"
    # run_folder.read has checked by the config whether the base's own code may run. The overrides
    # are as the folder records them, so that this one is not inherited without a check.
    trust = () if config["base"].get("trust_remote_code") else ("base.trust_remote_code",)
    inherited = [
        override
        for override in content["overrides"]
        if _key(override) not in (*_SET_BY_BRANCH, *trust, *map(_key, more))
        and is_inherited(override)
    ]
    return name, [
        *inherited,
        f"name={name}",
        f"runs={path.parent}",
        "branch=cooldown",
        f"branch.run={path}",
        f"branch.step={step}",
        f"branch.steps={length}",
        f"branch.level={rates[-1]!r}",
        f"branch.shape={branch.shape}",
        f"branch.final={branch.final}",
        f"max_steps={step + length}",
        "max_epochs=null",
        "max_tokens=null",
        "max_time=null",
        *more,
    ]


def _rates(path: Path, content: dict[str, Any], step: int) -> list[float]:
    """Return the rate of each step of a run up to `step`, as a factor of its peak."""
    from trainer.assembly.build import instantiate
    from trainer.schedules import factor
    from trainer.storage.journal import read

    config = content["config"]
    # The steps of a cooldown in tokens depend on the rows, which are not loaded here.
    if config["schedule"].get("cooldown_tokens") is not None:
        rates = [
            row["lr"]
            for row in read(path / "metrics.jsonl")
            if row["kind"] == "step" and row["step"] <= step
        ]
        return [rate / max(rates) for rate in rates]
    schedule, restart = instantiate(config["schedule"]), instantiate(config["adapter"]).restart
    cooldown = _runtime_cooldown(path, config, step)
    return [
        factor(schedule, at, content["identity"]["steps"], restart, cooldown)
        for at in range(restart, step + 1)
    ]


def _runtime_cooldown(path: Path, config: dict[str, Any], step: int) -> Any:
    """Return the run-time cooldown that a run is in at a step; None if it is in none."""
    from trainer.schedules.cooldown import RuntimeCooldown
    from trainer.storage.journal import read

    settings = config["callbacks"].get("cooldown")
    for row in read(path / "metrics.jsonl"):
        if row["kind"] == "cooldown" and row["step"] < step and settings:
            return RuntimeCooldown(
                row["step"], row["steps"], row["level"], settings["shape"], settings["final"]
            )
    return None


def _length(branch: Branch, step: int) -> int:
    """Return the cooldown's number of steps."""
    from trainer.config.errors import ConfigError

    fraction, steps = branch.fraction, branch.steps
    if (fraction is None) == (steps is None):
        raise ConfigError("give the cooldown's length: either fraction=F of all steps, or steps=N")
    try:
        length = (
            int(steps)
            if steps is not None
            else round(step * float(fraction or 0) / (1 - float(fraction or 0)))
        )
    except (ValueError, ZeroDivisionError):
        length = 0
    if length < 1 or (fraction is not None and not 0 < float(fraction) < 1):
        setting = f"steps={steps}" if steps is not None else f"fraction={fraction}"
        raise ConfigError(
            f"{setting} after step {step} is no cooldown: steps is a whole number from 1 on,"
            " fraction is above 0 and below 1"
        )
    return length


def _step(run: Path, source: str) -> int:
    """Return the step that a branch begins after: without @ the last one, whichever checkpoint is
    the run's result."""
    from trainer.config.target_base import split
    from trainer.storage import checkpoints

    return checkpoints.chosen(run / "checkpoints", split(source)[1] or "last").step


def places(values: list[str]) -> list[str]:
    """Expand `RUN@10,20` to RUN@10 and RUN@20."""
    run = values[0].rpartition("@")[0]
    return [value if not value.isdecimal() else f"{run}@{value}" for value in values]


def finished(command: list[str]) -> int:
    """Run a branch and return its exit code. Signals that stop a run are forwarded to the branch,
    which saves its step and ends by itself. A terminal sends Ctrl-C to both."""
    process = subprocess.Popen(command)
    handlers = {
        number: signal.signal(number, lambda number, frame: process.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _key(override: str) -> str:
    return re.sub(r"^[+~]*", "", override).partition("=")[0].partition("@")[0]


def family(run: str) -> tuple[str, Path]:
    """Write family.md and family.svg of a run and its branches. Return the table and its file.

    Raises:
        FolderError: RUN is no run folder.
    """
    from trainer.storage import run_folder
    from trainer.storage.atomic import write_text

    path, content, _ = run_folder.read(run)
    trunk = _member(path)
    members = []
    for folder, record in branched_off(path, content["id"]):
        members.append(_member(folder) | {"at": record["parent"]["step"]})
    members.sort(key=lambda member: (member["at"], member["steps"]))
    lines = [
        "| run | branched after | cooldown steps | steps | tokens | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for member in [trunk, *members]:
        at = member.get("at")
        cooldown = "" if at is None else f"{member['steps'] - at:,}"
        loss = "" if member["loss"] is None else f"{member['loss']:.4f}"
        branched = "" if at is None else f"{at:,}"
        lines.append(
            f"| {member['name']} | {branched} | {cooldown} | {member['steps']:,} |"
            f" {member['tokens']:,} |"
            f" {loss} |"
        )
    if members:
        separate_steps = sum(member["steps"] for member in members)
        family_steps = max(member["at"] for member in members) + sum(
            member["steps"] - member["at"] for member in members
        )
        lines.append(
            f"\nThese {len(members)} lengths took {family_steps:,} steps, the constant run up to"
            " the last branch included. Trained separately from the start, they would have taken"
            f" {separate_steps:,}: {1 - family_steps / separate_steps:.0%} were saved."
        )
    text = "\n".join(lines) + "\n"
    write_text(path / "family.md", text)
    _plot(trunk, members, path / "family.svg")
    return text, path / "family.md"


def branched_off(path: Path, run_id: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (folder, content of run.yaml) of each branch of a run, in the order of names."""
    from trainer.storage import run_folder

    for file in sorted(path.parent.glob("*/run.yaml")):
        try:
            record = run_folder.RunFolder(file.parent).earlier()
        except run_folder.FolderError:  # a damaged folder next to the family's is no reason to fail
            continue
        if record is not None and (record.get("parent") or {}).get("id") == run_id:
            yield file.parent, record


def with_branches(run: Path) -> list[Path]:
    """Return the folders of a run and of its branches.

    Raises:
        FolderError: it is no run folder.
    """
    from trainer.storage.run_folder import FolderError, RunFolder

    record = RunFolder(run).earlier()
    if record is None:
        raise FolderError(f"{run} is no run folder: it has no run.yaml")
    return [run, *(folder for folder, _ in branched_off(run, record["id"]))]


def _member(path: Path) -> dict[str, Any]:
    """Read the steps, tokens and losses of a run of the family."""
    from trainer.storage.journal import read

    rows = read(path / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    tokens = {row["step"]: row["tokens"] for row in steps} | {0: 0}
    evaluations = [row for row in rows if row["kind"] == "evaluation" and "loss" in row]
    points = [
        (
            tokens.get(row["step"], max(t for s, t in tokens.items() if s <= row["step"])),
            row["loss"],
        )
        for row in evaluations
    ]
    return {
        "name": path.name,
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "loss": evaluations[-1]["loss"] if evaluations else None,
        "points": [(row["step"], *point) for row, point in zip(evaluations, points, strict=True)],
    }


def _plot(trunk: dict[str, Any], members: list[dict[str, Any]], file: Path) -> None:
    """Plot the held-out loss against tokens, each branch from its first step on."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    from trainer.storage import atomic

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for member in [trunk, *members]:
        points = [
            (tokens, loss)
            for step, tokens, loss in member["points"]
            if step >= member.get("at", 0) and step > 0
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=member["name"]
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out loss")
    if axes.has_data():
        axes.legend(frameon=False, fontsize=7)
    with atomic.file(file) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
