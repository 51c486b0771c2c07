"""Inject faults into small runs, and compare each outcome with the expected one.

    python -m scripts.faults out=FOLDER [only=[kills,disk:lora]] [kills=100] [seed=0]

Families: kills, points, disk, damage, ranks, loader, clock, nonfinite, memory. Each has a file in
this folder that describes it. only=[FAMILY:RUN:FAULT] selects injections by parts of their names.
FOLDER/faults.jsonl gets a line for each injection, FOLDER/faults.md the table. The same command
resumes where it was stopped. The exit code is 1 if any outcome is wrong.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.faults import (
    cases,
    clock,
    damage,
    disk,
    kills,
    loader,
    memory,
    nonfinite,
    points,
    ranks,
    warm,
)
from scripts.faults.ledger import HEADS, Ledger

FAMILIES: dict[str, Any] = {
    "kills": kills,
    "points": points,
    "disk": disk,
    "damage": damage,
    "ranks": ranks,
    "loader": loader,
    "clock": clock,
    "nonfinite": nonfinite,
    "memory": memory,
}
DEFAULTS = {"out": None, "only": list(HEADS), "kills": 100, "seed": 0}


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(argv))
    unknown = [
        *(key for key in options if key not in DEFAULTS),
        *(name for name in options.get("only", []) if str(name).partition(":")[0] not in FAMILIES),
    ]
    options = DEFAULTS | options
    if unknown or options["out"] is None:
        print(
            f"{', '.join(unknown) or 'out'}: {'unknown' if unknown else 'missing'}\n\n{__doc__}",
            file=sys.stderr,
        )
        return 2
    place = cases.prepare(Path(options["out"]))
    ledger = Ledger(place.path, options["only"])
    warm.ready()
    # exits through every `finally`, so that nothing stays mounted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in dict.fromkeys(entry.partition(":")[0] for entry in options["only"]):
        began = time.monotonic()
        if name == "kills":
            kills.inject(place, ledger, options["kills"], options["seed"])
        else:
            FAMILIES[name].inject(place, ledger)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        ledger.write([place.path, place.elsewhere])
    shutil.rmtree(place.elsewhere, ignore_errors=True)
    return 0 if ledger.write([place.path, place.elsewhere]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
