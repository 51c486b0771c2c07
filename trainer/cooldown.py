"""Cooldowns that branch off the checkpoints of a run, and what the family of runs came to.

    python -m trainer.cooldown from=RUN[@STEP|last|best] fraction=F|steps=N [shape=1-sqrt] [final=0]
    [name=NAME] [force=false]
                               [dry=false] [KEY=VALUE ...] [--multirun]
    python -m trainer.cooldown family=RUN

Each branch is a run of its own beside RUN, with its settings, weights, optimiser, data position and
random draws; only the rate falls, to `final` of what it was. fraction=0.2 makes the cooldown a
fifth of all its steps. With --multirun from, fraction, steps, shape and final take several values,
separated by commas, and every combination is run. KEY=VALUE changes the rows that the cooldown sees
(task=..., task.path=...) or what is free in a run (callbacks, logger, max_time). RUN itself may
still be training; keep its checkpoints with callbacks.checkpoints.keep=null. family= writes
family.md and family.svg into RUN's folder.
"""

from __future__ import annotations

import itertools
import shlex
import sys

from trainer.session.branches import KNOWN, SWEPT, _places, arguments, family, finished


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config import schema
    from trainer.config.errors import bad

    sweep, words = (
        "--multirun" in argv or "-m" in argv,
        [word for word in argv if word not in ("--multirun", "-m")],
    )
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    options, more = dict(KNOWN), []
    settings = {
        *schema.load("config").children,
        *(path.name for path in schema.CONF.iterdir() if path.is_dir()),
    }
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            return bad(f"{word}: not an argument. Arguments are written key=value.\n\n{__doc__}")
        if key in KNOWN:
            options[key] = value
        elif key.lstrip("+~").partition(".")[0] in settings:
            more.append(word)
        else:
            return bad(
                f"{word}: not an argument. {schema.nearest(key, [*KNOWN, *settings])}\n\n{__doc__}"
            )
    for key in ("force", "dry"):
        if options[key] not in ("true", "false"):
            return bad(f"{key}={options[key]}: true or false")
    shapes = schema.load("branch/cooldown").children["shape"].type.split(" | ")  # type: ignore[union-attr]
    if options["family"] is None and options["from"] is None:
        return bad(f"missing: from, the run to branch off, or family\n\n{__doc__}")
    from trainer.session import failures

    try:
        if options["family"] is not None:
            print(family(options["family"])[0])
            return 0
        several = {key: str(options[key]).split(",") for key in SWEPT if options[key] is not None}
        several["from"] = _places(several["from"])
        if not sweep and (many := [key for key, values in several.items() if len(values) > 1]):
            return bad(f"{many[0]}={options[many[0]]}: several values need --multirun")
        if unknown := [shape for shape in several["shape"] if shape not in shapes]:
            return bad(f"shape={unknown[0]}: one of {', '.join(shapes)}")
        branches = [
            arguments(options | dict(zip(several, values, strict=True)), more)
            for values in itertools.product(*several.values())
        ]
    except Exception as error:
        return failures.report_and_exit_code(error)
    if options["name"] is not None and len(branches) > 1:
        return bad(
            f"name={options['name']}: {len(branches)} branches cannot share a name; leave it out"
        )
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
