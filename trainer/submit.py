"""Queue a run as a SLURM job, after checking its config here.

    graft submit experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...] [slurm.KEY=VALUE ...] [OPTIONS]

Everything that starts a training is accepted here too. The job asks for lightning.num_nodes nodes
with lightning.devices processes each. With --multirun several values of a key, separated by commas,
become an array of jobs with one task for each combination, and slurm.parallel=N runs N of them at
once.

The run is named by the job, RUNS/NAME-JOB, and resumes there when the job is started again. Script
and log are in RUNS/slurm.

Options
    dry=false                     true prints the script and queues nothing
    slurm.KEY=VALUE               settings of conf/slurm.yaml: partition, time, memory ...
    slurm=FILE                    a YAML file of yours with these settings
    --multirun                    an array of jobs
    --config-dir=FOLDER           a folder with your own experiments
    KEY=VALUE                     the run's config
"""

from __future__ import annotations

from trainer.config.errors import ConfigError, bad, explain
from trainer.config.options import exit_with


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    words = [word for word in argv if word not in ("--multirun", "-m")]
    if any(word in ("-h", "--help") for word in words):
        print((__doc__ or "").strip())
        return 0
    from trainer.cluster.batch_file import submit
    from trainer.cluster.submission import prepared

    try:
        job = prepared(words, sweep=len(words) < len(argv))
        if job.dry:
            print(job.script, end="")
            return 0
        number, file = submit(job.script, job.name, job.logs)
    except (ConfigError, OSError) as error:
        return bad(f"graft submit --help shows the options\n{explain(error)}")
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
    exit_with(main)
