"""What happens where a step ends happens in one order, whatever the order of the config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.callbacks.end_of_step import EndOfStep

TRAINER: Any = SimpleNamespace(accumulate_grad_batches=2)
PARTS = ("evaluation", "averaging", "cooldown", "checkpoints", "progress")


class Part:
    """Notes which of its methods was called, with all but trainer and module."""

    def __init__(self, name: str, calls: list[Any], best: bool):
        self.name, self.calls, self.best = name, calls, best

    def __getattr__(self, method: str) -> Any:
        def called(*arguments: Any) -> bool:
            self.calls.append((f"{self.name}.{method}", *arguments[2:]))
            return self.best

        return called


def end_of_step(calls: list[Any], best: bool = False, without: str = "") -> EndOfStep:
    parts = {name: Part(name, calls, best) for name in PARTS if name != without}
    metrics, stopping = Part("metrics", calls, best), Part("stopping", calls, best)
    return EndOfStep(metrics, stopping, **parts)  # type: ignore[arg-type]


def module_of(calls: list[Any]) -> Any:
    return SimpleNamespace(step=3, step_done=True, settle=lambda: calls.append(("module.settle",)))


def names(calls: list[Any]) -> list[str]:
    return [call[0] for call in calls]


@pytest.mark.parametrize("best", [True, False])
def test_a_step_is_measured_judged_and_saved_in_this_order(best):
    calls: list[Any] = []
    end = end_of_step(calls, best)
    end.on_train_batch_end(TRAINER, module_of(calls), None, None, 0)  # type: ignore[arg-type]
    assert names(calls) == [
        "progress.count",
        "metrics.record",
        "evaluation.due",
        *(["module.settle"] if best else []),
        "evaluation.evaluate_if_due",
        "averaging.after_step",
        "cooldown.check",
        "stopping.check",
        "checkpoints.save_if_due",
        "progress.update",
    ]
    assert ("checkpoints.save_if_due", best) in calls


def test_the_middle_of_an_accumulation_window_ends_no_step():
    calls: list[Any] = []
    end = end_of_step(calls)
    end.on_train_batch_end(TRAINER, SimpleNamespace(step_done=False), None, None, 0)  # type: ignore[arg-type]
    assert calls == [("progress.count", 2)]


@pytest.mark.parametrize("best", [True, False])
def test_the_end_of_training_is_evaluated_before_it_is_saved(best):
    calls: list[Any] = []
    end_of_step(calls, best).on_train_end(None, module_of(calls))  # type: ignore[arg-type]
    assert names(calls) == [
        "module.settle",
        "evaluation.evaluate_last",
        "averaging.evaluate_last",
        "stopping.check_data",
        "checkpoints.save_last",
    ]
    assert ("checkpoints.save_last", best) in calls


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_the_config_leaves_out_is_left_out(name):
    calls: list[Any] = []
    end, module = end_of_step(calls, without=name), module_of(calls)
    end.on_train_batch_end(TRAINER, module, None, None, 0)  # type: ignore[arg-type]
    end.on_train_end(None, module)  # type: ignore[arg-type]
    assert not [call for call in names(calls) if call.startswith(f"{name}.")]
    assert {call.partition(".")[0] for call in names(calls)} == {
        "metrics",
        "module",
        "stopping",
        *PARTS,
    } - {name}
