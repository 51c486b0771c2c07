"""Runs of the program as processes, for measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(command: list[str]) -> int:
    """Run a command, and return its peak resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(
                f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-4000:]}"
            )
    return usage.ru_maxrss * 1024


def worker(
    module: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a benchmark's module in a new process, with this command line, `--worker` and
    `arguments`. Exits with the end of its output if it fails."""
    command = [sys.executable, "-m", module, *sys.argv[1:], "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with"
            f" {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done


def worker_arguments() -> list[str] | None:
    """Return the words after `--worker`, or None if this process is no worker."""
    return sys.argv[sys.argv.index("--worker") + 1 :] if "--worker" in sys.argv else None


def trained_parameters(folder: Path) -> int:
    """Return preflight's number of trained parameters."""
    return json.loads((folder / "preflight.json").read_text())["model"]["trainable"]
