"""The process in which queries of strangers run: with limits on time and memory, without this
process's environment, files and modules."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from tasks import databases
from tasks.databases import Schema


class _Process:
    """A child that compares queries, started when it is first needed and again after it ended."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None
        self.owner = 0  # a forked process must not share the pipes
        self.lock = threading.Lock()

    def ask(self, question: str) -> str:
        """Return the child's answer, "" if it came to its limits."""
        with self.lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(question + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
            except OSError:  # it ended while it read
                answer = ""
            if not answer:
                self.end()
            return answer

    def _running(self) -> subprocess.Popen[str]:
        if self.child is None or self.owner != os.getpid():
            self.owner = os.getpid()
            # -I: neither the current folder nor PYTHON* variables are looked at
            self.child = subprocess.Popen(
                [sys.executable, "-I", str(Path(databases.__file__)), str(databases.SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={},
                cwd="/",
            )
        return self.child

    def end(self) -> None:
        """End the child, if there is one of this process."""
        child, self.child = self.child, None
        if child is not None and self.owner == os.getpid():
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            child.wait()


_process = _Process()
atexit.register(_process.end)


def same_result(query: str, reference: str, tables: Schema) -> bool:
    """Return what `databases.same_result` does, False also if a query takes too long or needs too
    much memory."""
    return _process.ask(json.dumps([query, reference, tables])) == "true\n"
