"""The batch file of a SLURM job: write its text, and submit it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.config import files
from trainer.config.errors import ConfigError
from trainer.config.shown import say

TEMPLATE = Path(__file__).with_name("job.sbatch")


def script(
    name: str,
    logs: Path,
    slurm: dict[str, Any],
    needs: dict[str, Any],
    arguments: list[str],
    per_task: list[list[str]],
) -> str:
    """Return the text of the batch file.

    `arguments` are those of all tasks, `per_task` the further ones of each task of an array.
    """
    array = len(per_task) > 1 or bool(per_task[0])
    gpus = f"{slurm['gpu_type']}:{needs['gpus']}" if slurm["gpu_type"] else needs["gpus"]
    limit = f"%{slurm['parallel']}" if slurm["parallel"] is not None else ""
    log = str(logs).replace("%", "%%") + f"/{name}-" + ("%A-%a.log" if array else "%j.log")
    options: dict[str, Any] = {
        "job-name": name,
        "output": log,
        "open-mode": "append",
        "chdir": Path.cwd(),
        "array": f"0-{len(per_task) - 1}{limit}" if array else None,
        "nodes": needs["nodes"],
        "ntasks-per-node": needs["tasks"],
        "cpus-per-task": slurm["cpus_per_task"],
        "gpus-per-node": gpus if needs["gpus"] else None,
        "mem": slurm["memory"],
        "time": slurm["time"],
        "partition": slurm["partition"],
        "account": slurm["account"],
        "qos": slurm["qos"],
        "constraint": slurm["constraint"],
        "exclude": slurm["exclude"],
        "mail-user": slurm["mail"],
        "mail-type": "END,FAIL,REQUEUE" if slurm["mail"] else None,
        "signal": f"USR1@{slurm['signal_before']}",
    }
    lines = [
        f"#SBATCH --{key}={_option(str(value))}"
        for key, value in options.items()
        if value is not None
    ]
    lines.append("#SBATCH --requeue" if needs["requeue"] else "#SBATCH --no-requeue")
    lines += [f"#SBATCH {option}" for option in slurm["extra"]]
    head, _, body = TEMPLATE.read_text("utf-8").rpartition("#SBATCH ")
    interpreter = head.splitlines()[0]
    text = [
        interpreter,
        *lines,
        *slurm["setup"],
        f"PYTHON={shlex.quote(slurm['python'] or sys.executable)}",
        f"set -- {shlex.join(arguments)}",
    ]
    if array:
        tasks = [f'    {i}) set -- "$@" {shlex.join(words)} ;;' for i, words in enumerate(per_task)]
        text += ['case "$SLURM_ARRAY_TASK_ID" in', *tasks, "esac"]
    return "\n".join(text) + "\n" + body.partition("\n")[2]


def _option(value: str) -> str:
    """Quote a value as sbatch reads it from a line of the file."""
    return (
        value
        if re.fullmatch(r"[\w@%+=:,./\[\]&|*!^-]*", value)
        else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    )


def submit(text: str, name: str, logs: Path) -> tuple[str, Path]:
    """Write the batch file and submit it. Return the job's number and the file.

    Raises:
        ConfigError: there is no SLURM here, or it refused the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch was not found: submit on a machine of the cluster. dry=true prints the script"
            " without it"
        )
    logs.mkdir(parents=True, exist_ok=True)
    # The file is named by the job's number, which sbatch returns.
    unnamed = logs / f"{name}-{os.getpid()}.part"
    unnamed.unlink(missing_ok=True)
    with os.fdopen(files.create(unnamed), "w", encoding="utf-8") as stream:
        stream.write(text)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(unnamed)], capture_output=True, text=True
        )
        if done.returncode:
            raise ConfigError(
                f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}"
            )
        say(done.stderr, end="", file=sys.stderr)
        job = done.stdout.strip().partition(";")[0]
        return job, unnamed.rename(logs / f"{name}-{job}.sbatch")
    finally:
        unnamed.unlink(missing_ok=True)
