"""Queue a run as a SLURM job, after checking its config here.

    graft submit experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...] [slurm.KEY=VALUE ...] [OPTIONS]

Every config that can be trained can be submitted. The job requests lightning.num_nodes nodes with
lightning.devices processes each.

With --multirun, several values of a key, separated by commas, become an array of jobs with one task
for each combination; slurm.parallel=N runs N of them at once.

The run is named by the job, RUNS/NAME-JOB, and resumes there when the job is requeued. Script and
log are in RUNS/slurm.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import ConfigError, bad, explain
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.overrides import is_override
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    dry: bool = option("print the script and queue nothing", False)
    slurm: str | None = option(
        "your own YAML file with settings of conf/slurm.yaml", None, value="FILE"
    )
    config_dir: Path | None = option(
        "a folder with your own experiments", None, key="--config-dir", value="FOLDER"
    )
    slurm_settings: tuple[str, ...] = rest(
        "settings of conf/slurm.yaml: partition, time, memory ...",
        "slurm.KEY=VALUE",
        lambda key: key.lstrip("+").startswith("slurm."),
    )
    overrides: tuple[str, ...] = rest("the run's config", "KEY=VALUE", is_override)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if self.config_dir is not None and not self.config_dir.is_dir():
            yield f"--config-dir={self.config_dir}: {self.config_dir.absolute()} is no folder"
        for word in self.overrides:
            if re.match(r"\W*hydra\b", word):
                yield f"{word}: the job has its folder and its launcher from SLURM"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    words = [word for word in argv if word not in ("--multirun", "-m")]
    options = parse(Options, _joined(words), __doc__, "graft submit")
    from trainer.cluster.batch_file import submit
    from trainer.cluster.submission import prepare, slurm_settings

    folder = str(options.config_dir.absolute()) if options.config_dir is not None else None
    try:
        slurm = slurm_settings(options.slurm_settings, options.slurm)
        job = prepare(options.overrides, slurm, folder, sweep=len(words) < len(argv))
        if options.dry:
            say(job.script, end="")
            return 0
        for fault in job.missing:  # the nodes of the job may have another disk
            say(f"warning: on this machine {fault}", file=sys.stderr)
        number, file = submit(job.script, job.name, job.logs)
    except (ConfigError, OSError) as error:
        return bad(f"graft submit --help shows the options\n{explain(error)}")
    task = "-TASK" if job.array else ""
    say(f"job {number}")
    say(f"run:              {job.run}{f'-{number}{task}' if job.numbered else ''}")
    say(f"script:           {file}")
    say(
        f"watch:            tail -F {job.logs / f'{job.name}-{number}{task}.log'}, squeue"
        f" --job={number}"
    )
    say(f"save and requeue: scancel --signal=USR1 {number}")
    say(f"cancel:           scancel {number}")
    return 0


def _joined(words: list[str]) -> list[str]:
    """Join Hydra's `--config-dir FOLDER` and `-cd FOLDER` to one word, as options are read."""
    result: list[str] = []
    for word in words:
        if result and result[-1] in ("--config-dir", "-cd"):
            result[-1] = f"--config-dir={word}"
        else:
            result.append(re.sub(r"^-cd=", "--config-dir=", word))
    return result


if __name__ == "__main__":
    exit_with(main)
