"""Continue a draft head on the model that its base has become, and measure what that gave.

    python -m trainer.realign draft=RUN|FOLDER target.run=FOLDER[@last|best|STEP] [name=NAME]
    [runs=FOLDER] [dry=false] [KEY=VALUE ...]

draft is a drafter's folder or that of the run that trained it; target.run is a fine-tuning run on
the same base. A new run starts from the head's weights with its settings, on the rows and with the
rates of the run that trained it; KEY=VALUE changes them, as in task=sql max_epochs=1
optimizer.lr=1e-4. With +experiment=NAME all but the head is the experiment's. The new run is made
beside the target's, and called NAME or DRAFT-TARGET.

Its folder gets realign.md and realign.json, which are printed: the head's acceptance on the
held-out rows of the new run, on the target that it was trained for, on the new one, and on the new
one after it was re-aligned.
"""

from __future__ import annotations

import json
import shlex
import sys

from trainer.evaluation.realigned import KNOWN, MEASURED_AT_ONCE, _key, arguments, measure, table


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config import schema
    from trainer.config.errors import bad

    if any(word in ("-h", "--help") for word in argv):
        print(__doc__)
        return 0
    options, more = dict(KNOWN), []
    settings = {
        "experiment",
        *schema.load("config").children,
        *(path.name for path in schema.CONF.iterdir() if path.is_dir()),
    }
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key in KNOWN:
            options[key] = value
        elif equals and key.lstrip("+~").partition(".")[0] in settings:
            more.append(word)
        else:
            fault = (
                schema.nearest(key, [*KNOWN, *settings])
                if equals
                else "Arguments are written key=value."
            )
            return bad(f"{word}: not an argument. {fault}\n\n{__doc__}")
    if missing := [key for key, value in options.items() if value is ...]:
        return bad(f"missing: {', '.join(missing)}\n\n{__doc__}")
    if options["dry"] not in ("true", "false"):
        return bad(f"dry={options['dry']}: true or false")
    kept = ("target", "adapter", "base", "objective", "penalty", "branch", "resume")
    if fixed := [
        word for word in more if _key(word) == "drafter" or _key(word).partition(".")[0] in kept
    ]:
        return bad(
            f"{fixed[0]}: a head that is re-aligned stays what it is, on the base and the adapter"
            " of target.run"
        )
    from trainer.assembly import quiet
    from trainer.drafters import io
    from trainer.session import failures
    from trainer.session.branches import finished
    from trainer.storage.atomic import write_text

    quiet.quiet()
    try:
        run, given = arguments(options, more)
        print("python -m trainer", shlex.join(given), flush=True)
        if options["dry"] == "true":
            return 0
        if code := finished([sys.executable, "-m", "trainer", *given]):
            return code
        rows = measure(run, io.folder_of(options["draft"]), MEASURED_AT_ONCE)
    except Exception as error:
        return failures.report_and_exit_code(error)
    write_text(run / "realign.json", json.dumps(rows, indent=2) + "\n")
    write_text(run / "realign.md", table(rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
