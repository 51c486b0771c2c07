"""Weights in the pattern 2:4: the choice of entries, SR-STE and PST, against loops and autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adapters import pst, sr_ste, two_of_four
from adapters.delta import AdapterError, Start
from adapters.linear import float_weight
from tests.toys import adapters as toys

DRAW = torch.Generator().manual_seed(5)


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=DRAW, dtype=dtype)


def by_loop(scores):
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(len(scores)):
        for group in range(0, scores.shape[1], 4):
            order = sorted(range(4), key=lambda at: (-float(scores[row, group + at]), at))
            for at in order[:2]:
                mask[row, group + at] = True
    return mask


def test_the_two_largest_of_four_stay():
    scores = drawn(6, 16)
    assert torch.equal(two_of_four.keep(scores), by_loop(scores))
    equal = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0, 1, 2, 2, 2]])
    assert torch.equal(two_of_four.keep(equal), by_loop(equal))
    sparse = scores * two_of_four.keep(scores.abs())
    assert two_of_four.follows(sparse)
    assert not two_of_four.follows(scores)
    assert not two_of_four.follows(drawn(2, 6))
    assert torch.equal(sparse * two_of_four.keep(sparse.abs()), sparse)  # idempotent


def srste(**changes):
    settings = {"decay": 0.1, "target_modules": "all-linear", "exclude_modules": []}
    return sr_ste.SrSte(**settings | changes)


def test_a_step_of_srste_is_that_of_its_formula():
    adapter, base = srste(), toys.llama()
    other = copy.deepcopy(base)
    model = adapter.attach(base, Start())
    model(input_ids=toys.IDS, labels=toys.IDS).loss.backward()
    adapter.before_step(model, 1.0)
    # By hand: masked weights as leaves, whose gradient passes to the dense ones.
    masks = {}
    for name, module in other.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            mask = masks[name] = by_loop(module.weight.detach().abs())
            with torch.no_grad():
                module.weight.mul_(mask)
    other(input_ids=toys.IDS, labels=toys.IDS).loss.backward()
    assert len(masks) == 14
    for name, mask in masks.items():
        dense = model.get_submodule(name).weight
        expected = other.get_submodule(name).weight.grad + 0.1 * ~mask * dense.detach()
        # transformers' loss is in fp32
        torch.testing.assert_close(dense.grad, expected, rtol=1e-4, atol=1e-8)
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in masks:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-8)


def test_the_merged_model_has_the_pattern_and_the_same_outputs():
    adapter = srste(decay=2e-4)
    model = adapter.attach(toys.llama(), Start(steps=3))
    toys.train(adapter, model, range(3))
    assert adapter.after_step(model, 3)["flips"] > 0  # the choice moves while it trains
    assert not two_of_four.follows(model.model.layers[0].mlp.up_proj.weight)  # dense underneath
    model.eval()
    before = toys.logits(model)
    merged = adapter.merge(model)
    assert torch.equal(toys.logits(merged), before)
    linears = [
        (name, module)
        for name, module in merged.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    assert all(type(module) is nn.Linear for _, module in linears)
    assert all(two_of_four.follows(module.weight) for _, module in linears)
    assert all((module.weight == 0).double().mean() == 0.5 for _, module in linears)


def test_layers_that_are_left_out_stay_dense():
    adapter = srste(exclude_modules=["down_proj"])
    merged = adapter.merge(adapter.attach(toys.llama(), Start()))
    assert two_of_four.follows(merged.model.layers[1].mlp.up_proj.weight)
    assert not two_of_four.follows(merged.model.layers[1].mlp.down_proj.weight)


def sparse_update(**changes):
    settings = {
        "rank": 3, "pattern": "unstructured", "sparsity": 0.5, "warmup": 0.25, "final": 0.25,
        "renew": 2, "target_modules": "all-linear", "exclude_modules": [], "dtype": "float64",
    }  # fmt: skip
    return pst.PSTAdapter(**settings | changes)


def straight_through(scores, zeros):
    """1 for all but the smallest scores, with the gradient of the scores."""
    hard = torch.ones_like(scores)
    for place in scores.detach().flatten().argsort()[:zeros]:
        hard.view(-1)[place] = 0.0
    return hard + scores - scores.detach()


def test_gradients_of_pst_are_those_of_its_formula():
    linear = nn.Linear(8, 6, dtype=torch.float64).requires_grad_(False)
    delta = pst.PST(linear, 3, torch.float64)
    for parameter in delta.parameters():
        nn.init.normal_(parameter, generator=DRAW)
    delta.choose(linear.weight, 20)
    x, dy = drawn(2, 5, 8).requires_grad_(), drawn(2, 5, 6)
    y = delta.linear(linear, x)
    mine = torch.autograd.grad(y, [x, *delta.parameters()], dy)
    U, V, A, B, R, C = (
        getattr(delta, name).detach().requires_grad_() for name in ("U", "V", "A", "B", "R", "C")
    )
    Z = linear.weight + U @ V
    S = Z.abs() + A @ B + R[:, None] + C[None]
    expected = x @ (straight_through(S, 20) * Z).t() + linear.bias
    torch.testing.assert_close(y, expected)
    by_name = dict(zip([name for name, _ in delta.named_parameters()], mine[1:], strict=True))
    theirs = torch.autograd.grad(expected, [x, U, V, A, B, R, C], dy)
    torch.testing.assert_close(mine[0], theirs[0])
    for name, grad in zip(("U", "V", "A", "B", "R", "C"), theirs[1:], strict=True):
        torch.testing.assert_close(by_name[name], grad)
    # the merged weight is the product's
    merged = x @ delta.weight(linear.weight).t() + linear.bias
    torch.testing.assert_close(y, merged)


def test_the_share_of_zeros_at_its_corners():
    adapter = sparse_update()
    adapter.steps = 40
    assert [adapter.share(step) for step in (0, 9, 10, 30, 40)] == [0, 0, 0, 0.5, 0.5]
    assert adapter.share(20) == pytest.approx(0.5 * (1 - 0.5**3))
    at_once = sparse_update(pattern="2:4")
    at_once.steps = 40
    assert [at_once.share(step) for step in (0, 9, 10, 40)] == [0, 0, 0.5, 0.5]
    assert sparse_update(warmup=0.0, final=1.0).share(0) == 0.5


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_merged_folder_has_exactly_its_zeros(pattern):
    torch.manual_seed(0)
    adapter = sparse_update(pattern=pattern)
    model = adapter.attach(toys.llama(), Start(steps=5))
    toys.train(adapter, model, range(5))
    deltas = {
        name: module.delta for name, module in model.named_modules() if hasattr(module, "delta")
    }
    before = toys.logits(model.eval())
    merged = adapter.merge(model)
    torch.testing.assert_close(toys.logits(merged), before, rtol=0, atol=1e-10)
    for name in deltas:
        weight = float_weight(merged.get_submodule(name))
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert two_of_four.follows(weight) == (pattern == "2:4")


def test_shapes_and_layers_that_do_not_fit_are_refused():
    odd = toys.llama(intermediate_size=126)
    for adapter, name in ((srste(), "sr_ste"), (sparse_update(pattern="2:4"), "pst")):
        with pytest.raises(AdapterError, match=f"adapter={name}: .*down_proj has 126 inputs"):
            adapter.attach(copy.deepcopy(odd), Start())
    sparse_update().attach(odd, Start())
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    for adapter in (srste(), sparse_update()):
        with pytest.raises(AdapterError, match="is a Conv1D, expected a plain"):
            adapter.attach(GPT2LMHeadModel(config), Start())
    with pytest.raises(AdapterError, match=r"adapter\.warmup=0\.6 and adapter\.final=0\.6"):
        sparse_update(warmup=0.6, final=0.6).attach(toys.llama(), Start())


def test_a_mask_is_part_of_a_checkpoint():
    adapter = sparse_update()
    model = adapter.attach(toys.llama(), Start(steps=4))
    toys.train(adapter, model, range(4))
    names = {name.rpartition(".")[2] for name in adapter.state(model)["tensors"]}
    assert names == {"U", "V", "A", "B", "R", "C", "mask"}


@pytest.mark.gpu
def test_sparse_kernels_multiply_a_merged_weight():
    weight = drawn(128, 256, dtype=torch.float32)
    weight = (weight * two_of_four.keep(weight.abs())).cuda().half()
    x = drawn(64, 256, dtype=torch.float32).cuda().half()
    compressed = torch.sparse.to_sparse_semi_structured(weight)
    got = nn.functional.linear(x, compressed)
    assert math.isfinite(float(got.abs().max()))
    torch.testing.assert_close(got, x @ weight.t(), rtol=2e-2, atol=0.2)
