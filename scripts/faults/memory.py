"""Out of memory: a limit on the process's address space, which torch or Python reaches within a
step."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

from scripts.faults import cases
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

# bytes: the limit above the memory in use, and the size of the failing allocation
STEP, MARGIN, ASKED = 10, 64 << 20, 512 << 20


def inject(place: Place, ledger: Ledger) -> None:
    """Let an allocation fail in a step; the run resumes without the limit."""
    from trainer.storage import checkpoints

    for case, fault in (
        ("lora", by_torch),
        ("spiel", by_torch),
        ("eagle3", by_torch),
        ("lora", by_python),
    ):
        told = fault.__doc__ or ""
        if not ledger.due("memory", case, told):
            continue
        cases.reference(place, case)
        name = cases.anew(place, f"{case}-memory-{fault.__name__}")
        child = cases.start(place, case, name, before=fault)
        code, gone = child.wait(), cases.lost(place, name)
        saved = checkpoints.complete(place.runs / name / "checkpoints")
        intact = bool(saved) and checkpoints.fault(saved[-1]) is None
        said = child.told("out of memory")
        cases.finish(cases.start(place, case, name))
        same = all(cases.same(place, case, name).values())
        ok = code == 1 and "need less" in said and intact and gone <= EVERY and same
        ledger.add("memory", case, told, code=code, lost=gone, said=said, same=same, ok=ok)


def by_torch() -> None:
    """a tensor of 512 MB"""
    import torch

    _limited(lambda: torch.empty(ASKED, dtype=torch.uint8))


def by_python() -> None:
    """a bytearray of 512 MB"""
    _limited(lambda: bytearray(ASKED))


def _limited(ask: Callable[[], Any]) -> None:
    from trainer.training.finetune import FineTune

    whole = FineTune.training_step

    def patched(self: Any, *given: Any) -> Any:
        if self.step == STEP:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN, used + MARGIN))
            ask()
        return whole(self, *given)

    FineTune.training_step = patched  # type: ignore[method-assign, assignment]
