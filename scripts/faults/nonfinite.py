"""NaN in one element of a gradient at chosen steps, compared with runs that skip the same steps by
other means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from scripts.faults import cases
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

STEP = 10


def inject(place: Place, ledger: Ledger) -> None:
    """Inject one bad step, which is skipped; then one more in a row than is allowed, which ends the
    run, with a limit of several and of none."""
    for case in ("lora", "rosa", "mtp", "eagle3"):
        if ledger.due("nonfinite", case, "one step of NaN, nonfinite_limit=3"):
            passed_over(place, ledger, case)
    for limit in (1, 3):
        fault = f"{limit} step{'s' * (limit > 1)} of NaN in a row, nonfinite_limit={limit}"
        if ledger.due("nonfinite", "lora", fault):
            ended(place, ledger, fault, limit)


def passed_over(place: Place, ledger: Ledger, case: str) -> None:
    """Compare one step of NaN with a run whose optimiser does nothing at that step."""
    names = [cases.cleared(place, f"{case}-nan"), cases.cleared(place, f"{case}-idle")]
    for name, patch in zip(names, (spoiling(1), idle(1)), strict=True):
        cases.finish(cases.start(place, case, name, before=both(patch, watch_base)))
    expected, disturbed = (cases.outcome(place, case, name) for name in reversed(names))
    rows = skipped(place, names[0])
    base_unchanged = unchanged(place, names[0])
    same = expected["weights"] == disturbed["weights"]
    named = len(rows) == 1 and rows[0]["step"] == STEP + 1 and len(rows[0]["rows"]) == 8
    ledger.add(
        "nonfinite",
        case,
        "one step of NaN, nonfinite_limit=3",
        same=same,
        ok=same and named and base_unchanged,
        said=(
            f"counted; {len(rows[0]['rows']) if rows else 0} rows named in metrics.jsonl; the"
            f" base's weights {'untouched' if base_unchanged else 'CHANGED'}"
        ),
    )


def ended(place: Place, ledger: Ledger, fault: str, limit: int) -> None:
    """Inject NaN until the run ends. Without NaN it resumes, and has to reach the undisturbed
    result."""
    name = cases.cleared(place, f"lora-nan-{limit}")
    setting = f"objective.nonfinite_limit={limit}"
    like = cases.cleared(
        place, f"lora-idle-{limit}"
    )  # a checkpoint may lie between the bad steps: those before it stay skipped
    cases.finish(cases.start(place, "lora", like, setting, before=idle(saved_of(limit))))
    child = cases.start(place, "lora", name, setting, before=both(spoiling(limit), watch_base))
    code, gone = child.wait(), cases.lost(place, name)
    message = child.message("in a row", "ERROR")
    rows, base_unchanged = skipped(place, name), unchanged(place, name)
    cases.finish(cases.start(place, "lora", name, setting))
    same = (
        cases.outcome(place, "lora", like)["weights"]
        == cases.outcome(place, "lora", name)["weights"]
    )
    named = [row["step"] for row in rows] == list(range(STEP + 1, STEP + 1 + limit)) and all(
        row["rows"] for row in rows
    )
    ok = code == 1 and bool(message) and named and base_unchanged and same
    message += (
        f" [{len(rows)} of {limit} steps' rows are in metrics.jsonl; the base's weights"
        f" {'untouched' if base_unchanged else 'CHANGED'}]"
    )
    ledger.add("nonfinite", "lora", fault, code=code, lost=gone, said=message, same=same, ok=ok)


def skipped(place: Place, name: str) -> list[dict[str, Any]]:
    """Return the journal's rows of skipped steps."""
    from trainer.storage import journal

    return [
        row for row in journal.read(place.runs / name / "metrics.jsonl") if row["kind"] == "skipped"
    ]


def unchanged(place: Place, name: str) -> bool:
    """Return whether the last start of a run did not change the base's weights."""
    digests = [
        json.loads(line.partition("BASE ")[2])
        for line in (place.path / "logs" / f"{name}.log").read_text().splitlines()
        if line.startswith("BASE ")
    ]
    return bool(digests) and all(
        before[key] == after[key]
        for before, after in digests
        for key in before.keys() & after.keys()
    )


def both(*patches: Callable[[], None]) -> Callable[[], None]:
    def patch() -> None:
        for each in patches:
            each()

    return patch


def spoiling(steps: int) -> Callable[[], None]:
    """Return a patch that puts a NaN into the gradients of `count` steps from STEP on."""

    def patch() -> None:
        from trainer.training.finetune import FineTune

        whole = FineTune.on_after_backward

        def spoiled(self: Any) -> None:
            whole(self)
            if STEP <= self.step < STEP + steps:
                next(p for p in self.parameters() if p.grad is not None).grad.flatten()[3] = float(
                    "nan"
                )

        FineTune.on_after_backward = spoiled  # type: ignore[method-assign, assignment]

    return patch


def saved_of(steps: int) -> int:
    """Count the bad steps before the last checkpoint."""
    return max(0, (STEP + steps - 1) // EVERY * EVERY - STEP)


def idle(steps: int) -> Callable[[], None]:
    """Return a patch under which the optimiser does nothing at some steps from STEP on: all
    gradients are removed just before its step."""

    def patch() -> None:
        from trainer.training.finetune import FineTune

        whole = FineTune.configure_gradient_clipping

        def without(self: Any, optimizer: Any, *args: Any, **named: Any) -> None:
            whole(self, optimizer, *args, **named)
            if STEP <= self.step < STEP + steps:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

        FineTune.configure_gradient_clipping = without  # type: ignore[method-assign, assignment]

    return patch


def watch_base() -> None:
    """Print a digest of all frozen parameters, before and after training."""
    import lightning

    whole = lightning.Trainer.fit

    def fit(self: Any, module: Any, *args: Any, **named: Any) -> None:
        before = frozen(module)
        try:
            whole(self, module, *args, **named)
        finally:
            print("BASE", json.dumps([before, frozen(module)]), flush=True)

    lightning.Trainer.fit = fit  # type: ignore[method-assign, assignment]


def frozen(module: Any) -> dict[str, str]:
    """Return a digest of each frozen parameter, without the values that a sparse adapter has added
    to it."""
    from adapters.sparse import layers

    held = {
        id(layer.base.weight): layer
        for _, layer in layers(module.model)
        if getattr(layer.delta, "base_values", None) is not None
    }
    digests = {}
    for name, parameter in module.model.named_parameters():
        if not parameter.requires_grad and parameter.numel():
            plain = parameter.detach().clone()
            if (layer := held.get(id(parameter))) is not None:
                plain.view(-1).index_copy_(
                    0, layer.delta.base_positions(layer.base)[0], layer.delta.base_values
                )
            digests[name] = hashlib.sha256(plain.numpy().tobytes()).hexdigest()
    return digests
