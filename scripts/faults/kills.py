"""SIGKILL at random moments of each phase of each kind of run, as many in one phase as in another.

A start is stopped at a moment that is drawn beforehand. If it is in the phase that is aimed for it
is killed; if that has passed it continues, and is stopped in the next one. The same command then
resumes. Each phase gets one kill in a round; then the run ends and is compared with an undisturbed
one.
"""

from __future__ import annotations

import os
import random
import signal
import time

from scripts.faults import cases, commands
from scripts.faults.cases import EVERY, PHASES_OF, Place
from scripts.faults.ledger import Ledger
from scripts.faults.pairs import LIMIT, Pair
from scripts.faults.points import POINTS
from scripts.faults.warm import PHASES, Child

# the largest (number of times that the phase begins before the kill, seconds after that)
MOMENTS = {
    "starting": (1, 1.0),
    "tokenising": (1, 0.05),
    "caching features": (1, 0.4),
    "training": (12, 0.03),
    "making the mask": (8, 0.03),
    "reselecting": (6, 0.03),
    "cooling down": (12, 0.03),
    "saving": (3, 0.02),
    "evaluating": (2, 0.1),
    "exporting": (1, 0.03),
    "regenerating": (16, 0.03),
    "comparing": (2, 0.05),
    "compressing": (4, 0.02),
    "requeueing": (1, 0.1),
}
ALONE = "nothing, in a process of its own"
CONTROL = "no fault but other random draws after going on"
ROUNDS = 10  # times as many rounds as a kind needs, if no aim misses; a fast machine misses some
SIGNALLED = (75, 138)  # exit codes of a run that SIGUSR1 has stopped: requeued, or not


def inject(place: Place, ledger: Ledger, kills: int, seed: int) -> None:
    """Kill runs of all kinds, in rounds. Each round ends with a comparison."""
    if ledger.due("kills", "lora", ALONE):
        process(place, ledger)
    if ledger.due("kills", "lora", CONTROL):
        control(place, ledger)
    chosen = [case for case in PHASES_OF if ledger.selects("kills", case, "SIGKILL")]
    ledger.expected = shares = shared(kills, chosen)
    draws = {case: random.Random(f"{seed} {case}") for case in chosen}
    # one round of each kind at a time: a harness that is stopped has killed all kinds alike
    for _ in range(ROUNDS * max((max(share.values()) for share in shares.values()), default=0)):
        for case in chosen:
            if ledger.missing(case, shares[case]) or _open(ledger, case):
                one_round(place, ledger, case, shares[case], draws[case])


def shared(kills: int, chosen: list[str]) -> dict[str, dict[str, int]]:
    """Share kills among the phases of kinds of runs, as equally as whole numbers can be."""
    phases = [(case, phase) for case in chosen for phase in PHASES_OF[case]]
    shares: dict[str, dict[str, int]] = {case: {} for case in chosen}
    # the phases that get one more are spread over the list, not its first ones
    for number, (case, phase) in enumerate(phases):
        before, after = (kills * at // len(phases) for at in (number, number + 1))
        shares[case][phase] = after - before
    return shares


def process(place: Place, ledger: Ledger) -> None:
    """Compare a forked run with one in a new process: all other comparisons rely on it."""
    cases.plainly(place, "lora", "lora-process")
    same = cases.same(place, "lora", "lora-process")
    ledger.add("kills", "lora", ALONE, same=all(same.values()), ok=all(same.values()))


def control(place: Place, ledger: Ledger) -> None:
    """Resume a run with other random draws, which the comparison has to notice: a check of the
    comparison itself."""
    name = cases.cleared(place, "lora-control")
    cases.start(place, "lora", name, before=POINTS["mid_window"]).wait()
    cases.finish(cases.start(place, "lora", name, before=other_draws))
    same = cases.same(place, "lora", name)
    seen = not same["weights"] and not same["logged"]
    ledger.add("kills", "lora", CONTROL, said="seen" if seen else "NOT SEEN", ok=seen)


def other_draws() -> None:
    """Draw dropout with another seed. Must be called in a child."""
    from trainer.training import finetune

    whole = finetune.reseed
    finetune.reseed = lambda seed, *args: whole(seed + 1, *args)


def _open(ledger: Ledger, case: str) -> bool:
    """Return whether a round was started and not finished."""
    rows = [row for row in ledger.of("kills", case) if "round" in row]
    return bool(rows) and bool(rows[-1].get("killed"))


def one_round(
    place: Place, ledger: Ledger, case: str, share: dict[str, int], draw: random.Random
) -> None:
    """Kill a run once in each phase whose share is not reached, let it end, and compare."""
    cases.reference(place, case)
    number = sum(1 for row in ledger.of("kills", case) if row.get("ended"))
    name = f"{case}-killed-{number}"
    ended = False
    for phase in ledger.missing(case, share):
        child = cases.start(place, case, name)
        if isinstance(child, Pair):
            child.target = draw.randint(0, phase != "exporting")
        # a moment that was too late in earlier rounds is aimed for earlier
        within = 1 / (1 + max(0, number - ledger.kills(case, phase)))
        killed = ready(child, case, phase, draw) and strike(child, phase, draw, within, case)
        if killed:
            note(place, ledger, case, name, number, phase, child)
        if (code := child.wait()) == 0:
            ended = True
            break
        if not killed and not (case == "requeue" and code in SIGNALLED):
            text = child.output()[-1500:]
            ledger.add("kills", case, "the start after a kill", round=number, said=text, ok=False)
            return
    if not ended:
        code = cases.start(place, case, name).wait()
        if code != 0:
            text = f"exit code {code}"
            ledger.add("kills", case, "the start after a kill", round=number, said=text, ok=False)
            return
    same = all(cases.same(place, case, name).values())
    left = len(list(place.elsewhere.iterdir()))
    ledger.add(
        "kills",
        case,
        "the end of a run",
        round=number,
        ended=True,
        same=same,
        said=f"{left} files left in $TMPDIR" if left else "",
        ok=same,
    )


def note(
    place: Place,
    ledger: Ledger,
    case: str,
    name: str,
    number: int,
    phase: str,
    child: Child | Pair,
) -> None:
    """Record a kill, with the steps that it has cost."""
    trains = case != "respond" and case not in commands.WRITERS
    gone = cases.lost(place, name) if trains else 0
    who = f" of rank {child.target}" if isinstance(child, Pair) else ""
    late = isinstance(child, Pair) and child.seconds >= LIMIT
    values = {"seconds": round(child.seconds, 1)} if isinstance(child, Pair) else {}
    ledger.add(
        "kills",
        case,
        f"SIGKILL{who} while {phase}",
        killed=True,
        phase=phase,
        round=number,
        lost=gone,
        ok=gone <= EVERY and not late,
        **values,
    )


def ready(child: Child | Pair, case: str, phase: str, draw: random.Random) -> bool:
    """Send a job of a queue its signal before it is killed, except at its start. Return whether the
    child still runs."""
    if case != "requeue" or phase == "starting":
        return True
    assert isinstance(child, Child)
    count = child.marks.count("training") + draw.randint(1, 6)
    if reached(child, "training", count):
        os.kill(child.pid, signal.SIGUSR1)
    return child.poll() is None


def strike(
    child: Child | Pair, phase: str, draw: random.Random, within: float = 1.0, case: str = ""
) -> bool:
    """Kill a child within a phase, in the first part `within` of its moments. Return False if the
    child ended before."""
    most, span = MOMENTS[phase]
    count, delay = draw.randint(1, max(1, round(most * within))), draw.uniform(0, span * within)
    if case == "requeue":  # what comes after the signal, and nothing that was before it
        count = child.marks.count(phase) + (phase not in ("starting", "training"))
    while reached(child, phase, count):
        time.sleep(delay)
        child.stop()
        if child.poll() is None and child.marks.phase == phase:
            child.kill()
            return True
        child.resume()
        count, delay = child.marks.count(phase) + (phase != "starting"), delay / 2
    return False


def reached(child: Child | Pair, phase: str, count: int, seconds: float = 180.0) -> bool:
    """Wait until a phase has begun `count` times. Return False if the child ends before."""
    until = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < until:
        if child.marks.count(phase) >= count:
            return True
        time.sleep(0.0005)
    return False


assert set(MOMENTS) == set(PHASES)
