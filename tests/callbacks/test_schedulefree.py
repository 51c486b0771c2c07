"""The schedule-free optimiser: the library's, with the average in the weights wherever something
looks at them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.assembly.rows import load_data
from trainer.assembly.trained import load_trained
from trainer.callbacks.schedulefree import ScheduleFree
from trainer.evaluation.loss import losses
from trainer.models.losses import CausalLoss
from trainer.schedules.constant import constant
from trainer.storage import checkpoints, journal

SETTINGS = {"betas": (0.95, 0.99), "weight_decay": 0.1}
FREE = (
    "optimizer=schedulefree",
    "schedule=constant",
    "max_steps=8",
    "batch_size=4",
    "callbacks.evaluation.samples=0",
)
X, Y = torch.randn(2, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def toy(**settings: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    return model, schedulefree.AdamWScheduleFree(model.parameters(), **SETTINGS | settings)


def learn(model: nn.Linear, optimizer: Any) -> None:
    optimizer.zero_grad()
    (model(X) - Y).square().mean().backward()
    optimizer.step()


def with_callback(steps: int, warmup: int) -> tuple[nn.Linear, list[torch.Tensor]]:
    """The toy as a run trains it, with two micro-batches in a step, and what a callback sees after
    each step."""
    model, optimizer = toy()
    trainer: Any = SimpleNamespace(optimizers=[optimizer])
    callback, seen = ScheduleFree(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * constant(step, steps, warmup)
        for last in (False, True):
            callback.on_train_batch_start(trainer, None, None, 0)
            if last:
                learn(model, optimizer)
            callback.on_train_batch_end(trainer, SimpleNamespace(step_done=last), None, None, 0)
            assert optimizer.param_groups[0]["train_mode"] is not last
        seen.append(model.weight.detach().clone())
    return model, seen


@pytest.mark.parametrize("warmup", [0, 5])
def test_it_is_the_library_in_a_plain_loop(warmup):
    model, optimizer = toy(lr=0.1, warmup_steps=warmup)
    for _ in range(20):
        optimizer.train()
        learn(model, optimizer)
        optimizer.eval()
    actual, _ = with_callback(20, warmup)
    assert torch.equal(actual.weight, model.weight)
    assert torch.equal(actual.bias, model.bias)
    once, optimizer = toy(lr=0.1, warmup_steps=warmup)
    optimizer.train()
    for _ in range(20):
        learn(once, optimizer)
    optimizer.eval()
    torch.testing.assert_close(actual.weight, once.weight, rtol=1e-12, atol=1e-12)


def test_what_is_seen_between_steps_is_the_papers_x():
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    _, seen = with_callback(12, 4)
    z = x = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    v, total, inputs = (
        torch.zeros_like(z),
        0.0,
        torch.cat([X, torch.ones(16, 1, dtype=torch.float64)], 1),
    )
    for t in range(1, 13):
        rate = 0.1 * min(1, t / 4)
        y = 0.05 * z + 0.95 * x
        gradient = 2 / 48 * (inputs @ y.T - Y).T @ inputs
        v = 0.99 * v + 0.01 * gradient**2
        z = z - rate * (gradient / ((v / (1 - 0.99**t)).sqrt() + 1e-8) + 0.1 * y)
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
        torch.testing.assert_close(seen[t - 1], x[:, :3], rtol=1e-10, atol=1e-12)


# through the program


def test_checkpoints_and_evaluations_have_the_average(train, chats):
    run = train(f"task.path={chats}", *FREE)
    actual = load_trained(str(run), fp32=True)
    data = load_data(actual.config, actual.base, actual.task, train=False)
    again = losses(CausalLoss(actual.model, 64), data.held_out, 7, torch.device("cpu"))
    evaluations = [
        row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"
    ]
    assert evaluations[-1]["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.1
    content = checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))
    (optimizer,) = content["optimizer_states"]
    assert not any(group["train_mode"] for group in optimizer["param_groups"])
    assert {group["k"] for group in optimizer["param_groups"]} == {8}
    moved = [
        torch.equal(state["z"], tensor)
        for state, tensor in zip(
            optimizer["state"].values(), content["adapter"]["tensors"].values(), strict=True
        )
    ]
    assert not any(moved)
    assert (run / "adapter").is_dir()


def test_a_schedule_free_run_goes_on_with_the_same_bits_wherever_it_is_looked_at(
    train, chats, monkeypatch
):
    settings = (
        f"task.path={chats}",
        *FREE,
        "adapter.dropout=0.3",
        "accumulate=2",
        "batch_size=2",
        "name=cut",
    )
    alone = train(
        *settings,
        "name=alone",
        "callbacks.checkpoints.every=null",
        "callbacks.evaluation.every=null",
    )
    looked = ("callbacks.checkpoints.every=3", "callbacks.evaluation.every=2")
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(PowerCut):
            train(*settings, *looked)
    cut = train(*settings, *looked, "resume=auto")
    expected, actual = outcome(alone)[0], outcome(cut)[0]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    steps = [[row for row in outcome(run)[1] if row["kind"] == "step"] for run in (alone, cut)]
    assert steps[0] == steps[1]


def test_a_sparse_adapter_is_held_as_the_average(train, chats):
    run = train(
        f"task.path={chats}",
        *FREE,
        "adapter=rosa",
        "adapter.warmup_steps=2",
        "adapter.mask_steps=1",
        "adapter.density=0.05",
        "adapter.rank=2",
        "adapter.restart_after_mask=false",
    )
    actual = load_trained(str(run), fp32=True)
    data = load_data(actual.config, actual.base, actual.task, train=False)
    again = losses(CausalLoss(actual.model, 64), data.held_out, 7, torch.device("cpu"))
    last = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"][-1]
    assert last["loss"] == pytest.approx(again["loss"], rel=1e-5)
