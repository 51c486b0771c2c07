"""Out of memory: a limit on the process's address space, which torch or Python reaches within a
step."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults import cases
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger
from scripts.faults.nonfinite import both
from scripts.faults.points import wrapped

# bytes: the limit above the memory in use, and the size of the failing allocation
SMALLER = "more than two rows at a time do not fit, from step 11 on; then a SIGKILL"
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
        described = fault.__doc__ or ""
        if not ledger.due("memory", case, described):
            continue
        cases.reference(place, case)
        name = cases.cleared(place, f"{case}-memory-{fault.__name__}")
        child = cases.start(place, case, name, before=fault)
        code, gone = child.wait(), cases.lost(place, name)
        saved = checkpoints.complete(place.runs / name / "checkpoints")
        intact = bool(saved) and checkpoints.fault(saved[-1]) is None
        message = child.message("out of memory")
        cases.finish(cases.start(place, case, name))
        same = all(cases.same(place, case, name).values())
        ok = code == 1 and "need less" in message and intact and gone <= EVERY and same
        ledger.add("memory", case, described, code=code, lost=gone, said=message, same=same, ok=ok)
    if ledger.due("memory", "lora", SMALLER):
        repeated(place, ledger)


def repeated(place: Place, ledger: Ledger) -> None:
    """Let a step fail with more than two rows at a time. It is repeated; the run is then killed and
    resumed. It has to end with the bits of one that is not killed, and near one that always fits.
    """
    words = ("adapter.dropout=0",)
    names = [cases.cleared(place, f"lora-{name}") for name in ("fits", "smaller", "smaller-killed")]
    cases.finish(cases.start(place, "lora", names[0], *words))
    cases.finish(cases.start(place, "lora", names[1], *words, before=by_rows))
    killed = cases.start(place, "lora", names[2], *words, before=both(by_rows, killed_at))
    code = killed.wait()
    cases.finish(cases.start(place, "lora", names[2], *words))  # the parts stay small by themselves
    message = killed.message("did not fit into memory")
    outcomes = [cases.outcome(place, "lora", name)["weights"] for name in names]
    apart = distance(*(place.runs / name for name in names[:2]))
    same = outcomes[1] == outcomes[2]
    ok = same and code == -9 and bool(message) and 0 < apart < 1e-4
    text = f"{message} [weights differ by {apart:.1e} from a run that fits]"
    ledger.add("memory", "lora", SMALLER, killed=True, said=text, same=same, ok=ok)


def distance(one: Path, other: Path) -> float:
    """Return the largest difference between two runs' adapters."""
    from safetensors.torch import load_file

    first, second = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)
    )
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def by_rows() -> None:
    """Let an allocation fail from a step on, when more than two rows are run at a time."""
    import torch

    from trainer.training.finetune import FineTune

    whole = FineTune.loss_of

    def patched(self: Any, batch: dict[str, Any], share: float = 1.0) -> Any:
        if self.step >= STEP and len(batch["input_ids"]) > 2:
            torch.empty(1 << 50, dtype=torch.uint8)
        return whole(self, batch, share)

    FineTune.loss_of = patched  # type: ignore[method-assign, assignment]


def killed_at() -> None:
    """Kill the process some steps after."""
    from trainer.training.finetune import FineTune

    wrapped(FineTune, "on_train_batch_start", lambda self, batch, at: self.step == STEP + 4)


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

    def patched(self: Any, *args: Any) -> Any:
        if self.step == STEP:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN, used + MARGIN))
            ask()
        return whole(self, *args)

    FineTune.training_step = patched  # type: ignore[method-assign, assignment]
