"""Compare runs: settings that differ, results, and their curves on one page.

    graft compare FOLDER FOLDER ... [OPTIONS]
    graft compare family=RUN

FOLDER is a run folder, or a folder of runs, such as that of a sweep. Runs that differ in their seed
alone are one column, with mean ± sample standard deviation. Only run.yaml and metrics.jsonl are
read, so runs that still train can be compared, too.

The page holds the tables and the curves over each other in one file, and needs no network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import files, paths
from trainer.config.options import exit_with, option, parse, places
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    family: Path | None = option(
        "compare a run with the cooldowns that branched off it",
        None,
        value="RUN",
        reads=paths.folder_fault,
    )
    out: Path | None = option(
        "the page; null writes none", Path("compare.html"), value="compare.html", writes=True
    )
    markdown: Path | None = option("write the tables as Markdown", None, value="FILE", writes=True)
    json: Path | None = option("write the numbers as JSON", None, value="FILE", writes=True)
    runs: tuple[str, ...] = places("run folders, or folders of runs", "FOLDER ...")

    def faults(self) -> Iterator[str]:
        """Yield what does not go together, and folders that hold no run."""
        if not self.runs and self.family is None:
            yield "missing: the run folders to compare, as graft compare runs/a runs/b"
        if self.out is not None and (fault := files.output_fault(self.out)) is not None:
            yield f"out={self.out}: {fault}"
        for place in map(Path, self.runs):
            if not place.is_dir():
                yield f"{place}: {paths.run_fault(place)}"
            elif not (place / "run.yaml").exists() and not any(place.glob("*/run.yaml")):
                yield f"{place}: no run folder, and no folder of runs: there is no run.yaml"
            elif (place / "run.yaml").exists() and (fault := paths.run_fault(place)):
                yield f"{place}: {fault}"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft compare")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from trainer.evaluation.run_summary import folders, summary
    from trainer.session import branches, compared, failures
    from trainer.storage import atomic

    try:
        places = [run for name in options.runs for run in folders(Path(name).expanduser())]
        if options.family is not None:
            places += branches.with_branches(options.family)
        unique = {place.resolve(): place for place in places}
        groups = compared.grouped([summary(place) for place in unique.values()])
        tables = {"Results": compared.results_table(groups)}
        if (settings := compared.settings_table(groups)) is not None:
            tables = {"Settings that differ": settings} | tables
        for table in tables.values():
            table.show()
        if options.markdown is not None:
            text = "\n".join(f"## {name}\n\n{table.markdown()}" for name, table in tables.items())
            atomic.write_output(options.markdown, text)
        if options.json is not None:
            text = json.dumps(compared.as_json(groups), indent=2, ensure_ascii=False)
            atomic.write_output(options.json, text + "\n")
        if options.out is not None:
            compared.write(groups, options.out)
            say(options.out)
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


if __name__ == "__main__":
    exit_with(main)
