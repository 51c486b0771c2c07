"""SIGKILL at random moments, in everything that a run and the commands do.

Each start is killed some milliseconds after a phase begins, which is drawn beforehand; the same
command resumes. A run that ended is compared with an undisturbed one, and the next run begins.
"""

from __future__ import annotations

import random
import time

from scripts.faults import cases
from scripts.faults.cases import EVERY, SPECIAL, Place
from scripts.faults.ledger import Ledger
from scripts.faults.points import POINTS
from scripts.faults.warm import PHASES, Child

# the largest (number of times that the phase begins before the kill, seconds after that)
MOMENTS = {
    "starting": (0, 1.5),
    "tokenising": (2, 0.05),
    "caching features": (1, 0.4),
    "training": (12, 0.03),
    "making the mask": (8, 0.03),
    "reselecting": (6, 0.03),
    "cooling down": (12, 0.03),
    "saving": (3, 0.02),
    "evaluating": (2, 0.1),
    "exporting": (2, 0.1),
    "regenerating": (16, 0.03),
}
ALONE = "nothing, in a process of its own"
CONTROL = "no fault but other random draws after going on"
USUAL = ("starting", "tokenising", "training", "evaluating", "exporting")


def inject(place: Place, ledger: Ledger, kills: int, seed: int) -> None:
    """Kill runs of all cases, in rounds. Each round ends with a comparison."""
    if ledger.due("kills", "lora", ALONE):
        process(place, ledger)
    if ledger.due("kills", "lora", CONTROL):
        control(place, ledger)
    chosen = [case for case in SPECIAL if ledger.asked("kills", case, "SIGKILL")]
    for number, case in enumerate(chosen):
        wanted = kills // len(chosen) + (number < kills % len(chosen))
        draw = random.Random(f"{seed} {case}")
        while _killed(ledger, case) < wanted or _open(ledger, case):
            one_round(place, ledger, case, wanted, draw)


def process(place: Place, ledger: Ledger) -> None:
    """Compare a forked run with one in a new process: all other comparisons rely on it."""
    cases.plainly(place, "lora", "lora-process")
    same = cases.same(place, "lora", "lora-process")
    ledger.add("kills", "lora", ALONE, same=all(same.values()), ok=all(same.values()))


def control(place: Place, ledger: Ledger) -> None:
    """Resume a run with other random draws, which the comparison has to notice: a check of the
    comparison itself."""
    name = cases.anew(place, "lora-control")
    cases.start(place, "lora", name, before=POINTS["mid_window"]).wait()
    cases.finish(cases.start(place, "lora", name, before=other_draws))
    same = cases.same(place, "lora", name)
    seen = not same["weights"] and not same["logged"]
    ledger.add("kills", "lora", CONTROL, said="seen" if seen else "NOT SEEN", ok=seen)


def other_draws() -> None:
    """Draw dropout with another seed. Must be called in a child."""
    from trainer.training import finetune

    whole = finetune.reseed
    finetune.reseed = lambda seed, *given: whole(seed + 1, *given)


def _killed(ledger: Ledger, case: str) -> int:
    return sum(1 for row in ledger.of("kills", case) if row.get("killed"))


def _ended(ledger: Ledger, case: str) -> int:
    return sum(1 for row in ledger.of("kills", case) if "round" in row and not row.get("killed"))


def _open(ledger: Ledger, case: str) -> bool:
    """Return whether a round was started and not finished."""
    rows = [row for row in ledger.of("kills", case) if "round" in row]
    return bool(rows) and bool(rows[-1].get("killed"))


def one_round(place: Place, ledger: Ledger, case: str, wanted: int, draw: random.Random) -> None:
    """Start a run repeatedly, kill it `wanted` times, let it end, and compare."""
    cases.reference(place, case)
    number = _ended(ledger, case)
    name = f"{case}-killed-{number}"
    worst = 0
    while True:
        child = cases.start(place, case, name)
        phase = aim(case, draw)
        if _killed(ledger, case) < wanted and wait_for(child, phase, draw):
            child.kill()
            gone = 0 if case == "respond" else cases.lost(place, name)
            worst = max(worst, gone)
            if child.code == -9:
                ledger.add(
                    "kills",
                    case,
                    f"SIGKILL while {child.marks.phase}",
                    killed=True,
                    round=number,
                    lost=gone,
                    ok=gone <= EVERY,
                )
        code = child.wait()
        if code == 0:
            break
        if code != -9:
            ledger.add("kills", case, "going on", round=number, said=child.said()[-1500:], ok=False)
            return
    same = cases.same(place, case, name)
    left = sorted(path.name for path in place.elsewhere.iterdir())
    said = f"{len(left)} files left in $TMPDIR" if left else ""
    in_round = sum(
        1 for row in ledger.of("kills", case) if row.get("round") == number and row.get("killed")
    )
    ledger.add(
        "kills",
        case,
        "the end of a run",
        round=number,
        kills=in_round,
        same=all(same.values()),
        said=said,
        ok=all(same.values()),
    )


def aim(case: str, draw: random.Random) -> str:
    """Draw the phase in which to kill: more often one that this case is about."""
    return (
        draw.choice(SPECIAL[case])
        if draw.random() < 0.7 or case == "respond"
        else draw.choice(USUAL)
    )


def wait_for(child: Child, phase: str, draw: random.Random, seconds: float = 120.0) -> bool:
    """Return whether a child reached the drawn moment of a phase before its end."""
    most, span = MOMENTS[phase]
    count = draw.randint(1, most) if most else 0
    delay = draw.uniform(0, span)
    until = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < until:
        if child.marks.count(phase) >= count or (count > 1 and child.marks.count("exporting")):
            time.sleep(delay)
            return child.poll() is None
        time.sleep(0.0005)
    return False


assert set(MOMENTS) == set(PHASES)
