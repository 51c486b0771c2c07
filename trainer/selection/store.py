"""Numbers of each row on disk, which a run that was stopped continues.

features.f32   (n, d) float32, row after row; memory-mapped, so that memory does not grow with n
state.json     what the numbers are of, and how many rows are done; written after they are
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import files
from trainer.storage import atomic
from trainer.storage.progress import Progress

SAVED = 64  # rows between two saves
BLOCK = 8192  # rows in memory at once


class Store:
    """The numbers of n rows, d of each. Those of another `identity` are dropped."""

    def __init__(self, folder: Path, n: int, d: int, identity: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.n, self.d = n, d
        self.file, self.state = folder / "features.f32", folder / "state.json"
        self.identity = identity | {"rows": n, "numbers": d}
        self.done = self._done()
        if not self.done:
            self.state.unlink(missing_ok=True)
            self.file.unlink(missing_ok=True)
            with files.append(self.file) as stream:
                stream.truncate(4 * n * d)

    def _done(self) -> int:
        try:
            state = json.loads(self.state.read_text("utf-8"))
            whole = self.file.stat().st_size == 4 * self.n * self.d
            return int(state["done"]) if whole and state["identity"] == self.identity else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def fill(self, what: str, number: Callable[[int], np.ndarray]) -> None:
        """Compute the numbers of the rows that are not done, (d,) float32 each."""
        with Progress(what, self.n, "rows", done=self.done) as progress:
            while self.done < self.n:
                end = min(self.n, self.done + SAVED)
                rows = np.empty((end - self.done, self.d), np.float32)
                for at in range(self.done, end):
                    rows[at - self.done] = number(at)
                    progress.advance()
                self._write(self.done, rows)
                self.done = end
                state = {"identity": self.identity, "done": end}
                atomic.write_text(self.state, json.dumps(state) + "\n")

    def _write(self, first: int, rows: np.ndarray) -> None:
        with files.edit(self.file) as stream:
            stream.seek(4 * self.d * first)
            stream.write(rows.astype("<f4").tobytes())
            stream.flush()
            os.fsync(stream.fileno())

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, numbers of BLOCK rows (b, d) float64)."""
        memory = np.memmap(self.file, "<f4", "r", shape=(self.n, self.d))
        for first in range(0, self.n, BLOCK):
            yield first, np.asarray(memory[first : first + BLOCK], np.float64)
