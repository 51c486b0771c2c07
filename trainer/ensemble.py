"""Measure the mixture of several runs' adapters on the rows that each holds out.

    graft ensemble runs=[RUN,RUN,...] [OPTIONS]

The table has the loss per trained token of each run's held-out rows under each run, and under

    uniform  the mean of the runs' probabilities
    mixture  the same, each run weighed by how well it has predicted the text so far
    route    one run for each row: that of the least perplexity on the prompt

The last column says how many rows were routed to the run that holds them out. If one merged adapter
(graft merge) loses more than the route does, serve the adapters and route.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import paths
from trainer.config.options import exit_with, option, parse


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    runs: str = option(
        "the runs, each FOLDER[@last|best|STEP]", value="[RUN,RUN,...]", reads=paths.runs_fault
    )
    rows: int = option("held-out rows of each run", 100, at_least=1)
    top: int | None = option(
        "runs that count at each token of the mixture, by default all", None, value="2", at_least=1
    )
    json: Path | None = option("write the numbers as JSON", None, value="FILE", writes=True)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        runs = paths.listed(self.runs)
        if len(runs) < 2:
            yield f"runs={self.runs}: expected two or more, as runs=[runs/a,runs/b]"
        if len(set(runs)) < len(runs):
            yield f"runs={self.runs}: a run is there twice"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft ensemble")
    from rich import get_console

    from trainer.assembly import quiet
    from trainer.session import failures
    from trainer.storage import atomic
    from trainer.studies import ensemble

    quiet.quiet()
    runs = paths.listed(options.runs)
    try:
        results = ensemble.measure(runs, options.rows, options.top)
    except Exception as error:
        return failures.report_and_exit_code(error)
    get_console().print(ensemble.table(runs, results))
    if options.json:
        atomic.write_output(options.json, json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
