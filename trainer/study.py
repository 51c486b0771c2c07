"""Compare methods, rates and seeds at equal parameters, and write the table.

    graft study FILE.yaml|NAME [OPTIONS] [study.KEY=VALUE ...] [KEY=VALUE ...]

The file lists methods, rates, seeds and data (docs/studies.md). NAME is one of Graft's own studies.
Ranks and densities are solved for the same number of trained parameters. Each method's rate is
searched on validation rows, beyond the listed rates while the best is the first or the last. Then
the chosen rate runs with each seed. The table has the losses and grades on the test rows.

It can be stopped at any time and resumes with the same command. Further seeds, rates and methods
add runs and repeat none. A run that fails does not end the study.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import EXIT_BAD_INPUT, bad
from trainer.config.options import INTERRUPTED, exit_with, option, parse, rest
from trainer.config.overrides import is_override
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The command line's options."""

    file: str = option("the study's file, or a name", value="FILE.yaml|NAME")
    parallel: int = option("runs at once", 1, at_least=1)
    threads: int | None = option("CPU threads of each run", None, at_least=1)
    gpus: str | None = option("GPUs that runs take turns in using", None, value="0,1")
    minutes: float | None = option("start no run after this time", None, above=0)
    retry: bool = option("run failed runs again", False)
    dry: bool = option("print the runs that can start, and run nothing", False)
    table: bool = option("write the table from what there is, and run nothing", False)
    submit: bool = option("queue the runs as an array of SLURM jobs", False)
    board: Path | None = option(
        "write result files in the format of PEFT's board", None, value="FOLDER"
    )
    piece: str | None = option("the one run to do, as a job names it", None, value="KEY")
    changes: tuple[str, ...] = rest(
        "other values of the file's keys", "study.KEY=VALUE", lambda key: key.startswith("study.")
    )
    slurm: tuple[str, ...] = rest(
        "settings of conf/slurm.yaml", "slurm.KEY=VALUE", lambda key: key.startswith("slurm.")
    )
    overrides: tuple[str, ...] = rest("settings of all runs", "KEY=VALUE", is_override)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        from trainer.studies.plan import file_fault

        if fault := file_fault(self.file):
            yield f"{self.file}: {fault}"
        if self.slurm and not self.submit:
            yield f"{self.slurm[0]}: settings of SLURM need submit=true"
        gpus = [gpu for gpu in (self.gpus or "").split(",") if gpu]
        if gpus and self.parallel > len(gpus):
            yield f"parallel={self.parallel}: {len(gpus)} GPUs have room for as many runs"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    words = [f"file={argv[0]}", *argv[1:]] if argv and "=" not in argv[0] else argv
    if words and words[0].startswith("file=-"):
        words = argv
    options = parse(Options, words, __doc__, "graft study")
    from trainer.config.errors import ConfigError

    try:
        study = _read(options)
    except (ConfigError, OSError) as error:
        return bad(f"graft study --help shows the options\n{error}")
    from trainer.assembly import quiet
    from trainer.session import failures

    quiet.quiet()
    try:
        return _run(options, study, words)
    except Exception as error:
        return failures.report_and_exit_code(error)


def _read(options: Options) -> Any:
    """Read the study's file with the changes of the command line."""
    import yaml

    from trainer.config import limits
    from trainer.config.errors import ConfigError
    from trainer.config.limits import LOADER
    from trainer.studies import plan

    changes: dict[str, Any] = {}
    for word in options.changes:
        key, _, value = word.removeprefix("study.").partition("=")
        try:
            limits.refuse_bomb(value, word)
            changes[key] = yaml.load(value, Loader=LOADER)
        except Exception as error:
            raise ConfigError(f"{word}: {error}") from None
    overrides = [word for word in options.overrides if word != "resume=auto"]
    return plan.read(options.file, changes, overrides)


def _run(options: Options, study: Any, words: list[str]) -> int:
    """Check the study, run what is missing, and write its table."""
    from trainer.config.errors import ConfigError
    from trainer.studies import board, budget, jobs, page, pieces, running

    say(f"study {study.name}: checking {len(study.methods)} methods", flush=True)
    study = budget.solve(study)
    for name, count in study.counts.items():
        solved = f", {' '.join(study.solved[name])}" if study.solved[name] else ""
        say(f"  {name}: {'unknown' if count is None else f'{count:,}'} trained{solved}", flush=True)
    results = pieces.load(study)
    if options.piece is not None:
        runner = running.Runner(study, threads=options.threads)
        return int(runner.one(jobs.of_key(study, options.piece), results).get("failed", 0))
    if options.retry and not options.dry:
        running.forget_failures(study, results, Path.unlink)
    if options.submit:
        others = [w for w in words if w.partition("=")[0] not in ("submit", "dry", "retry")]
        others = [word for word in others if not word.startswith("slurm.")]
        message = jobs.queue(study, results, others, list(options.slurm), options.dry)
        if message is not None:
            say(message, flush=True)
            return 0
    elif options.dry:
        for piece in pieces.missing(study, results):
            say(page.next_command(study, piece, results))
        return 0
    elif not options.table:
        gpus = [gpu for gpu in (options.gpus or "").split(",") if gpu]
        parallel = max(options.parallel, len(gpus))
        runner = running.Runner(study, parallel, options.threads, gpus, options.minutes)
        with running.locked(study.folder):
            runner.run(results)
        if runner.stopping:
            say("stopped: the same command resumes the study", file=sys.stderr)
            return INTERRUPTED
    elif not results:
        raise ConfigError(f"table=true: no run of this study has ended in {study.folder} yet")
    say(page.write(study, results))
    say(f"{study.folder / 'study.html'}")
    if options.board is not None:
        for file in board.write(study, results, options.board):
            say(file)
    failed = [key for key, result in results.items() if "failed" in result]
    if failed:
        say(f"{len(failed)} runs failed, such as {failed[0]}: retry=true runs them again")
    return EXIT_BAD_INPUT if failed and len(failed) == len(results) else 0


if __name__ == "__main__":
    exit_with(main)
