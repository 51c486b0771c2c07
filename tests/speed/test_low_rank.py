"""A drafter's LoRA in C, on the last places of each sequence, against merged weights in fp32; and
how often an output head is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.speed.test_few_rows import made, needs_library
from tests.toys.eagle import knobs, stirred
from tests.toys.eagle import made as drafter_of
from trainer.drafters import Target, TargetUpdate
from trainer.drafters.lora_rows import RowLoRA
from trainer.drafters.uno import Uno
from trainer.speed import few_rows, quick_layers, quick_passes
from trainer.speed.roomy_cache import roomy


def model_of(kind: str) -> Any:
    if kind == "llama":
        return made()
    return made(Qwen3ForCausalLM, Qwen3Config)


def lora_of(model: Any, rank: int = 5) -> RowLoRA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stirred(RowLoRA(model, rank, 2.0 * rank, "all-linear"))


def with_merged_weights(model: Any, lora: RowLoRA) -> Any:
    other = copy.deepcopy(model).float()
    pairs = lora.tensors()
    with torch.no_grad():
        for name in lora.names:
            delta = 2.0 * pairs[f"{name}.B"] @ pairs[f"{name}.A"]
            other.get_submodule(name).weight += delta
    return other


@torch.no_grad()
def states(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return model.model(input_ids=ids, past_key_values=cache).last_hidden_state


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("last", [1, 3, 5])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_last_places_of_a_pass_have_the_merged_weights(kind, rows, last, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    model = model_of(kind)
    lora, target = lora_of(model), Target(model)
    merged, wide = with_merged_weights(model, lora), copy.deepcopy(model).float()
    text, ids = torch.arange(rows * 7).view(rows, 7), 20 + torch.arange(rows * 5).view(rows, 5)
    split = 5 - last

    exact = DynamicCache()
    states(wide, exact, text)
    expected = [states(wide, exact, ids[:, :split])] if split else []
    expected = torch.cat([*expected, states(merged, exact, ids[:, split:])], dim=1)

    calls: list[int] = []
    original = quick_layers._computed
    monkeypatch.setattr(quick_layers, "_computed", lambda *a: calls.append(1) or original(*a))

    def drafted(grad: bool) -> Tensor:
        cache = roomy(DynamicCache())
        with quick_passes.quick(model):
            states(model, cache, text)
            calls.clear()
            with torch.set_grad_enabled(grad), lora.on(target, rows=5, last=last):
                out = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
        return out.detach().float()

    ours = drafted(grad=False)
    assert len(calls) == (2 if kind == "llama" else 0)
    assert all("low_rank" not in vars(module) for module in model.modules())
    with monkeypatch.context() as patch:
        patch.setattr(few_rows, "library", lambda: None)
        patch.setenv("GRAFT_PLAIN_DECODING", "1")
        torchs = drafted(grad=False)
    assert not torch.equal(ours[:, split:], states(model, DynamicCache(), ids)[:, split:].float())
    error, usual = ((one - expected).square().mean() for one in (ours, torchs))
    assert error < 2 * usual  # a product of low rank is rounded once more


@needs_library
@torch.no_grad()
def test_trained_numbers_are_read_again():
    model = made()
    lora, target = lora_of(model), Target(model)
    ids = torch.arange(4)[None]

    def drafted() -> Tensor:
        with lora.on(target, rows=4, last=4):
            return states(model, DynamicCache(), ids)

    before = drafted()
    assert torch.equal(before, drafted())
    for parameter in lora.parameters():
        parameter.mul_(0)
    assert torch.equal(drafted(), states(model, DynamicCache(), ids))


@needs_library
@torch.no_grad()
def test_a_layer_that_is_not_called_is_named():
    model = made()
    lora, target = lora_of(model), Target(model)
    with pytest.raises(Exception, match="not called"), lora.on(target, rows=4, last=4):
        pass


@torch.no_grad()
def test_one_call_of_the_head_gives_the_logits_of_all_offsets():
    model: LlamaForCausalLM = made().float()
    drafter = drafter_of(Uno, model, **knobs("uno", offsets=4, rank=2)).eval()
    target, none = Target(model), torch.zeros(0, 0)
    heads: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: heads.append(args[0].shape[-2]))
    update = TargetUpdate(none, none, torch.tensor([3, 4]), torch.tensor(5))
    growth = drafter.grow(drafter.start(target), target, update)
    growth.first()
    for k in range(3):
        growth.extend(torch.tensor([k]), torch.tensor([k - 1]))
    assert heads[-1] == 4
    assert heads.count(4) == 1
