"""Adapters within the surviving entries of a pruned base: zeros stay zero, and the layer computes
what its merged weight computes."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch

from adapters import sparse
from adapters.delta import AdapterError, Start
from adapters.sparse import SparseDelta
from tests.adapters import test_spiel
from tests.toys import adapters as toys
from tests.toys.sparse import make as rosa
from trainer.exporting.compare import Mismatch
from trainer.exporting.merged import PRUNED, PRUNED_TOO, report_filled, zeros

ADAMW = partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
ROSA = {"alpha": 6.0, "within": "nonzero", "restart_after_mask": False, "gradient": "gathered"}
WAYS = {
    "rosa": {"mask": "gradient", "mask_steps": 2},
    "rosa, candidates": {"mask": "gradient", "scores": "candidates", "mask_steps": 2},
    "rosa, first": {"mask": "gradient", "scores": "first"},
    "rosa, random": {"mask": "random", "density": 0.4},
    "rosa, largest": {"mask": "magnitude", "density": 0.5},
    "masked low rank": {"schedule": "lora_only"},
    "sparse": {"schedule": "spa_only", "mask": "gradient", "score": "mean"},
    "spiel": {"variant": "AG"},
    "spiel_ma": {"variant": "MA", "momentum": 0.5},
}


def pruned(dtype=torch.float64):
    """A tiny Llama whose linears have the two largest of every four inputs."""
    model = toys.llama(dtype)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parts = module.weight.data.unflatten(1, (-1, 4))
            smallest = parts.abs().argsort(-1)[..., :2]
            parts.scatter_(-1, smallest, 0.0)
    return model


def weights(model):
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def adapter_of(way, **changes):
    settings = WAYS[way] | {"within": "nonzero"} | changes
    if way.startswith("spiel"):
        return test_spiel.make(**{"density": 0.2, "weight_decay": 0.0, **settings})
    return rosa(**{**ROSA, "density": 0.05, **settings})


def trained(adapter, model, steps=9):
    """Some steps of AdamW, whose loss is the model's."""
    model = adapter.attach(model, Start(steps=steps))
    optimizer = adapter.optimizer(adapter.parameter_groups(model), ADAMW)
    for step in range(steps):
        optimizer.zero_grad()
        toys.loss(model).backward()
        adapter.before_step(model, 1.0)
        optimizer.step()
        adapter.after_step(model, step + 1)
    return model.eval()


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_zeros_of_the_base_are_zeros_of_the_merged_weight(way):
    base = pruned()
    before = weights(base)
    adapter = adapter_of(way)
    model = trained(adapter, base)
    expected = toys.logits(model)
    for name, delta in ((n, layer.delta) for n, layer in sparse.layers(model)):
        if delta.has_support:
            assert (before[name].view(-1)[delta.indices.long()] != 0).all()
    merged = adapter.merge(model)
    after = weights(merged)
    for name, weight in before.items():
        assert (after[name][weight == 0] == 0).all(), name
        assert (after[name].view(len(weight), -1, 4).count_nonzero(-1) <= 2).all()
        assert not torch.equal(after[name], weight)
    assert torch.allclose(toys.logits(merged), expected, atol=1e-10)


@pytest.mark.long
def test_without_it_a_merged_update_fills_zeros():
    for adapter in (adapter_of("rosa", within="all"), adapter_of("spiel", within="all")):
        before, merged = weights(pruned()), weights(adapter.merge(trained(adapter, pruned())))
        assert any((merged[name][weight == 0] != 0).any() for name, weight in before.items())


def test_the_masked_layer_has_the_gradients_of_the_naive_formula():
    draw = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(8, 6, dtype=torch.float64)
    linear.weight.data[torch.rand(6, 8, generator=draw) < 0.5] = 0
    linear.requires_grad_(False)
    W, M = linear.weight.clone(), linear.weight != 0
    delta = SparseDelta(linear, 5, torch.float64)
    delta.confined, delta.scale = True, 1.5
    A, B = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((2, 8), (6, 2)))
    delta.A, delta.B = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())
    support = M.view(-1).nonzero().flatten()[:5].int()
    delta.values.data.copy_(torch.randn(5, generator=draw, dtype=torch.float64))
    delta.set_support(support, linear)
    x = torch.randn(7, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 6, generator=draw, dtype=torch.float64)
    y = delta.linear(linear, x)
    y.backward(dy)

    naive = {"x": x.detach().clone(), "A": A, "B": B, "S": delta.values.detach().clone()}
    naive = {name: tensor.requires_grad_() for name, tensor in naive.items()}
    S = torch.zeros(48, dtype=torch.float64).index_add(0, support.long(), naive["S"]).view(6, 8)
    expected = naive["x"] @ (W + S + 1.5 * M * (naive["B"] @ naive["A"])).T + linear.bias
    expected.backward(dy)
    assert torch.allclose(y, expected, atol=1e-12)
    gradients = {"x": x.grad, "A": delta.A.grad, "B": delta.B.grad, "S": delta.values.grad}
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, naive[name].grad, atol=1e-12), name
    delta.take_out(linear)
    assert torch.allclose(x @ delta.weight(W).T + linear.bias, expected, atol=1e-12)


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="keeps zeros of the base, and it has none"):
        adapter_of("rosa").attach(toys.llama(), Start(steps=9))
    with pytest.raises(AdapterError, match="that are not zero, and its density asks for"):
        adapter_of("rosa", density=0.6).attach(pruned(), Start(steps=9))
    other = rosa(mask="random", density=0.05, schedule="spa_only")
    other.attach(toys.llama(), Start(steps=9, folder=tmp_path))
    adapter = adapter_of("sparse", mask=str(tmp_path / "masks.safetensors"), density=0.05)
    with pytest.raises(AdapterError, match=r"entries of adapter.mask at .* are zeros of the base"):
        adapter.attach(pruned(), Start(steps=9))


def test_only_the_masked_low_rank_part_has_no_format_of_peft():
    for way, exportable in {"rosa": False, "sparse": True, "spiel": True}.items():
        adapter = adapter_of(way)
        adapter.attach(pruned(), Start(steps=9))
        assert adapter.exportable == exportable


def test_a_merged_lora_on_a_pruned_base_is_reported(caplog):
    base, adapter = pruned(torch.float32).requires_grad_(False), toys.lora()
    model = adapter.attach(base, Start(steps=9))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.ones_(parameter)
    with adapter.disabled(model):
        before = zeros(model)
    merged = copy.deepcopy(adapter.merge(model))
    with caplog.at_level(logging.WARNING, "trainer"):
        report_filled(before, zeros(merged), "all", PRUNED)
    assert "merging fills 100 % of its zeros: the pattern is lost" in caplog.text
    assert "adapter.within=nonzero" in caplog.text
    with pytest.raises(Mismatch, match=r"despite adapter.within=nonzero"):
        report_filled(before, zeros(merged), "nonzero", PRUNED)
    caplog.clear()
    report_filled((0, 100), (0, 100), "all", PRUNED)
    report_filled((50, 100), (50, 100), "nonzero", PRUNED)
    report_filled((8, 100), (0, 100), "all", PRUNED_TOO)
    assert not caplog.text
