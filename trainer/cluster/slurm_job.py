"""The SLURM job of a run: its id, its end time, and its requeueing after a signal.

SIGUSR1, SIGUSR2 and SIGTERM end in a saved run (trainer.cluster.signals). A job is then requeued
under the same job id, so that it finds its folder: RUN/job holds the id. A job that saves at a
pre-emption and exits with 0 would count as completed and would not be requeued. So it calls
`scontrol requeue` and exits with 75 (EX_TEMPFAIL).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.config import files
from trainer.config.run_name import job

log = logging.getLogger("trainer")

EXIT_REQUEUED = 75  # sysexits.h's EX_TEMPFAIL: saved, and requeued
WAIT_FOR_RANK0_S = 5
LARGEST = 64 << 20  # bytes of requeues.jsonl
MAX_STARTS_WITHOUT_PROGRESS = 3  # starts in a row that trained no further step


class Stopped(RuntimeError):
    """A signal ended the run. `step` is the last one that is saved in `folder`, or None. `steps`
    are the planned ones, or None if their number is unknown."""

    def __init__(self, number: int, folder: Path, step: int | None, steps: int | None):
        name = signal.Signals(number).name
        saved = (
            f"saved after step {step}" + (f" of {steps}" if steps is not None else "")
            if step is not None
            else "stopped before anything was trained that could be saved"
        )
        super().__init__(f"{name}: {saved}. Resume with resume={folder}")
        self.number, self.folder, self.step = number, folder, step


def first_process() -> bool:
    """Return whether this process is rank 0, as torchrun, srun and Lightning number ranks."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def has_several_ranks() -> bool:
    """Return whether srun has started several ranks. When one exits with an error, srun sends
    SIGTERM to all; srun's exit code is the highest of theirs."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def exit_1_on_sigterm() -> None:
    """Until there is something to save, exit with 1 on SIGTERM, so that srun reports rank 0's exit
    code 2 for a mistake in the config, and not 143."""
    if has_several_ranks():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))


def wait_for_rank0(code: object) -> None:
    """Let rank 0 exit first after an error: the others wait 5 s, so that srun's SIGTERM does not
    reach rank 0 before it has printed the message."""
    if has_several_ranks() and not first_process() and code not in (None, 0):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(WAIT_FOR_RANK0_S)


def job_record(number: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`; {} if it cannot be called."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", number], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (word.partition("=") for word in done.stdout.split() if "=" in word)
    return {key: value for key, _, value in pairs} if done.returncode == 0 else {}


def end_time() -> float | None:
    """Return the job's end time in seconds since the epoch; None outside a job, and without a time
    limit."""
    if (end := os.environ.get("SLURM_JOB_END_TIME")) is not None:
        return float(end)
    number = job()
    text = job_record(number).get("EndTime", "") if number is not None else ""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # the text is "Unknown" if there is no limit
        return None


def task_mismatch(settings: dict[str, Any]) -> str | None:
    """Return an error message if srun has not started the processes that conf/lightning needs.

    With fewer processes than tasks, each task would train alone as rank 0. With more, the tasks
    would wait for ranks that never start.
    """
    devices, nodes = settings["devices"], settings["num_nodes"]
    if (
        job() is None
        or "TORCHELASTIC_RUN_ID" in os.environ
        or "LOCAL_RANK" in os.environ
        or devices in ("auto", -1, "-1")
    ):
        return None
    processes = nodes * (len(devices) if isinstance(devices, list) else int(devices))
    step = "SLURM_STEP_NUM_TASKS" in os.environ  # srun sets it, sbatch does not
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"]) if step else 1
    if tasks == processes:
        return None
    settings_text = (
        f"lightning.devices={devices} lightning.num_nodes={nodes} are {processes} processes"
    )
    if not step:
        return (
            f"{settings_text}, and this SLURM job has started one without srun: it would wait for"
            f" the others forever. Start it with srun, in a job of --nodes={nodes}"
            f" --ntasks-per-node={processes // nodes}, as graft submit does"
        )
    return (
        f"{settings_text}, and srun has started {tasks}. Start as many: --nodes={nodes}"
        f" --ntasks-per-node={processes // nodes}, or set lightning.devices to the tasks of a node"
        " and lightning.num_nodes to the nodes"
    )


def exit_code(settings: dict[str, Any], number: int, folder: Path | None, step: int | None) -> int:
    """Requeue the job if that is allowed. Return the process's exit code: 75 if it was requeued,
    else 128 + signal.

    `settings` holds `requeue` and `max_requeues`. `step` is the last one saved in `folder`, None if
    there is none yet.
    """
    name = job()
    if name is None or number == signal.SIGINT or settings["requeue"] is False:
        return 128 + number
    if not first_process():
        # Rank 0 requeues the job. srun's exit code is the highest of all ranks', so rank 0's.
        return 1
    reason = _no_requeue(settings, job_record(name), folder, step)
    if reason is None:
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip() or f"scontrol ended with {done.returncode}"
    if reason is not None:
        log.warning("SLURM job %s is not requeued: %s", name, reason)
        return 128 + number
    log.warning("SLURM job %s is requeued", name)
    return EXIT_REQUEUED


def _no_requeue(
    settings: dict[str, Any], record: dict[str, str], folder: Path | None, step: int | None
) -> str | None:
    """Return the reason why a job must not be requeued; None if it may be. Record this requeue in
    `folder`."""
    state = record.get("JobState", "unknown")
    if state not in ("RUNNING", "unknown"):
        return f"its state is {state}: it was cancelled or requeued by somebody, or its time is up"
    if settings["requeue"] == "auto" and record.get("Requeue") == "0":
        return "it was submitted without --requeue (requeue=true requeues it anyway)"
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= settings["max_requeues"]:
        return f"it was requeued {restarts} times already (max_requeues={settings['max_requeues']})"
    if folder is None:
        return None
    file = folder / "requeues.jsonl"
    earlier = _steps_of_requeues(file)
    if len(earlier) >= MAX_STARTS_WITHOUT_PROGRESS and all(
        before == step for before in earlier[-MAX_STARTS_WITHOUT_PROGRESS:]
    ):
        return (
            f"its last {MAX_STARTS_WITHOUT_PROGRESS} starts have trained no step beyond {step}. Set"
            " a longer time limit, or save more often"
        )
    with files.append(file) as out:
        out.write(
            json.dumps({"time": time.time(), "job": job(), "step": step, "restarts": restarts})
            + "\n"
        )
    return None


def _steps_of_requeues(file: Path) -> list[Any]:
    """The steps at which the run was requeued. Damaged lines are skipped: they must not keep a job
    from being requeued."""
    steps = []
    try:
        lines = files.read_text(file, LARGEST, errors="replace").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return steps


def exit_with_process_group(code: object) -> None:
    """Exit immediately if the process group still exists: a rank has died, and torch, which
    destroys the group as the interpreter ends, could wait for it forever."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
