"""One rotation of the whole model: nothing changes at full width, and a narrower one is the model
whose states are projected."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.toys import adapters as toys
from tests.toys.families import model_of
from trainer.models.base import BaseError
from trainer.shrinking import sliced
from trainer.shrinking.families import FAMILIES, layers_of
from trainer.shrinking.walk import walk

CPU = torch.device("cpu")
SHAPE = FAMILIES["llama"]
ROWS = [torch.arange(3, 3 + count) for count in (20, 31, 20)]


class Norm(nn.Module):
    """An RMSNorm in float64 with transformers' names."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def llama(**changes):
    """A Llama in float64 whose norms have weights of their own."""
    model = toys.llama(torch.float32, **changes).double()
    draw = torch.Generator().manual_seed(1)
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Norm(module))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=toys.IDS, use_cache=False).logits


def rotation(model, states):
    method = sliced.Sliced(states, model.config.hidden_size)
    walk(model, layers_of(model, SHAPE), ROWS, method, CPU)
    return method.rotation()


def test_a_rotation_without_slicing_changes_nothing():
    model = llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    before = logits(model)
    Q, share = rotation(model, 64)
    assert share == pytest.approx(1.0)
    torch.testing.assert_close(Q.t() @ Q, torch.eye(64, dtype=torch.float64))
    sliced.apply(model, layers_of(model, SHAPE), Q)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-11)


def test_a_narrower_model_is_the_one_with_projected_states():
    model = llama()
    dense = copy.deepcopy(model)
    Q, share = rotation(model, 48)
    assert 0.7 < share < 1.0
    sliced.apply(model, layers_of(model, SHAPE), Q)
    # by hand: what enters each norm, and each sum, is projected on the space that stays
    P = Q @ Q.t()
    embedding = dense.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, out: out @ P)
    for layer in layers_of(dense, SHAPE):
        for name in sliced.WRITE:
            layer.get_submodule(name).register_forward_hook(lambda _, __, out: out @ P)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-10)
    assert (logits(model) - logits(llama())).abs().max() > 0.1


def test_the_rotation_is_that_of_normalised_states_at_all_norms():
    model = llama()
    inputs = []
    for module in model.modules():
        if isinstance(module, Norm):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in ROWS:
            model.base_model(input_ids=row[None], use_cache=False)
    total = torch.zeros(64, 64, dtype=torch.float64)
    for states in inputs:
        for h in states:
            h = h / math.sqrt(float(h.square().mean()))
            total += torch.outer(h, h)
    assert len(inputs) == 5 * len(ROWS)
    method = sliced.Sliced(10, 64)
    walk(model, layers_of(model, SHAPE), ROWS, method, CPU)
    torch.testing.assert_close(method.sum, total, rtol=1e-9, atol=1e-9)
    Q, share = method.rotation()
    values = torch.linalg.eigvalsh(total).flip(0)
    torch.testing.assert_close((Q.t() @ total @ Q).diag(), values[:10])
    assert share == pytest.approx(float(values[:10].sum() / values.sum()))


@pytest.mark.parametrize("name", sliced.FAMILIES)
def test_stock_transformers_load_the_folder(name, tmp_path):
    model = model_of(name).float()
    layers = layers_of(model, FAMILIES[name])
    size = model.config.hidden_size
    method = sliced.Sliced(size - 8, size)
    walk(model, layers, ROWS, method, CPU)
    sliced.apply(model, layers, method.rotation()[0])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == size - 8
    assert not loaded.config.tie_word_embeddings
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, got = (each(input_ids=ids, use_cache=False).logits for each in (model, loaded))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(type(module).__module__ != sliced.__name__ for module in loaded.modules())


@pytest.mark.parametrize("name", sliced.FAMILIES)
def test_the_width_is_one_that_the_config_takes(name, tmp_path):
    config = model_of(name).config
    odd = config.num_attention_heads + 1
    config.head_dim = 8
    states = sliced.width(odd / config.hidden_size, config.hidden_size, 1, sliced.heads(config))
    config.hidden_size = states
    config.save_pretrained(tmp_path)
    assert (states == odd) == (sliced.heads(config) == 1)


def test_widths_and_families_that_do_not_fit():
    assert sliced.width(0.9, 576, 32) == 512
    # SmolLM2 has 9 heads, and its config wants a multiple of them
    assert sliced.heads(LlamaConfig(hidden_size=576, num_attention_heads=9)) == 9
    assert sliced.width(0.89, 576, 8, 9) == 504
    with pytest.raises(BaseError, match=r"multiples of 288, is 576, .*all\. .*or multiple=8$"):
        sliced.width(0.89, 576, 32, 9)
    with pytest.raises(BaseError, match=r"width=0\.99 of 64, in multiples of 32, is 64, .*all"):
        sliced.width(0.99, 64, 32)
    with pytest.raises(BaseError, match=r"width=0\.1 of 64, .*is 0, which leaves none"):
        sliced.width(0.1, 64, 32)
    with pytest.raises(BaseError, match=r"method=slice .*llama, .*and this is 'gemma2'"):
        sliced.check("gemma2")
