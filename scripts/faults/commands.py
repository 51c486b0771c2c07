"""The kinds of runs that are not one training process: the commands, and a job of a queue."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.faults.cases import Place

WRITERS = ("export", "compress")  # commands that write a folder from a finished run
SCONTROL = """\
#!/bin/sh
sleep 0.05
case "$1" in
  show) echo "JobId=77 JobState=RUNNING Requeue=1 EndTime=Unknown" ;;
  requeue) echo "$2" >> "{log}" ;;
esac
"""


def arguments(place: Place, case: str, name: str, every: int) -> tuple[str, list[str]] | None:
    """Return (module, its arguments) of a case's command; None if the case is a training."""
    out = place.path / "answers" / name
    if case == "cooldown":
        return "trainer.cooldown", [
            f"from={place.runs / 'constant'}@9",
            "steps=10",
            f"name={name}",
            "resume=auto",
            f"callbacks.checkpoints.every={every}",
        ]
    if case == "respond":
        return "trainer.respond", [
            "base=tiny",
            f"prompts={place.rows}",
            f"out={out}",
            "max_new_tokens=12",
            "batch_size=5",
            "temperature=1",
            "precision=fp32",
        ]
    if case == "export":
        source = place.runs / "lora-alone"
        return "trainer.export", [f"run={source}", "to=merged", f"out={out}"]
    if case == "compress":
        source = place.runs / "lora-alone"
        words = [f"run={source}", "method=compeft", "alpha=auto", f"out={out}"]
        return "trainer.compress", words
    return None


def requeues(place: Place) -> Path:
    """The file in which the queue's program notes the jobs that it was asked to requeue."""
    return place.path / "requeues.log"


def queue(place: Place) -> dict[str, str]:
    """Return the environment of a SLURM job whose scontrol is a small program."""
    programs = place.path / "bin"
    programs.mkdir(exist_ok=True)
    scontrol = programs / "scontrol"
    if not scontrol.exists():
        scontrol.write_text(SCONTROL.format(log=requeues(place)))
        scontrol.chmod(0o755)
    return {"SLURM_JOB_ID": "77", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
