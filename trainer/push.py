"""Upload a run's result to the Hugging Face Hub.

    graft push run=FOLDER to=ORG/NAME              show what would go
    graft push run=FOLDER to=ORG/NAME yes=true     upload it

It uploads the adapter, else the draft head; part=merged names the folder of an export. README.md,
the model card, says how to load it. Paths of this machine are taken out of the configs, and a file
that holds a secret is refused. The repository is private unless private=false.

The token is that of HF_TOKEN or of `hf auth login`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import paths
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: Path = option("the run folder", value="FOLDER", reads=paths.folder_fault)
    to: str = option("the repository", value="ORG/NAME")
    part: str | None = option(
        "the folder in the run, by default adapter, else drafter", None, value="NAME"
    )
    base: str | None = option(
        "the base's name on the Hub, where the run's is a folder", None, value="ORG/NAME"
    )
    private: bool = option("whether a new repository is private", True)
    yes: bool = option("upload; without it nothing leaves this machine", False)

    def faults(self) -> Iterator[str]:
        """Yield names that the Hub does not take."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        for key, name in (("to", self.to), ("base", self.base)):
            if name is None:
                continue
            try:
                validate_repo_id(name)
                fault = None if "/" in name else "expected ORG/NAME"
            except HFValidationError as error:
                fault = str(error).rstrip(".")
            if fault is not None:
                yield f"{key}={name}: {fault}"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft push")
    from trainer.evaluation.tables import Table, size
    from trainer.exporting.upload import plan, push
    from trainer.session import failures

    try:
        planned = plan(options.run, options.part, options.to, options.base)
        rows = [[part.name, size(part.length), part.note] for part in planned.parts]
        rows += [[name, "", "stays here: no loader reads it"] for name in planned.left]
        total = size(sum(part.length for part in planned.parts))
        table = Table([f"{planned.folder}", total, ""], rows, frozenset({0, 2}))
        table.show(longest=80)
        kind = "private" if options.private else "public"
        if not options.yes:
            say(f"This would go to {options.to}, {kind} if it is new. yes=true uploads it.")
            return 0
        say(push(planned, options.private))
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


if __name__ == "__main__":
    exit_with(main)
