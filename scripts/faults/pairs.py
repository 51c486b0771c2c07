"""Two ranks of one run, each a fork of this process with the environment that torchrun gives."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from scripts.faults import warm
from scripts.faults.warm import Child, Marks

SETTINGS = (
    "lightning=cpu",
    "lightning.strategy=ddp",
    "lightning.devices=2",
    "lightning.timeout=1",
    "accumulate=1",
    "callbacks.evaluation.generate=0",
    "callbacks.evaluation.samples=0",
)
LIMIT = 120.0  # seconds in which the other rank has to end after one was killed


class Pair:
    """The same interface as Child. `kill` kills rank `target` and waits for the other one."""

    def __init__(self, ranks: list[Child]):
        self.ranks = ranks
        self.target = 0
        self.seconds = 0.0  # that the other rank took to end

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    @property
    def marks(self) -> Marks:
        return self.ranks[0].marks

    @property
    def code(self) -> int | None:
        """-9 if one was killed, else the first code that is not 0; None while one runs."""
        codes = [rank.code for rank in self.ranks]
        if None in codes:
            return None
        return -9 if -9 in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        for rank in self.ranks:
            rank.poll()
        return self.code

    def wait(self, seconds: float = 300.0, every: float = 0.01) -> int | None:
        until = time.monotonic() + seconds
        for rank in self.ranks:
            rank.wait(max(0.0, until - time.monotonic()), every)
        return self.code

    def stop(self) -> None:
        for rank in self.ranks:
            rank.stop()

    def resume(self) -> None:
        for rank in self.ranks:
            rank.resume()

    def kill(self) -> None:
        target, other = self.ranks[self.target], self.ranks[1 - self.target]
        target.kill()
        other.resume()
        began = time.monotonic()
        other.wait(LIMIT)
        self.seconds = time.monotonic() - began

    def output(self) -> str:
        return self.ranks[0].output()

    def message(self, *parts: str) -> str:
        return self.ranks[0].message(*parts)


def start(
    arguments: list[str], log: Path, environment: dict[str, str], before: Callable[[], None]
) -> Pair:
    """Start both ranks of a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment | {
        "TORCHELASTIC_RUN_ID": "faults",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return Pair(
        [
            warm.start(
                "trainer", arguments, log, shared | {"RANK": str(n), "LOCAL_RANK": str(n)}, before
            )
            for n in (0, 1)
        ]
    )
