"""Runs of the program as processes, for measurements."""

from __future__ import annotations

import json
import os
import subprocess
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


def trained_parameters(folder: Path) -> int:
    """Return preflight's number of trained parameters."""
    return json.loads((folder / "preflight.json").read_text())["model"]["trainable"]
