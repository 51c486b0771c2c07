"""Print the JSON schema of an experiment, a group or a file of conf/, for editors.

    graft schema > experiment.schema.json
    graft schema of=adapter/lora

It is written from the comments of conf/. An editor with YAML support uses it where a file says

    # yaml-language-server: $schema=experiment.schema.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    of: str = option("what to describe", "experiment", value="experiment|GROUP|GROUP/CHOICE")
    out: Path | None = option("write it to a file", None, value="FILE", writes=True)

    def faults(self) -> Iterator[str]:
        """Yield what conf/ does not have."""
        from trainer.config import json_schema

        try:
            json_schema.of(self.of)
        except ValueError as error:
            yield f"of={self.of}: {error}"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft schema")
    from trainer.config import json_schema
    from trainer.storage import atomic

    text = json.dumps(json_schema.of(options.of), indent=2, ensure_ascii=False)
    if options.out is None:
        say(text)
    else:
        atomic.write_output(options.out, text + "\n")
        say(options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
