"""A run as a SLURM job: the config is composed and checked here, before anything waits in a queue.

    python -m trainer.submit +experiment=NAME [KEY=VALUE ...] [slurm.KEY=VALUE ...] [slurm=FILE]
    [dry=false] [--multirun]

What stands for `python -m trainer` stands here too. The job asks for lightning.num_nodes nodes with
lightning.devices processes each. slurm.KEY=VALUE are the settings of conf/slurm.yaml (partition,
time, memory ...); slurm=FILE takes them from a YAML file of yours. dry=true prints the script and
queues nothing. With --multirun several values of a key, separated by commas, become an array of
jobs with one task for each combination, and slurm.parallel=N runs N of them at once.

The run is named by the job, RUNS/NAME-JOB, and goes on there when the job is started again. Script
and log are in RUNS/slurm.
"""

from __future__ import annotations

import sys

from trainer.cluster.submission import prepared, submit
from trainer.config.errors import ConfigError, bad, explain


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    words = [word for word in argv if word not in ("--multirun", "-m")]
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    try:
        job = prepared(words, sweep=len(words) < len(argv))
        if job.dry:
            print(job.script, end="")
            return 0
        number, file = submit(job.script, job.name, job.logs)
    except (ConfigError, OSError) as error:
        return bad(explain(error))
    task = "-TASK" if job.array else ""
    print(f"job {number}")
    print(f"run:              {job.run}{f'-{number}{task}' if job.numbered else ''}")
    print(f"script:           {file}")
    print(
        f"watch:            tail -F {job.logs / f'{job.name}-{number}{task}.log'}, squeue"
        f" --job={number}"
    )
    print(f"save and requeue: scancel --signal=USR1 {number}")
    print(f"cancel:           scancel {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
