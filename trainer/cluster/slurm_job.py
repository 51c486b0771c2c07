"""The SLURM job around a run: whether it is one, how long it has, and how it comes back after a
signal has stopped it.

SIGUSR1, SIGUSR2 and SIGTERM end in a saved run (trainer.cluster.signals). In a job it is put into
the queue again then, under the same job id, so that it finds its folder: RUN/job holds the id. A
job that saves at a pre-emption and ends with 0 would count as done and never come back; so the exit
code is 75 (EX_TEMPFAIL), and `scontrol requeue` is asked before.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from trainer.config.run_name import job

log = logging.getLogger("trainer")

EXIT_REQUEUED = 75  # sysexits.h's EX_TEMPFAIL: saved, and in the queue again
WAIT_FOR_RANK0_S = 5  # seconds
MAX_STARTS_WITHOUT_PROGRESS = 3  # starts in a row that may gain no step


class Stopped(RuntimeError):
    """A signal ended the run. `step` is the last one that is saved in `folder`, None where there is
    none; `steps` are the planned ones, None where their number is not known."""

    def __init__(self, number: int, folder: Path, step: int | None, steps: int | None):
        name = signal.Signals(number).name
        saved = (
            f"saved after step {step}" + (f" of {steps}" if steps is not None else "")
            if step is not None
            else "stopped before anything was trained that could be saved"
        )
        super().__init__(f"{name}: {saved}. Go on with resume={folder}")
        self.number, self.folder, self.step = number, folder, step


def first_process() -> bool:
    """Whether this is the first of the run's processes, as torchrun, srun and Lightning number
    them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def has_several_ranks() -> bool:
    """Whether srun has started several processes, so that it ends all with SIGTERM when one leaves
    with an error. Its exit code is the highest of theirs."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def exit_1_on_sigterm() -> None:
    """Let SIGTERM end this process with 1 from now on, below the code of the process that has found
    what is wrong: for as long as there is nothing to save, it would be 143 for a mistake in the
    config."""
    if has_several_ranks():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))


def wait_for_rank0(code: object) -> None:
    """Before a process leaves with an error: the first one has found the same, tells of it, and
    must not take the end of this one for a wish of SLURM's to have the run stopped and queued
    again."""
    if has_several_ranks() and not first_process() and code not in (None, 0):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(WAIT_FOR_RANK0_S)


def about(number: str) -> dict[str, str]:
    """What `scontrol show job` tells, {} where it cannot be asked."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", number], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (word.partition("=") for word in shown.stdout.split() if "=" in word)
    return {key: value for key, _, value in pairs} if shown.returncode == 0 else {}


def end_time() -> float | None:
    """When the job's time is up, in seconds since the epoch; None outside a job, and for one
    without a limit."""
    if (told := os.environ.get("SLURM_JOB_END_TIME")) is not None:
        return float(told)
    number = job()
    text = about(number).get("EndTime", "") if number is not None else ""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # Unknown
        return None


def other_tasks(settings: dict[str, Any]) -> str | None:
    """What is wrong where the processes that conf/lightning asks for are not the tasks that srun
    has started: with fewer, each task would train alone and take itself for the first; with more,
    they would wait for those who never come.
    """
    devices, nodes = settings["devices"], settings["num_nodes"]
    if (
        job() is None
        or "TORCHELASTIC_RUN_ID" in os.environ
        or "LOCAL_RANK" in os.environ
        or devices in ("auto", -1, "-1")
    ):
        return None
    wanted = nodes * (len(devices) if isinstance(devices, list) else int(devices))
    step = "SLURM_STEP_NUM_TASKS" in os.environ  # srun sets it, sbatch does not
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"]) if step else 1
    if tasks == wanted:
        return None
    asked = f"lightning.devices={devices} lightning.num_nodes={nodes} are {wanted} processes"
    if not step:
        return (
            f"{asked}, and this SLURM job has started one without srun: it would wait for the"
            f" others for ever. Start it with srun, in a job of --nodes={nodes}"
            f" --ntasks-per-node={wanted // nodes}, as python -m trainer.submit does"
        )
    return (
        f"{asked}, and srun has started {tasks}. Ask for as many: --nodes={nodes}"
        f" --ntasks-per-node={wanted // nodes}, or set lightning.devices to the tasks of a node and"
        " lightning.num_nodes to the nodes"
    )


def exit_code(settings: dict[str, Any], number: int, folder: Path | None, step: int | None) -> int:
    """Ask for the job to be queued again, if it is one that may be, and return the process's exit
    code: 75 then, else 128 + signal.

    `settings` holds `requeue` and `max_requeues`, `step` is the last one saved in `folder`, None
    where the run had not come to its first.
    """
    name = job()
    if name is None or number == signal.SIGINT or settings["requeue"] is False:
        return 128 + number
    if not first_process():
        return 1  # the first one asks; srun's code is the highest, which is that one's
    refused = _refused(settings, about(name), folder, step)
    if refused is None:
        asked = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True)
        refused = (
            asked.stderr.strip() or f"scontrol ended with {asked.returncode}"
            if asked.returncode
            else None
        )
    if refused is not None:
        log.warning("SLURM job %s is not put into the queue again: %s", name, refused)
        return 128 + number
    log.warning("SLURM job %s is in the queue again", name)
    return EXIT_REQUEUED


def _refused(
    settings: dict[str, Any], found: dict[str, str], folder: Path | None, step: int | None
) -> str | None:
    """Why a job is not asked back, if there is a reason."""
    state = found.get("JobState", "unknown")
    if state not in ("RUNNING", "unknown"):
        return (
            f"its state is {state}: somebody has cancelled it or queued it again, or its time is up"
        )
    if settings["requeue"] == "auto" and found.get("Requeue") == "0":
        return "it was submitted without --requeue (requeue=true asks all the same)"
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= settings["max_requeues"]:
        return f"it was {restarts} times already (max_requeues={settings['max_requeues']})"
    if folder is None:
        return None
    file = folder / "requeues.jsonl"
    earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if len(earlier) >= MAX_STARTS_WITHOUT_PROGRESS and all(
        row["step"] == step for row in earlier[-MAX_STARTS_WITHOUT_PROGRESS:]
    ):
        return (
            f"its last {MAX_STARTS_WITHOUT_PROGRESS} starts have gained no step beyond {step}. Give it more time, or"
            " fewer steps between signals"
        )
    with file.open("a") as out:
        out.write(
            json.dumps({"time": time.time(), "job": job(), "step": step, "restarts": restarts})
            + "\n"
        )
    return None
