"""A drafter's LoRA in C, on the last places of each sequence, against merged weights in fp32; and
how often an output head is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.speed.test_few_rows import made, needs_library
from tests.toys.eagle import knobs, stirred
from tests.toys.eagle import made as drafter_of
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.drafters.lora_rows import RowLoRA
from trainer.drafters.uno import Uno
from trainer.speed import quick_layers, quick_passes
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

    def drafted(cast: Any) -> Tensor:
        cache = roomy(DynamicCache()) if cast else DynamicCache()
        with quick_passes.quick(model):
            states(model, cache, text)
            calls.clear()
            with lora.on(target, 5, last, cast):
                return states(model, cache, ids).float()

    ours = drafted(lora.cast(target))
    assert len(calls) == (2 if kind == "llama" else 0)
    assert all("low_rank" not in vars(module) for module in model.modules())
    torchs = drafted(None)
    assert not torch.equal(ours[:, split:], states(model, DynamicCache(), ids)[:, split:].float())
    error, usual = ((one - expected).square().mean() for one in (ours, torchs))
    assert error < 2 * usual  # a product of low rank is rounded once more


def uno_of(model: Any) -> Uno:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stirred(drafter_of(Uno, model, **knobs("uno", offsets=4, rank=2)))


def first_draft(drafter: Uno, target: Target) -> Tensor:
    """The logits of the first drafted token."""
    none = torch.zeros(0, 0)
    memory = drafter.start(target)
    update = TargetUpdate(none, none, torch.tensor([3, 4]), torch.tensor(5))
    growth = drafter.grow(memory, target, update)
    growth.first()
    return growth.extend(torch.tensor([0]), torch.tensor([-1]))[0]


@needs_library
def test_numbers_that_an_optimiser_changed_are_read():
    """Fused AdamW does not raise the versions of what it changes."""
    model = made()
    drafter, target = uno_of(model), Target(model)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=0.5, fused=True)
    before = first_draft(drafter, target)
    assert torch.equal(before, first_draft(drafter, target))
    for parameter in drafter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.allclose(before, first_draft(drafter, target), atol=0.1)


@needs_library
@torch.no_grad()
def test_layers_that_are_not_plain_are_computed_by_their_hooks(monkeypatch):
    """And the others in C, in the same pass."""
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    model = made()
    drafter, target = uno_of(model), Target(model)

    class Same(nn.Module):
        def __init__(self, base: Any):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    plain = first_draft(drafter, target)
    first: Any = model.model.layers[0].self_attn
    first.q_proj = Same(first.q_proj)
    with quick_passes.quick(model):
        drafted = first_draft(drafter, target)
        memory, none = drafter.start(target), torch.zeros(0, 0)
        for ids, before in (([3, 4], torch.tensor(5)), ([7], None)):
            drafter.grow(memory, target, TargetUpdate(none, none, torch.tensor(ids), before))
    torch.testing.assert_close(drafted, plain, atol=0.05, rtol=0.05)


@needs_library
@torch.no_grad()
def test_positions_of_several_rows_in_one_dimension_all_have_the_lora():
    """As experts that are shared get them."""
    model = made()
    lora, target = lora_of(model), Target(model)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(16, 64).bfloat16()
    at = lora.names.index("model.layers.0.mlp.up_proj")
    with pytest.raises(DrafterError, match="not called"), lora.on(target, 8, 8, lora.cast(target)):
        actual = layer(x)
    one: Any = lora.loras[at]
    torch.testing.assert_close(actual, one(x, layer(x)))


@needs_library
@torch.no_grad()
def test_a_layer_with_fewer_positions_is_refused(monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    model = made()
    lora, target = lora_of(model), Target(model)
    cache, cast = roomy(DynamicCache()), lora.cast(target)
    with quick_passes.quick(model):
        states(model, cache, torch.arange(4)[None])
        with pytest.raises(DrafterError, match="3 of 5 positions"), lora.on(target, 5, 2, cast):
            states(model, cache, torch.arange(3)[None])


@torch.no_grad()
def test_one_call_of_the_head_gives_the_logits_of_all_offsets():
    model: LlamaForCausalLM = made().float()
    drafter = uno_of(model)
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
