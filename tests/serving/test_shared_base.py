"""Runs share one base: it keeps its bits, and each run computes what it computes alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from adapters.delta import AdaptedLinear, Start
from tests.conftest import composed
from tests.toys.serving import RUNS, loaded
from trainer.assembly.build import instantiate
from trainer.assembly.trained import load_trained
from trainer.config import schema
from trainer.models.base import BaseError
from trainer.serving import models
from trainer.serving.shared_base import KEEP_THE_BASE, SharedBase

IDS = torch.tensor([[5, 9, 13, 7, 30, 22, 11]])


def tensors(model):
    """The tensors by the memory that they use."""
    return {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}


@pytest.mark.long
def test_runs_compute_what_they_do_alone(monkeypatch):
    monkeypatch.chdir(RUNS.parent)
    names = ("lora", "rosa", "spiel")
    served = loaded(*names, drafter=None, merges=False)
    base = served["base"].target.model
    for name in names:
        alone = load_trained(str(RUNS / name))
        fresh = alone.base.load(torch.float32)
        assert all(map(torch.equal, fresh.parameters(), base.parameters()))
        with torch.no_grad():
            actual = served[name].target.model(IDS).logits
            assert torch.equal(actual, alone.model(IDS).logits)
            assert not torch.equal(actual, base(IDS).logits)
    # lora writes into no weight; the others share what they did not write into
    places = {*tensors(base)}
    shared = [
        sum(p.numel() for p in served[name].target.model.parameters() if p.data_ptr() in places)
        for name in names
    ]
    whole = sum(p.numel() for p in base.parameters())
    assert shared[0] == whole
    assert all(0 < part <= whole for part in shared[1:]), (shared, whole)
    assert min(shared) < whole


@pytest.mark.long
def test_runs_are_merged_and_the_base_is_not(monkeypatch):
    monkeypatch.chdir(RUNS.parent)
    names = ("lora", "rosa", "spiel")
    served = loaded(*names, drafter=None)
    base = served["base"].target.model
    for name in names:
        alone, model = load_trained(str(RUNS / name)), served[name].target.model
        assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
        fresh = alone.base.load(torch.float32)
        assert all(map(torch.equal, fresh.parameters(), base.parameters()))
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, alone.model(IDS).logits)


def class_of(name):
    """The class of a file of conf/adapter, or of the one that it extends."""
    node = yaml.safe_load((schema.CONF / f"adapter/{name}.yaml").read_text())
    return node.get("_target_") or class_of(node["defaults"][0])


LISTED = [name for name in schema.options("adapter") if class_of(name) in KEEP_THE_BASE]


@pytest.mark.long
@pytest.mark.parametrize("name", LISTED)
def test_an_adapter_that_is_listed_keeps_the_base(tiny, name):
    """One that shares all tensors while it is attached must not write into them."""
    config = composed(f"adapter={name}", "base=tiny", "task.path=x").adapter
    shared = SharedBase()
    shared.copies = False
    model = shared.load(tiny, torch.float32, None, "cpu")
    fresh = tiny.load(torch.float32)
    adapter = instantiate(config)
    model = adapter.attach(model, Start())
    state = adapter.state(model)
    adapter.load_state(model, {**state, "tensors": {k: v + 1 for k, v in state["tensors"].items()}})
    assert all(map(torch.equal, fresh.parameters(), shared.model.parameters()))
    assert {*tensors(shared.model)} <= {*tensors(model)}


def test_copies_that_did_not_change_are_shared_again(tiny):
    shared = SharedBase()
    model = shared.load(tiny, torch.float32, None, "cpu")
    assert not {*tensors(model)} & {p.data_ptr() for p in shared.model.parameters()}
    changed = model.model.layers[0].self_attn.q_proj.weight
    changed.data[0, 0] += 1
    shared.share()
    apart = {p.data_ptr() for p in model.parameters()} - {*tensors(shared.model)}
    assert apart == {changed.data_ptr()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": "nf4"}, "base.quantization is none for the first and nf4 for another"),
        ({"add_tokens": ("x",)}, r"base.add_tokens is \[\] for the first and \['x'\]"),
    ],
)
def test_runs_of_another_base_are_refused(tiny, change, message):
    shared = SharedBase()
    shared.load(tiny, torch.float32, None, "cpu")
    with pytest.raises(BaseError, match=message):
        shared.load(dataclasses.replace(tiny, **change), torch.float32, None, "cpu")
    with pytest.raises(BaseError, match="precision is float32 for the first and bfloat16"):
        shared.load(tiny, torch.bfloat16, None, "cpu")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a/"], ["a"]),
        (["runs/a@best", "runs/a"], ["a@best", "a"]),
        (["one/a", "two/a"], ["one/a", "two/a"]),
        (["runs/base"], ["runs/base"]),
    ],
)
def test_runs_have_names_that_differ(paths, names):
    assert models.names_of(paths) == names


def test_a_command_names_one_run_or_several():
    assert models.paths_of("a,b", None) == ["a,b"]
    assert models.paths_of(None, "[a, b]") == ["a", "b"]
