"""The folder of a run, from its name and the SLURM job."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import files, limits
from trainer.config.errors import ConfigError


def run_folder(runs: str, name: str, resume: str) -> str:
    """Return the run's folder.

    With resume=never it is the first of RUNS/NAME, NAME-2, NAME-3 ... that holds no run; with
    resume=auto the newest of them that holds one; with resume=FOLDER that folder.

    Raises:
        ConfigError: the name cannot be a folder's, or FOLDER holds no run.
    """
    if resume not in ("never", "auto"):
        if not any((Path(resume) / file).exists() for file in ("run.yaml", "multirun.yaml")):
            raise ConfigError(
                f"resume={resume}: that folder holds no run. Give one that does, or auto, or never"
            )
        return resume
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"name is {name!r}. A run's name has at most 100 letters, digits, '.', '_' and '-', and"
            " starts with a letter or digit"
        )
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    # torchrun or srun started this rank. Rank 0 decides on the folder later; Hydra needs one now.
    if rank != "0":
        return str(Path(tempfile.gettempdir()) / f"graft-{os.getpid()}-rank-{rank}")
    candidate, newest, number = Path(runs) / name, None, 2
    while (candidate / "run.yaml").exists() or (candidate / "multirun.yaml").exists():
        newest, candidate, number = candidate, Path(runs) / f"{name}-{number}", number + 1
    if newest is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        # A requeued job runs the same command again. The newest folder is its run's if it has the
        # job's id.
        try:
            if files.read_text(newest / "job", 1024).strip() == job():
                return str(newest)
        except (OSError, ValueError):  # none, or damaged: not this job's
            pass
    return str(newest if resume == "auto" and newest else candidate)


def _run_folder(plain: dict[str, Any], written: bool) -> Iterator[str]:
    """Faults of the run's folder; whether this process is going to write there."""
    try:
        folder = Path(run_folder(plain["runs"], plain["name"], plain["resume"]))
    except ConfigError as error:
        yield str(error)
        return
    # Hydra opens the log there before the run checks its folder.
    if written and (fault := limits.strange_entry(folder, "wandb")) is not None:
        yield fault


def job() -> str | None:
    """Return the id of this process's batch job in scontrol's form: JOB, or ARRAY_TASK. None
    outside a job, and in an interactive shell of salloc or srun --pty, which is never requeued."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else number
