"""A wall clock that is moved by hours while a run trains: only the displayed times may depend on
it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from scripts.faults import cases
from scripts.faults.cases import Place
from scripts.faults.ledger import Ledger

HOUR = 3600.0


def jumping(*hours: float) -> Callable[[], None]:
    """Shift each reading of the clock by the next of some hours, cyclically. Must be called in a
    child."""

    def patch() -> None:
        whole, offsets = time.time, itertools.cycle(hours)
        time.time = lambda: whole() + HOUR * next(offsets)
        time.time_ns = lambda: int(time.time() * 1e9)

    return patch


FAULTS = {
    "back and forth by hours": (0, -5, 3, -48),
    "a day forward": (0, 24),
    "a year back": (0, -8760),
}
LIMITS = ("max_time=60",)


def inject(place: Place, ledger: Ledger) -> None:
    """Run with a time limit of an hour, which the clock exceeds many times."""
    for case in ("lora", "rosa", "cooldown", "respond"):
        for fault, hours in FAULTS.items():
            if (case in ("lora", "rosa") or hours == (0, 24)) and ledger.due("clock", case, fault):
                cases.reference(place, case)
                name = cases.cleared(place, f"{case}-clock-{fault.replace(' ', '-')}")
                limits = LIMITS if case in ("lora", "rosa") else ()
                child = cases.start(place, case, name, *limits, before=jumping(*hours))
                code = child.wait()
                same = all(cases.same(place, case, name).values()) if code == 0 else False
                ledger.add(
                    "clock",
                    case,
                    fault,
                    code=code,
                    said="" if code == 0 else child.output()[-800:],
                    same=same,
                    ok=same,
                )
