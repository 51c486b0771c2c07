"""Continue a draft head on the fine-tuned model, and measure the gain.

    graft realign draft=RUN|FOLDER target.run=FOLDER[@last|best|STEP] [OPTIONS] [KEY=VALUE ...]

draft is a drafter's folder, or that of the run that trained it. target.run is a fine-tuning run on
the same base. A new run starts from the head's weights with its settings, on the rows and with the
rates of the run that trained it. KEY=VALUE changes them, as in task=sql max_epochs=1
optimizer.lr=1e-4. With experiment=NAME everything but the head is the experiment's.

drafter_adapter=lora trains a LoRA on the head's linear layers in place of all its weights.

The new run's folder gets realign.md and realign.json, which are printed: the head's acceptance on
the held-out rows of the new run, on the target that it was trained for, on the new target, and on
the new target after re-aligning.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import paths
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.overrides import is_setting
from trainer.config.quoting import key_of
from trainer.config.shown import say

# what a head that is re-aligned keeps
FIXED = ("target", "adapter", "base", "objective", "penalty", "branch", "resume")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    draft: str = option("the draft head", value="RUN|FOLDER", reads=paths.drafter_fault)
    target_run: str = option(
        "the fine-tuned model",
        key="target.run",
        value="FOLDER[@last|best|STEP]",
        reads=paths.saved_fault,
    )
    name: str | None = option("name of the new run, DRAFT-TARGET by default", None, value="NAME")
    runs: str | None = option(
        "where to create it, by default next to the target's run", None, value="FOLDER"
    )
    dry: bool = option("print the command and run nothing", False)
    overrides: tuple[str, ...] = rest("other settings of the new run", "KEY=VALUE", is_setting)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        for word in self.overrides:
            key = key_of(word)
            if key == "drafter" or key.partition(".")[0] in FIXED:
                yield (
                    f"{word}: a head that is re-aligned stays what it is, on the base and the"
                    " adapter of target.run"
                )


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft realign")
    from trainer.assembly import quiet
    from trainer.drafters import io
    from trainer.evaluation import realigned
    from trainer.session import failures
    from trainer.session.branches import finished
    from trainer.storage.atomic import write_text

    quiet.quiet()
    try:
        run, arguments = realigned.arguments(
            options.draft, options.target_run, options.name, options.runs, list(options.overrides)
        )
        say("graft", shlex.join(arguments), flush=True)
        if options.dry:
            return 0
        if code := finished([sys.executable, "-m", "trainer", *arguments]):
            return code
        draft = io.folder_of(options.draft)
        rows = realigned.measure(run, draft, realigned.MEASURED_AT_ONCE)
    except Exception as error:
        return failures.report_and_exit_code(error)
    write_text(run / "realign.json", json.dumps(rows, indent=2) + "\n")
    write_text(run / "realign.md", realigned.table(rows))
    say(realigned.table(rows))
    return 0


if __name__ == "__main__":
    exit_with(main)
