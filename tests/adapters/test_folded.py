"""Deltas merged for a while: the same answers, and afterwards the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adapters.delta import AdaptedLinear, Start, switched_off
from adapters.folded import SPARE, folded, merge_to_write
from tests.toys import adapters as toys
from tests.toys import sparse


def adapted(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    adapter = toys.lora() if kind == "lora" else sparse.make()
    model = adapter.attach(toys.llama(dtype), Start(data=toys.batches)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".B", ".values")):
            nn.init.normal_(parameter, std=0.1)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for layer in layers:
        layer.delta.take_out(layer.base)
        layer.delta.fold_in(layer.base)
    return model, layers


@pytest.mark.parametrize("kind", ["lora", "rosa"])
def test_folded_layers_answer_the_same_and_get_their_bits_back(kind):
    model, layers = adapted(kind)
    expected = toys.logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with switched_off(model):
        base = toys.logits(model)
    assert not torch.allclose(expected, base)
    with folded(model) as count:
        assert count == len(layers) > 0
        assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
        torch.testing.assert_close(toys.logits(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(toys.logits(model), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_error_while_answering_leaves_no_merged_weight():
    model, layers = adapted("lora", torch.float32)
    places = [layer.base.weight.data_ptr() for layer in layers]
    merged = []

    def fail():
        with folded(model):
            merged.extend(layer.base.weight.data_ptr() for layer in layers)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not set(merged) & set(places)
    assert [layer.base.weight.data_ptr() for layer in layers] == places
    assert layers == [m for m in model.modules() if isinstance(m, AdaptedLinear)]


def test_a_base_that_answers_alone_is_not_folded():
    model, _ = adapted("lora")
    with switched_off(model):
        base = toys.logits(model)
        with folded(model) as count:
            assert count == 0
            assert torch.equal(toys.logits(model), base)
        assert torch.equal(toys.logits(model), base)


def test_shared_and_trained_weights_and_short_memory_are_left_alone():
    model, layers = adapted("lora")
    layers[0].base.weight.requires_grad_(True)
    model.model.embed_tokens.other = layers[1].base.weight
    with folded(model) as count:
        assert count == len(layers) - 2
    layer = layers[2]
    needed = sum(layer.base.weight.nbytes for layer in layers[2:])
    with folded(model, SPARE * needed) as count:
        assert count == len(layers) - 2
    with folded(model, SPARE * needed - 1) as count:
        assert count == 0
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("kind", ["lora", "rosa"])
def test_a_model_that_only_writes_is_merged_and_others_keep_the_weights(kind):
    model, layers = adapted(kind)
    expected, shared = toys.logits(model), layers[0].base.weight
    layers[0].delta.take_out(layers[0].base)
    kept = shared.clone()
    assert merge_to_write(model, 0) == 0
    assert merge_to_write(model) == len(layers)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    torch.testing.assert_close(toys.logits(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(shared, kept)
