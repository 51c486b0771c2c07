"""Averages of the weights: their values, that they go in and out without a trace, and that a
resumed run has the same."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapters.delta import AdaptedLinear
from adapters.rosa import RoSA
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.assembly import trained as trained_module
from trainer.assembly.rows import load_data
from trainer.callbacks.averaging import Averaging
from trainer.callbacks.end_of_step import EndOfStep
from trainer.evaluation.loss import losses
from trainer.exporting.adapter import verify_adapter
from trainer.exporting.compare import TOLERANCE
from trainer.models.losses import CausalLoss
from trainer.storage import checkpoints, journal

AVERAGING = "callbacks=[default,averaging]"
SHORT = (
    "max_steps=8",
    "batch_size=4",
    "callbacks.evaluation.every=4",
    "callbacks.evaluation.samples=0",
)


class Toy(nn.Module):
    """What the callback sees of a FineTune."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
        self.model[0].requires_grad_(False)  # the base
        self.drafter = nn.Linear(2, 2).to(dtype)
        self.step, self.step_done = 0, True


def callback(steps: int = 20, **settings: Any) -> Averaging:
    context: Any = SimpleNamespace(steps=steps, signals=SimpleNamespace(received=None))
    return Averaging(
        context,
        **{"kind": "ema", "decay": 0.9, "start": 0.0, "every": 1, "export": True} | settings,
    )


def started(averaging: Averaging, module: Toy) -> Any:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad])
    trainer = SimpleNamespace(optimizers=[optimizer], callbacks=[averaging])
    averaging.on_train_start(trainer, module)
    return trainer


def stepped(averaging: Averaging, module: Toy, trainer: Any) -> None:
    """One step to weights at random."""
    module.step += 1
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    averaging.after_step(trainer, module)


def state(averaging: Averaging) -> dict[str, torch.Tensor]:
    return averaging.state_dict()["averages"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("start", "every"), [(0, 1), (7, 1), (0.25, 3), (0, 4)])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_is_its_formula(kind, start, every, dtype):
    torch.manual_seed(0)
    module, averaging = Toy(dtype), callback(kind=kind, start=start, every=every)
    trainer = started(averaging, module)
    history: dict[str, list[list[float]]] = {}
    for step in range(1, 21):
        stepped(averaging, module, trainer)
        first = {0: 0, 7: 7, 0.25: 5}[start]
        if step >= first and (step - first) % every == 0:
            for name, p in module.named_parameters():
                history.setdefault(name, []).append(p.detach().double().flatten().tolist())
    # not the base's
    assert set(state(averaging)) == {
        "model.1.weight",
        "model.1.bias",
        "drafter.weight",
        "drafter.bias",
    }
    for name, actual in state(averaging).items():
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for entry, values in enumerate(zip(*history[name], strict=True)):
            if kind == "swa":
                expected = sum(values) / len(values)
            else:
                expected = values[0]
                for value in values[1:]:
                    expected = 0.9 * expected + 0.1 * value
            assert float(actual.flatten()[entry]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert averaging.count == len(history["model.1.bias"])


def test_an_accumulated_step_counts_once():
    module, averaging = Toy(), callback()
    trainer = started(averaging, module)
    stepped(averaging, module, trainer)
    end_of_step = EndOfStep(SimpleNamespace(), SimpleNamespace(), averaging=averaging)  # type: ignore[arg-type]
    module.step_done = False
    end_of_step.on_train_batch_end(trainer, module, None, None, 1)
    assert averaging.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_go_in_and_out_bit_by_bit(dtype):
    module, averaging = Toy(dtype), callback(kind="swa")
    trainer = started(averaging, module)
    for _ in range(3):
        stepped(averaging, module, trainer)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    places = {name: p.data_ptr() for name, p in module.named_parameters()}
    with averaging.in_place():
        for name, average in state(averaging).items():
            assert torch.equal(module.get_parameter(name), average.to(dtype))
            assert not torch.equal(module.get_parameter(name), before[name])
        assert torch.equal(module.model[0].weight, before["model.0.weight"])
    with pytest.raises(KeyError), averaging.in_place():
        raise KeyError
    assert all(
        torch.equal(p, before[name]) and p.data_ptr() == places[name]
        for name, p in module.named_parameters()
    )


def test_an_average_starts_anew_where_positions_are_chosen(caplog):
    module, averaging = Toy(), callback(kind="swa")
    delta = RoSA(nn.Linear(4, 3), 2, 1, 1.0, 0.0, torch.float32, torch.float32)
    base = nn.Linear(4, 3).requires_grad_(False)
    module.model.append(AdaptedLinear(base, delta))
    trainer = started(averaging, module)
    for _ in range(3):
        stepped(averaging, module, trainer)
    delta.set_support(torch.tensor([1, 5]), base)
    with caplog.at_level(logging.INFO):
        stepped(averaging, module, trainer)
    assert averaging.count == 1
    assert "restarts after step 4" in caplog.text
    assert torch.equal(state(averaging)["model.2.delta.values"], delta.values)
    stepped(averaging, module, trainer)
    assert averaging.count == 2
    # A weight that holds the values follows them in and out.
    x, before = torch.randn(2, 4), base.weight.detach().clone()
    delta.refresh(base)
    with averaging.in_place():
        inside = module.model[2](x)
        assert torch.allclose(inside, x @ delta.weight(_own(delta, base)).T + base.bias, atol=1e-6)
    module.model[2](x)
    delta.take_out(base)
    again = base.weight.detach().clone()
    delta.fold_in(base)
    assert torch.equal(_own(delta, base), again)
    assert not torch.equal(before, again)


def _own(delta: RoSA, base: nn.Linear) -> torch.Tensor:
    """The base's own weight, entry by entry, without the values that are folded into it."""
    weight = base.weight.detach().clone()
    for index, value in zip(delta.indices.tolist(), delta.base_values.tolist(), strict=True):
        weight[index // 4, index % 4] = value
    return weight


# through the program


def rows(run, kind):
    return [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == kind]


def saved_average(run):
    content = checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))["callbacks"]
    return next(value for key, value in content.items() if "Averaging" in key)


def test_a_run_evaluates_saves_and_exports_its_average(train, chats):
    run = train(
        f"task.path={chats}",
        *SHORT,
        AVERAGING,
        "callbacks.averaging.start=3",
        "callbacks.averaging.decay=0.7",
        "callbacks.averaging.every=2",
        "callbacks.checkpoints.every=1",
        "callbacks.checkpoints.keep=20",
    )
    expected: dict[str, torch.Tensor] = {}
    for step in (3, 5, 7):
        tensors = checkpoints.load(checkpoints.chosen(run / "checkpoints", str(step)))["adapter"][
            "tensors"
        ]
        for name, tensor in tensors.items():
            expected[name] = (
                0.7 * expected[name] + 0.3 * tensor.double()
                if name in expected
                else tensor.double()
            )
    saved = saved_average(run)
    assert saved["count"] == 3
    assert {name.removeprefix("model.") for name in saved["averages"]} == set(expected)
    for name, tensor in saved["averages"].items():
        torch.testing.assert_close(
            tensor.double(), expected[name.removeprefix("model.")], rtol=1e-5, atol=1e-7
        )
    actual = rows(run, "average")
    assert [(row["step"], row["updates"]) for row in actual] == [(4, 1), (8, 3)]

    trained = trained_module.load_trained(str(run), fp32=True)
    with torch.no_grad():
        for name, tensor in saved["averages"].items():
            trained.model.get_parameter(name.removeprefix("model.")).copy_(tensor)
    data = load_data(trained.config, trained.base, trained.task, train=False)
    again = losses(CausalLoss(trained.model, 64), data.held_out, 7, torch.device("cpu"))
    assert actual[-1]["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert actual[-1]["loss"] != pytest.approx(rows(run, "evaluation")[-1]["loss"], rel=1e-5)
    # stock PEFT, on a fresh base
    assert verify_adapter(trained, run / "adapter-averaged") < TOLERANCE
    names = [
        load_file(run / name / "adapter_model.safetensors").keys()
        for name in ("adapter", "adapter-averaged")
    ]
    assert names[0] == names[1]


def test_an_average_changes_nothing_and_has_the_same_bits_in_a_resumed_run(
    train, chats, monkeypatch
):
    settings = (
        f"task.path={chats}",
        *SHORT,
        "adapter.dropout=0.3",
        "callbacks.checkpoints.every=3",
    )
    averaging = (AVERAGING, "callbacks.averaging.kind=swa", "callbacks.averaging.start=2")
    plain, alone = train(*settings, "name=plain"), train(*settings, *averaging, "name=alone")
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(PowerCut):
            train(*settings, *averaging, "name=cut")
    cut = train(*settings, *averaging, "name=cut", "resume=auto")
    assert outcome(cut)[1] == outcome(alone)[1]  # logged rows, those of averages among them
    expected, actual = saved_average(alone), saved_average(cut)
    assert (
        (actual["count"], actual["evaluated"])
        == (expected["count"], expected["evaluated"])
        == (7, 8)
    )
    assert all(
        torch.equal(actual["averages"][name], expected["averages"][name])
        for name in expected["averages"]
    )
    files = [
        (run / "adapter-averaged" / "adapter_model.safetensors").read_bytes()
        for run in (alone, cut)
    ]
    assert files[0] == files[1]
    tensors = outcome(plain)[0]
    assert all(torch.equal(outcome(alone)[0][name], tensors[name]) for name in tensors)
    assert [row for row in outcome(alone)[1] if row["kind"] != "average"] == outcome(plain)[1]


def test_rosas_average_begins_with_its_mask(train, chats):
    run = train(
        f"task.path={chats}",
        *SHORT,
        AVERAGING,
        "adapter=rosa",
        "adapter.warmup_steps=2",
        "adapter.mask_steps=1",
        "adapter.count_mask_steps=true",
        "adapter.density=0.05",
        "adapter.rank=2",
        "callbacks.averaging.start=0",
        "callbacks.averaging.export=false",
    )
    assert [(row["step"], row["updates"]) for row in rows(run, "average")] == [(4, 2), (8, 6)]
    assert not (run / "adapter-averaged").exists()


def test_the_average_of_a_whole_model(train, chats):
    run = train(f"task.path={chats}", *SHORT, AVERAGING, "adapter=full", "optimizer.lr=1e-3")
    assert len(rows(run, "average")) == 2
    assert not (run / "adapter-averaged").exists()
