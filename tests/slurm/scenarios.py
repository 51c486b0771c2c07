"""What happens to jobs. Each scenario submits its own, does something to it, and returns what was
seen in the end."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from typing import Any

from tests.conftest import ROOT
from tests.slurm.cluster import CPUS, wait
from tests.slurm.conftest import STEPS, Lab, step_of

# The longest first.
ORDER = [
    "time_limit",
    "interrupted_three_times",
    "launcher",
    "two_nodes",
    "preempted",
    "node_crash",
    "queued_again",
    "array",
    "alone",
    "cancelled",
    "mistaken",
    "other_tasks",
]


def alone(lab: Lab) -> dict[str, Any]:
    """A run that nobody disturbs."""
    job = lab.submit("slurm.gpus=1", "slurm.memory=500M", "slurm.extra=[--comment='some words']")
    return lab.ended(job) | {"record": lab.cluster.ask("scontrol", "show", "job", job)}


def time_limit(lab: Lab) -> dict[str, Any]:
    """A limit that comes in the middle of training. It is set after the first steps and lifted when
    it has come: on a busy machine a start alone may take longer than a short limit."""
    job = lab.submit("slurm.time=60", "slurm.signal_before=40", pause=2)
    lab.reached(job, 2)
    minutes = (lab.cluster.seconds(job) + 50 + 59) // 60
    lab.cluster.ask("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    wait(lambda: int(lab.cluster.job(job)["Restarts"]), 240, lambda: lab.log(job))
    lab.cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=60")
    return lab.ended(job)


def interrupted_three_times(lab: Lab) -> dict[str, Any]:
    """SIGUSR1 in the middle of training, three times."""
    job = lab.submit(pause=0.2)
    at = []
    for _ in range(3):
        lab.reached(job, lab.step(job) + 4)
        lab.cluster.ask("scancel", "--signal=USR1", job)
        wait(lambda: lab.cluster.state(job) != "RUNNING", 60, lambda: lab.log(job))
        at.append(lab.step(job))
    return lab.ended(job) | {"at": at}


def preempted(lab: Lab) -> dict[str, Any]:
    """A job of a higher tier wants the node."""
    job = lab.submit(f"slurm.cpus_per_task={CPUS}", partition="low", pause=0.5)
    lab.reached(job, 6)
    other = lab.cluster.ask(
        "sbatch",
        "--parsable",
        "--partition=high",
        f"--cpus-per-task={CPUS}",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )
    states = []

    def gave_way() -> bool:
        states.append(lab.cluster.state(job))
        return lab.cluster.state(other) == "COMPLETED"

    wait(gave_way, 120, lambda: f"{set(states)}\n{lab.cluster.job(other)}\n{lab.log(job)}")
    return lab.ended(job) | {"states": states, "at": lab.step(job)}


def queued_again(lab: Lab) -> dict[str, Any]:
    """`scontrol requeue` by somebody: SIGTERM, and SIGKILL after KillWait."""
    job = lab.submit("slurm.exclude=n4", partition="frail", pause=0.5)
    lab.reached(job, 6)
    lab.cluster.ask("scontrol", "requeue", job)
    wait(lambda: lab.cluster.state(job) != "RUNNING", 60)
    return lab.ended(job)


def node_crash(lab: Lab) -> dict[str, Any]:
    """The node of a job dies without a word."""
    job = lab.submit("slurm.exclude=n5", partition="frail", pause=0.5)
    lab.reached(job, 12)
    lab.cluster.crash("n4")
    lab.cluster.ask("scontrol", "update", f"jobid={job}", "ExcNodeList=")
    return lab.ended(job)


def cancelled(lab: Lab) -> dict[str, Any]:
    """`scancel`, which means it."""
    job = lab.submit("slurm.exclude=n4", partition="frail", pause=0.5)
    lab.reached(job, 3)
    lab.cluster.ask("scancel", job)
    return lab.ended(job)


def two_nodes(lab: Lab) -> dict[str, Any]:
    """A process on each of two nodes, interrupted once."""
    job = lab.submit("lightning.num_nodes=2", pause=0.3)
    lab.reached(job, 5)
    lab.cluster.ask("scancel", "--signal=USR1", job)
    wait(lambda: lab.cluster.state(job) != "RUNNING", 60, lambda: lab.log(job))
    at = lab.step(job)
    return lab.ended(job) | {"at": at}


def array(lab: Lab) -> dict[str, Any]:
    """Three tasks, two at once."""
    job = lab.submit("--multirun", "seed=0,1,2", "slurm.parallel=2", "slurm.partition=usual")
    most = 0

    def over() -> bool:
        nonlocal most
        states = [lab.cluster.state(f"{job}_{task}") for task in range(3)]
        most = max(most, states.count("RUNNING"))
        return all(state in ("COMPLETED", "FAILED") for state in states)

    wait(over, 400, lambda: f"{[lab.cluster.job(f'{job}_{task}') for task in range(3)]}")
    return {
        "states": [lab.cluster.state(f"{job}_{task}") for task in range(3)],
        "most": most,
        "job": job,
    }


def mistaken(lab: Lab) -> dict[str, Any]:
    """Two processes that both find, with the model loaded, that they cannot train; the second one
    sooner."""
    setup = "slurm.setup=[export MASTER_ADDR=127.0.0.1, export LATE=2]"
    return lab.ended(lab.submit("lightning.num_nodes=2", "adapter.target_modules=[nowhere]", setup))


def other_tasks(lab: Lab) -> dict[str, Any]:
    """A template by hand, with more tasks than the run has processes."""
    (lab.folder / "runs/slurm").mkdir(parents=True, exist_ok=True)
    job = lab.cluster.ask(
        "sbatch",
        "--parsable",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--job-name=smoke",
        f"--chdir={lab.folder}",
        f"--output={lab.folder}/runs/slurm/smoke-%j.log",
        f"--export=ALL,PYTHON={sys.executable},PYTHONPATH={ROOT}",
        f"{ROOT}/trainer/cluster/job.sbatch",
        "+experiment=smoke",
        "task.path=rows.jsonl",
        "lightning=cpu",
    )
    return lab.ended(job)


def launcher(lab: Lab) -> dict[str, Any]:
    """A sweep by Hydra's launcher, whose tasks get submitit's signal."""
    command = [
        sys.executable,
        "-m",
        "trainer",
        "--multirun",
        "hydra/launcher=slurm",
        "+experiment=smoke",
        "task.path=rows.jsonl",
        "lightning=cpu",
        f"max_steps={STEPS}",
        "precision=fp32",
        "threads=1",
        "seed=0,1",
        "name=swept",
        "hydra.launcher.cpus_per_task=1",
        "callbacks.checkpoints.every=5",
    ]
    going = subprocess.Popen(
        command,
        cwd=lab.folder,
        env=lab.environment | {"PAUSE": "0.3"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        folder = lab.folder / "runs/swept-sweep"
        for task in (0, 1):
            wait(
                lambda task=task: going.poll() is not None or step_of(folder / str(task)) >= 4, 300
            )
        job = next((path.name.partition("_")[0] for path in folder.glob(".submitit/*_0")), "")
        if not job:
            return {"code": going.wait(), "said": going.stdout.read()}
        for task in (f"{job}_0", f"{job}_1"):
            lab.cluster.ask("scancel", "--signal=USR2", task)
        ended = [lab.cluster.ended(task) for task in (f"{job}_0", f"{job}_1")]
        said, _ = going.communicate(timeout=60)
    finally:
        going.kill()
    logs = [
        (folder / f".submitit/{job}_{task}/{job}_{task}_0_log.out").read_text() for task in (0, 1)
    ]
    files = [folder / str(task) / "adapter/adapter_model.safetensors" for task in (0, 1)]
    results = [sha256(file.read_bytes()).hexdigest() if file.exists() else None for file in files]
    return {
        "code": going.returncode,
        "said": said,
        "logs": logs,
        "results": results,
        "states": [job["JobState"] for job in ended],
    }
