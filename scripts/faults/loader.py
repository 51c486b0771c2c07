"""A data loading process that stops responding, or is killed: the run has to report it and exit,
and to reach the same result after a resume."""

from __future__ import annotations

import signal
import time

import psutil

from scripts.faults import cases
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

LIMIT = 60.0  # seconds in which the run has to end
FAULTS = (
    ("its process stops answering", signal.SIGSTOP),
    ("its process is killed", signal.SIGKILL),
)
SETTINGS = ("workers=1", "loading_timeout=0.05")


def inject(place: Place, ledger: Ledger) -> None:
    """Stop or kill the loading process during training."""
    for fault, number in FAULTS:
        if ledger.due("loader", "lora", fault):
            one(place, ledger, fault, number)


def one(place: Place, ledger: Ledger, fault: str, number: int) -> None:
    """Send a signal to the loading process after some steps."""
    cases.reference(place, "lora")
    name = cases.cleared(place, f"lora-loader-{fault.replace(' ', '-')}")
    child = cases.start(place, "lora", name, *SETTINGS, before=slowly)
    loader = None
    while child.poll() is None and (loader is None or child.marks.count("training") < 12):
        loader = (
            next(iter(psutil.Process(child.pid).children()), None) if child.poll() is None else None
        )
        time.sleep(0.005)
    if loader is None:
        ledger.add(
            "loader",
            "lora",
            fault,
            said=f"no loading process was seen: {child.output()[-500:]}",
            ok=False,
        )
        return
    loader.send_signal(number)
    began = time.monotonic()
    code = child.wait(LIMIT)
    seconds = time.monotonic() - began
    if loader.is_running():
        loader.kill()
    gone = cases.lost(place, name)
    message = child.message("loading process") or child.output()[-300:]
    cases.finish(cases.start(place, "lora", name, *SETTINGS))
    same = all(cases.same(place, "lora", name).values())
    ok = code == 1 and "loading process" in message and gone <= EVERY and same
    ledger.add(
        "loader",
        "lora",
        fault,
        code=code,
        seconds=round(seconds, 1),
        lost=gone,
        said=f"after {seconds:.0f} s: {message}",
        same=same,
        ok=ok,
    )


def slowly() -> None:
    """Limit prefetching: the loading process must still be at work when the signal arrives."""
    from typing import Any

    from torch.utils import data

    whole = data.DataLoader.__init__

    def short(self: Any, *args: Any, **named: Any) -> None:
        if named.get("num_workers"):
            named["prefetch_factor"] = 1
        whole(self, *args, **named)

    data.DataLoader.__init__ = short  # type: ignore[method-assign]
