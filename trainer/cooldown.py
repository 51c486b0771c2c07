"""Cooldowns that branch off the checkpoints of a run, and what the family of runs came to.

    python -m trainer.cooldown from=RUN[@STEP|last|best] fraction=F|steps=N [shape=1-sqrt] [final=0] [name=NAME] [force=false]
                               [dry=false] [KEY=VALUE ...] [--multirun]
    python -m trainer.cooldown family=RUN

Each branch is a run of its own beside RUN, with its settings, weights, optimiser, data position and random draws; only the rate
falls, to `final` of what it was. fraction=0.2 makes the cooldown a fifth of all its steps. With --multirun from, fraction, steps,
shape and final take several values, separated by commas, and every combination is run. KEY=VALUE changes the rows that the
cooldown sees (task=..., task.path=...) or what is free in a run (callbacks, logger, max_time). RUN itself may still be training;
keep its checkpoints with callbacks.checkpoints.keep=null. family= writes family.md and family.svg into RUN's folder.
"""

from __future__ import annotations

import itertools
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

KNOWN: dict[str, Any] = {
    "from": None, "fraction": None, "steps": None, "shape": "1-sqrt", "final": "0", "name": None, "force": "false", "dry": "false",
    "family": None,
}  # fmt: skip
SWEPT = ("from", "fraction", "steps", "shape", "final")
# What a branch sets itself: the run's own values must not come back.
_OWN = ("resume", "name", "runs", "max_steps", "max_epochs", "max_tokens", "max_time", "branch")


def arguments(options: dict[str, str], more: list[str]) -> tuple[str, list[str]]:
    """(name, arguments of `python -m trainer`) of the branch that single values ask for.

    Raises:
        ConfigError, FolderError, CheckpointError: what is asked for does not fit the run.
    """
    from trainer import assembly, checkpoint, folder
    from trainer.config import ConfigError
    from trainer.folder import FolderError
    from trainer.journal import read
    from trainer.schedules import factor

    path, content, which = folder.read(options["from"])
    config, identity = content["config"], content["identity"]
    if config["branch"]:
        raise FolderError(
            f"{path} is itself a cooldown: branch off {config['branch']['run']} at another step or with another length"
        )
    step = int(checkpoint.chosen(path / "checkpoints", which).stem[5:])
    length = _length(options, step)
    if config["schedule"].get("cooldown_tokens") is not None:  # in steps they are known from the rows alone
        logged = [row["lr"] for row in read(path / "metrics.jsonl") if row["kind"] == "step" and row["step"] <= step]
        rates = [rate / max(logged) for rate in logged]
    else:
        schedule, restart = assembly.instantiate(config["schedule"]), assembly.instantiate(config["adapter"]).restart
        cooling = _cooling(path, config, step)
        rates = [factor(schedule, at, identity["steps"], restart, cooling) for at in range(restart, step + 1)]
    if rates[-1] <= 0:
        raise ConfigError(
            f"{path} has a rate of 0 after step {step}, from which nothing can fall: branch off an earlier checkpoint"
        )
    if rates[-1] < max(rates) and options["force"] != "true":
        raise ConfigError(
            f"after step {step} of {path} the rate is already falling ({rates[-1]:.3g} of the peak, {max(rates):.3g} before): a cooldown "
            "branches off the constant phase. Give an earlier checkpoint, or force=true to cool down from there"
        )
    shape = "" if options["shape"] == "1-sqrt" else f"-{options['shape']}"
    name = options["name"] or f"{path.name}-cooldown-{step}-{length}{shape}"
    # folder.read has asked whether the base's own code may run by the config; the overrides are as the folder has them.
    trust = () if config["base"].get("trust_remote_code") else ("base.trust_remote_code",)
    kept = [override for override in content["overrides"] if _key(override) not in (*_OWN, *trust, *map(_key, more))]
    return name, [
        *kept, f"name={name}", f"runs={path.parent}", "branch=cooldown", f"branch.run={path}", f"branch.step={step}",
        f"branch.steps={length}", f"branch.level={rates[-1]!r}", f"branch.shape={options['shape']}", f"branch.final={options['final']}",
        f"max_steps={step + length}", "max_epochs=null", "max_tokens=null", "max_time=null", *more,
    ]  # fmt: skip


def _cooling(path: Path, config: dict[str, Any], step: int) -> Any:
    """The cooldown that a run is in at a step, if one was begun at run time."""
    from trainer.journal import read
    from trainer.schedules.cooldown import Cooling

    settings = config["callbacks"].get("cooldown")
    for row in read(path / "metrics.jsonl"):
        if row["kind"] == "cooldown" and row["step"] < step and settings:
            return Cooling(row["step"], row["steps"], row["level"], settings["shape"], settings["final"])
    return None


def _length(options: dict[str, str], step: int) -> int:
    """The cooldown's steps."""
    from trainer.config import ConfigError

    fraction, steps = options["fraction"], options["steps"]
    if (fraction is None) == (steps is None):
        raise ConfigError("give the cooldown's length: either fraction=F of all steps, or steps=N")
    try:
        length = int(steps) if steps is not None else round(step * float(fraction) / (1 - float(fraction)))
    except (ValueError, ZeroDivisionError):
        length = 0
    if length < 1 or (fraction is not None and not 0 < float(fraction) < 1):
        asked = f"steps={steps}" if steps is not None else f"fraction={fraction}"
        raise ConfigError(
            f"{asked} after step {step} is no cooldown: steps is a whole number from 1 on, fraction is above 0 and below 1"
        )
    return length


def _places(values: list[str]) -> list[str]:
    """`RUN@10,20` as RUN@10 and RUN@20."""
    run = values[0].rpartition("@")[0]
    return [value if not value.isdecimal() else f"{run}@{value}" for value in values]


def finished(command: list[str]) -> int:
    """Run a branch; returns its exit code. What asks a run to stop is handed on to the branch, which saves its step and ends by itself;
    Ctrl-C reaches it anyway."""
    process = subprocess.Popen(command)
    before = {
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
        for number, handler in before.items():
            signal.signal(number, handler)


def _key(override: str) -> str:
    return re.sub(r"^[+~]*", "", override).partition("=")[0].partition("@")[0]


def family(run: str) -> tuple[str, Path]:
    """The table of a run and its branches, as text, and the file it was written to.

    Raises:
        FolderError: RUN is no run folder.
    """
    from trainer import folder
    from trainer.checkpoint import write_text

    path, content, _ = folder.read(run)
    trunk = _member(path)
    members = []
    for file in sorted(path.parent.glob("*/run.yaml")):
        try:
            found = folder.RunFolder(file.parent).earlier()
        except folder.FolderError:  # another run's, which says nothing about this family
            continue
        if found is not None and (found.get("parent") or {}).get("id") == content["id"]:
            members.append(_member(file.parent) | {"at": found["parent"]["step"]})
    members.sort(key=lambda member: (member["at"], member["steps"]))
    lines = ["| run | branched after | cooldown steps | steps | tokens | held-out loss |", "|---|---|---|---|---|---|"]
    for member in [trunk, *members]:
        at = member.get("at")
        down = "" if at is None else f"{member['steps'] - at:,}"
        loss = "" if member["loss"] is None else f"{member['loss']:.4f}"
        shown = "" if at is None else f"{at:,}"
        lines.append(f"| {member['name']} | {shown} | {down} | {member['steps']:,} | {member['tokens']:,} | {loss} |")
    if members:
        alone = sum(member["steps"] for member in members)
        spent = max(member["at"] for member in members) + sum(member["steps"] - member["at"] for member in members)
        lines.append(
            f"\nThese {len(members)} lengths took {spent:,} steps, the constant run up to the last branch included. Each trained from the "
            f"start they would have taken {alone:,}: {1 - spent / alone:.0%} were saved."
        )
    text = "\n".join(lines) + "\n"
    write_text(path / "family.md", text)
    _plot(trunk, members, path / "family.svg")
    return text, path / "family.md"


def _member(path: Path) -> dict[str, Any]:
    """What a run of the family did so far."""
    from trainer.journal import read

    rows = read(path / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    tokens = {row["step"]: row["tokens"] for row in steps} | {0: 0}
    evaluated = [row for row in rows if row["kind"] == "evaluation" and "loss" in row]
    points = [
        (tokens.get(row["step"], max(t for s, t in tokens.items() if s <= row["step"])), row["loss"]) for row in evaluated
    ]
    return {
        "name": path.name,
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "loss": evaluated[-1]["loss"] if evaluated else None,
        "points": [(row["step"], *point) for row, point in zip(evaluated, points, strict=True)],
    }


def _plot(trunk: dict[str, Any], members: list[dict[str, Any]], file: Path) -> None:
    """Held-out loss against tokens, each branch from where it left."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for member in [trunk, *members]:
        points = [(tokens, loss) for step, tokens, loss in member["points"] if step >= member.get("at", 0) and step > 0]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=member["name"])
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out loss")
    if axes.has_data():
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer import config, schema

    sweep, words = "--multirun" in argv or "-m" in argv, [word for word in argv if word not in ("--multirun", "-m")]
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    options, more = dict(KNOWN), []
    settings = {*schema.load("config").children, *(path.name for path in schema.CONF.iterdir() if path.is_dir())}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            return config.bad(f"{word}: not an argument. Arguments are written key=value.\n\n{__doc__}")
        if key in KNOWN:
            options[key] = value
        elif key.lstrip("+~").partition(".")[0] in settings:
            more.append(word)
        else:
            return config.bad(f"{word}: not an argument. {schema.nearest(key, [*KNOWN, *settings])}\n\n{__doc__}")
    for key in ("force", "dry"):
        if options[key] not in ("true", "false"):
            return config.bad(f"{key}={options[key]}: true or false")
    shapes = schema.load("branch/cooldown").children["shape"].type.split(" | ")  # type: ignore[union-attr]
    if options["family"] is None and options["from"] is None:
        return config.bad(f"missing: from, the run to branch off, or family\n\n{__doc__}")
    from trainer import failures

    try:
        if options["family"] is not None:
            print(family(options["family"])[0])
            return 0
        several = {key: str(options[key]).split(",") for key in SWEPT if options[key] is not None}
        several["from"] = _places(several["from"])
        if not sweep and (many := [key for key, values in several.items() if len(values) > 1]):
            return config.bad(f"{many[0]}={options[many[0]]}: several values need --multirun")
        if unknown := [shape for shape in several["shape"] if shape not in shapes]:
            return config.bad(f"shape={unknown[0]}: one of {', '.join(shapes)}")
        branches = [
            arguments(options | dict(zip(several, values, strict=True)), more)
            for values in itertools.product(*several.values())
        ]
    except Exception as error:
        return failures.told(error)
    if options["name"] is not None and len(branches) > 1:
        return config.bad(f"name={options['name']}: {len(branches)} branches cannot share a name; leave it out")
    for name, given in branches:
        command = [sys.executable, "-m", "trainer", *given]
        print("python -m trainer", shlex.join(given), flush=True)
        if options["dry"] == "false" and (code := finished(command)):
            print(f"{name} ended with {code}", file=sys.stderr)
            return code
    if options["dry"] == "false":
        print(family(several["from"][0].rpartition("@")[0] or several["from"][0])[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
