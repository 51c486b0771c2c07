"""A mixture of low-rank experts against a loop over tokens and experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import io
from adapters.delta import AdaptedLinear, AdapterError, Start
from adapters.mola import MoLA, MoLAAdapter, numbers_of_experts
from tests.toys import adapters as toys

SCALE, RANK = 0.7, 2


def make(**changes: Any) -> MoLAAdapter:
    settings = {
        "experts": [2, 3],
        "top": 2,
        "rank": RANK,
        "alpha": SCALE * RANK,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "dtype": "float64",
        "train_modules": [],
    }
    return MoLAAdapter(**settings | changes)


def layer(experts: int, top: int) -> AdaptedLinear:
    torch.manual_seed(4)
    linear = nn.Linear(7, 5, dtype=torch.float64).requires_grad_(False)
    delta = MoLA(linear, experts, RANK, top, SCALE, 0.0, torch.float64)
    nn.init.normal_(delta.B)
    return AdaptedLinear(linear, delta)


def naive(adapted: Any, row: Tensor, top: int) -> Tensor:
    """One token, expert by expert."""
    delta, y = adapted.delta, adapted.base(row)
    scores = [float(r @ row) for r in delta.R.detach()]
    shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
    order = sorted(range(len(shares)), key=lambda e: -shares[e])[:top]
    for e in order:
        A, B = (f.detach() for f in (delta.A[RANK * e : RANK * e + RANK],
                                     delta.B[:, RANK * e : RANK * e + RANK]))  # fmt: skip
        y = y + SCALE * shares[e] / sum(shares[n] for n in order) * B @ (A @ row)
    return y


@pytest.mark.parametrize(("experts", "top"), [(1, 2), (2, 2), (5, 1), (5, 2), (5, 3)])
def test_each_token_is_answered_by_its_experts(experts, top):
    adapted = layer(experts, top)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    expected = torch.stack([naive(adapted, row, min(top, experts)) for row in x.view(12, 7)])
    torch.testing.assert_close(adapted(x).view(12, 5), expected)
    gates = adapted.delta.gates(x)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    assert ((gates > 0).sum(-1) == min(top, experts)).all()


def test_its_gradients_are_those_of_its_value():
    adapted = layer(3, 2)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
        parameters = {"delta.A": a, "delta.B": b, "delta.R": r}
        return torch.func.functional_call(adapted, parameters, (x,))

    delta = adapted.delta
    assert torch.autograd.gradcheck(of, (x, delta.A, delta.B, delta.R))
    adapted(x).square().sum().backward()
    assert delta.R.grad.abs().sum() > 0


def test_one_expert_is_lora():
    torch.manual_seed(3)
    model = make(experts=[1]).attach(toys.llama(), Start())
    other = toys.lora(rank=RANK, alpha=SCALE * RANK, dtype="float64").attach(toys.llama(), Start())
    for (_, mine), (_, theirs) in zip(io.deltas(model), io.deltas(other), strict=True):
        nn.init.normal_(mine.B.data, std=0.3)
        theirs.A.data, theirs.B.data = mine.A.data, mine.B.data
    torch.testing.assert_close(toys.logits(model), toys.logits(other))


def test_parts_of_the_depth_have_their_numbers_of_experts():
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(8)] + ["model.project"]
    names += [f"encoder.block.{n}.layer.0.q" for n in range(2)]
    linears: Any = [(name, nn.Identity()) for name in names]
    numbers = list(numbers_of_experts(linears, [2, 4, 6, 8]).values())
    assert numbers == [2, 2, 4, 4, 6, 6, 8, 8, 8, 2, 6]
    model = make().attach(toys.llama(), Start())
    assert {(name[:14], delta.R.shape[0]) for name, delta in io.deltas(model)} == {
        ("model.layers.0", 2),
        ("model.layers.1", 3),
    }
    for _, delta in io.deltas(model):
        n, (o, i) = delta.R.shape[0], (delta.B.shape[0], delta.A.shape[1])
        assert sum(p.numel() for p in delta.parameters()) == n * (RANK * (i + o) + i)


def test_it_decodes_with_and_without_a_cache_alike():
    torch.manual_seed(3)
    model = make().attach(toys.llama(), Start()).eval()
    for _, delta in io.deltas(model):
        nn.init.normal_(delta.B.data, std=0.3)
    plain = toys.llama()
    settings: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (
        model.generate(toys.IDS, use_cache=cache, **settings) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, plain.generate(toys.IDS, **settings))


def test_merging_and_saving_are_refused_with_the_reason(tmp_path):
    adapter = make()
    model = adapter.attach(toys.llama(), Start())
    before = toys.logits(model)
    for merge in (adapter.refuse_merging, lambda: adapter.merge(model)):
        with pytest.raises(AdapterError, match="MoLAAdapter depends on the input, so no weight"):
            merge()
    with pytest.raises(AdapterError, match="routes each token, which no format of PEFT"):
        adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    assert torch.equal(toys.logits(model), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experts", [[], [2, 0], [2, 2.5]])
def test_numbers_of_experts_that_make_no_sense_are_refused(experts):
    with pytest.raises(AdapterError, match=r"adapter.experts=\[.*as \[2,4,6,8\]"):
        make(experts=experts)
