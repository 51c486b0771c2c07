"""Write a run's report.html again: one page in one file.

    graft report run=FOLDER

A run writes report.html when it ends. This command writes it from what the folder holds now. The
page needs no network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import files, paths
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: Path = option("the run folder", value="FOLDER", reads=paths.folder_fault)

    def faults(self) -> Iterator[str]:
        """Yield why the report cannot be written."""
        if self.run.is_dir() and (fault := files.place_fault(self.run)) is not None:
            yield f"run={self.run}: {fault}, and the report goes there"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft report")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from trainer.session import failures
    from trainer.session.report_html import write

    try:
        say(write(options.run))
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


if __name__ == "__main__":
    exit_with(main)
