"""Branch cooldowns off a run's checkpoints, and compare the family of runs.

    graft cooldown from=RUN[@STEP|last|best] fraction=F|steps=N [OPTIONS] [KEY=VALUE ...]
    graft cooldown family=RUN

run= is another name of from=.

Each branch is a run next to RUN, with its settings, weights, optimiser, data position and random
draws. Only the learning rate differs: it falls to `final` of its value. RUN itself may still be
training; keep its checkpoints with callbacks.checkpoints.keep=null.

With --multirun the options from, fraction, steps, shape and final take several values, separated by
commas, and every combination is run; from=RUN@10,20 names two checkpoints. KEY=VALUE changes the
rows that the cooldown sees (task=..., task.path=...) or what is free in a run (callbacks, logger,
max_time).

family= writes family.md and family.svg into RUN's folder.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import paths, schema
from trainer.config.errors import bad
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.overrides import is_setting
from trainer.config.shown import say
from trainer.session import branches


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    source: str | None = option(
        "the run, and the checkpoint to branch off", None, key="from", value="RUN[@STEP|last|best]"
    )
    run: str | None = option("the same as from", None, value="RUN[@STEP|last|best]")
    fraction: str | None = option("the cooldown's share of all its steps", None, value="F")
    steps: str | None = option("the cooldown's steps", None, value="N")
    shape: str = option("curve of the falling rate, see conf/branch/cooldown.yaml", "1-sqrt")
    final: str = option("the last rate, as a share of the rate at the branch", "0")
    name: str | None = option("name of the new run", None, value="NAME")
    force: bool = option("branch off a rate that is falling already", False)
    dry: bool = option("print the commands and run nothing", False)
    family: str | None = option(
        "print the table of a run's branches", None, value="RUN", reads=paths.folder_fault
    )
    overrides: tuple[str, ...] = rest("other settings of the branch", "KEY=VALUE", is_setting)

    @property
    def parent(self) -> tuple[str, str | None]:
        """Return (the option's name, its value) of the run to branch off."""
        return ("from", self.source) if self.run is None else ("run", self.run)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        key, parent = self.parent
        if self.source is not None and self.run is not None:
            yield "from and run are two names of one option: give one of them"
        if self.family is None and parent is None:
            yield "missing: from (or run), the run to branch off, or family"
        for place in branches.places((parent or "").split(",")):
            if place and (fault := paths.saved_fault(place)):
                yield f"{key}={place}: {fault}"
        known = schema.load("branch/cooldown").children["shape"].type.split(" | ")
        for shape in self.shape.split(","):
            if shape not in known:
                yield f"shape={shape}: expected one of {', '.join(known)}"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    words = [word for word in argv if word not in ("--multirun", "-m")]
    options = parse(Options, words, __doc__, "graft cooldown")
    from trainer.session import failures

    try:
        if options.family is not None:
            say(branches.family(options.family)[0])
            return 0
        branch = branches.Branch(
            str(options.parent[1]),
            options.fraction,
            options.steps,
            options.shape,
            options.final,
            options.name,
            options.force,
        )
        each, swept = branches.sweep(branch)
        if swept is not None and len(words) == len(argv):
            key = options.parent[0] if swept == "source" else swept
            return bad(f"{key}={getattr(branch, swept)}: several values need --multirun")
        commands = [branches.arguments(one, list(options.overrides)) for one in each]
    except Exception as error:
        return failures.report_and_exit_code(error)
    if options.name is not None and len(commands) > 1:
        return bad(
            f"name={options.name}: {len(commands)} branches cannot share a name; leave it out"
        )
    for name, arguments in commands:
        say("graft", shlex.join(arguments), flush=True)
        command = [sys.executable, "-m", "trainer", *arguments]
        if not options.dry and (code := branches.finished(command)):
            say(f"{name} ended with {code}", file=sys.stderr)
            return code
    if not options.dry:
        say(branches.family(each[0].source.rpartition("@")[0] or each[0].source)[0])
    return 0


if __name__ == "__main__":
    exit_with(main)
