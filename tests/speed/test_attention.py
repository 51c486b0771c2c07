"""Attention of the trainer against loops and torch, and which kernels compute it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.speed.test_fused import grads, rows
from tests.toys import adapters as toys
from trainer.speed import attention, attention_choice, flash_pieces, fused
from trainer.speed.attention import BLOCKS, FLASH, Plans
from trainer.speed.attention_choice import PAIRS, Choice, Shape


def naive(q, k, v, scale, sees):
    """Attention position by position, in float64."""
    (B, H, T, _), K = q.shape, k.shape[1]
    rows = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                seen = [s for s in range(T) if sees(b, t, s)]
                scores = torch.stack(
                    [scale * (q[b, h, t] * k[b, h // (H // K), s]).sum() for s in seen]
                )
                chances = scores.softmax(0)
                rows.append(
                    sum(p * v[b, h // (H // K), s] for p, s in zip(chances, seen, strict=True))
                )
    return torch.stack(rows).view(B, T, H, -1)


def heads(B, H, K, T, d, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(B, n, T, d, dtype=dtype, requires_grad=True) for n in (H, K, K)]


SIGHTS = {
    "causal": lambda b, t, s: s <= t,
    "documents": lambda b, t, s: s <= t and (s < 3 + b) == (t < 3 + b),
    "window": lambda b, t, s: t - 4 < s <= t,
    "both ways": lambda b, t, s: True,
    "padded": lambda b, t, s: s <= t and s < 7 - b,
    "padded documents": lambda b, t, s: s <= t and (s < 3) == (t < 3) and s < 8 - b,
}


@pytest.mark.long
@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("kernels", PAIRS)
@pytest.mark.parametrize("kind", SIGHTS)
def test_attention_is_that_of_loops(kind, kernels, block):
    B, T = 2, 10
    q, k, v = heads(B, 6, 2, T, 4)
    sees = SIGHTS[kind]
    mask = torch.tensor([[[[sees(b, t, s) for s in range(T)] for t in range(T)]] for b in range(B)])
    plans = attention.plans_of_mask(mask, torch.float64, block)
    if kind == "causal":
        assert attention.causal_plan(T, torch.float64, q.device, block)[-1][:4] == plans[0][-1][:4]
        plans = [attention.causal_plan(T, torch.float64, q.device, block)]
    plans = Plans(plans, flash_pieces.of_mask(mask))
    upstream = torch.randn(B, T, 6, 4, dtype=torch.float64)
    actual = attention.attention(q, k, v, 0.5, plans, kernels)
    expected = naive(q, k, v, 0.5, sees)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_only_what_some_query_sees_is_multiplied():
    T = 256
    document = torch.arange(T) // 64
    mask = (document[:, None] == document) & (torch.arange(T)[:, None] >= torch.arange(T))
    (plan,) = attention.plans_of_mask(mask[None, None], torch.float32)
    assert [entry[:4] for entry in plan] == [(a, a + 64, a, a + 64) for a in range(0, T, 64)]


def test_masks_that_blocks_cannot_hold_are_left_to_transformers():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert attention.plans_of_mask(mask, torch.float32) is not None
    assert (
        attention.plans_of_mask(mask.expand(1, 2, 4, 4), torch.float32) is None
    )  # heads may differ
    mask[0, 0, 2] = False  # a query that sees nothing
    assert attention.plans_of_mask(mask, torch.float32) is None


@pytest.mark.parametrize("kernels", PAIRS)
def test_gradients_in_bf16_are_as_near_as_those_of_torch(kernels):
    q, k, v = heads(2, 6, 2, 150, 16, torch.float32)
    upstream = torch.randn(2, 150, 6, 16)

    def errors(dtype, attend):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        exact = [x.detach().to(dtype).double().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(attend(*inputs), inputs, upstream.to(dtype))
        expected = torch.autograd.grad(dense(*exact), exact, upstream.to(dtype).double())
        return [
            float((g.double() - w).norm() / w.norm()) for g, w in zip(grads, expected, strict=True)
        ]

    def dense(q, k, v):
        several = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, *several, is_causal=True).transpose(
            1, 2
        )

    def ours(q, k, v):
        plans = attention.causal(150, torch.float32, q.device)
        return attention.attention(q, k, v, 0.25, plans, kernels)

    for actual, theirs in zip(
        errors(torch.bfloat16, ours), errors(torch.bfloat16, dense), strict=True
    ):
        assert actual < 1.3 * theirs
    assert max(errors(torch.float32, ours)) < 2e-6


def test_masks_are_cut_into_causal_pieces():
    """Packed rows are pieces of their own, and padding is split off."""
    T, document = 12, torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
    causal = torch.arange(T)[:, None] >= torch.arange(T)
    packed = (document[:, None] == document) & causal
    padded = causal & (torch.arange(T) < 7)
    window = causal & (torch.arange(T) > torch.arange(T)[:, None] - 3)
    pieces = flash_pieces.of_mask(torch.stack([packed, padded, window])[:, None])
    assert [(p[:4], p.causal, p.mask is None) for row in pieces for p in row] == [
        ((0, 3, 0, 3), True, True),
        ((3, 8, 3, 8), True, True),
        ((8, 12, 8, 12), True, True),
        ((0, 7, 0, 7), True, True),
        ((7, 12, 0, 7), False, True),
        ((0, 12, 0, 12), False, False),
    ]


def test_a_bias_of_the_scores_is_kept():
    T = 10
    q, k, v = heads(2, 6, 2, T, 4)
    bias = -(torch.arange(T)[:, None] - torch.arange(T)).double().abs() / 4
    mask = bias.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))[None, None]
    mask = mask.expand(2, 1, T, T)
    several = (x.repeat_interleave(3, 1) for x in (k, v))
    expected = nn.functional.scaled_dot_product_attention(q, *several, attn_mask=mask, scale=0.5)
    for pair in PAIRS:
        plans = attention.of_mask(mask, torch.float64, True)
        actual = attention.attention(q, k, v, 0.5, plans, pair)
        torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("setting", attention_choice.NAMES)
def test_a_model_trains_the_same_with_each_kernel(setting, packed):
    shape = Shape(1, 8, "float32", 1)
    plain: Any = toys.llama(torch.float32, vocab_size=97)
    ours = copy.deepcopy(plain)
    fused.fuse(ours, attention_choice.choose(setting, shape, 80))
    loss, expected, _ = grads(plain, rows(packed), fused=False)
    found_loss, actual, _ = grads(ours, rows(packed))
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for name in expected:
        atol = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol)


def timed(blocks, causal, masked, length=128):
    """A choice by times that were not measured."""
    shape = Shape(3, 64, "bfloat16", 1)
    return Choice(attention_choice.machine(), shape, {str(length): [blocks, causal, masked]})


@pytest.mark.parametrize(
    ("times", "pair"),
    [
        (([10, 20], [30, 40], [60, 80]), (BLOCKS, BLOCKS)),
        (([10, 20], [5, 40], [10, 80]), (FLASH, BLOCKS)),
        (([10, 20], [5, 10], [10, 80]), (FLASH, FLASH)),
        (([10, 20], [9, 20], [10, 80]), (BLOCKS, BLOCKS)),  # less than a measurement errs by
    ],
)
def test_the_fastest_kernels_are_taken(times, pair):
    causal = attention.causal(128, torch.float32, torch.device("cpu"))
    assert timed(*times).kernels(causal, torch.bfloat16) == pair
    causal = attention.causal(128, torch.float32, torch.device("cpu"))
    assert timed(*times).kernels(causal, torch.float32) == (BLOCKS, BLOCKS)  # was not timed


def test_a_mask_is_judged_by_what_it_leaves():
    """Blocks skip what nobody sees; the flash kernel computes a whole piece."""
    T = 1024
    choice = timed([10.0, 20.0], [5.0, 30.0], [10.0, 60.0], T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    window = causal & ~causal.tril(-32)
    document = torch.arange(T) // 512
    packed = causal & (document[:, None] == document)
    masks = {"causal": causal, "window": window, "packed": packed}
    chosen = {
        name: choice.kernels(
            attention.of_mask(mask[None, None], torch.float32, True), torch.bfloat16
        )
        for name, mask in masks.items()
    }
    assert chosen == {
        "causal": (FLASH, BLOCKS),
        "window": (BLOCKS, BLOCKS),
        "packed": (FLASH, BLOCKS),
    }


def test_times_are_measured_once_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    shape, measured = Shape(2, 8, "float32", 1), []
    plain = attention_choice._measure

    def counting(shape, lengths):
        measured.append(lengths)
        return plain(shape, lengths)

    monkeypatch.setattr(attention_choice, "_measure", counting)
    assert attention_choice.choose("auto", shape, 100) is None  # shorter than all timed rows
    first = attention_choice.choose("auto", shape, 300)
    assert list(first.times) == ["128", "256"]
    assert attention_choice.choose("auto", shape, 300) == first
    longer = attention_choice.choose("auto", shape, 600)
    assert longer.times.items() > first.times.items()
    assert measured == [[128, 256], [512]]
    for file in (tmp_path / "attention").iterdir():
        file.write_text("{")
    assert attention_choice.choose("auto", shape, 128) is not None
    monkeypatch.setattr(attention_choice, "processor", lambda: "another machine of the same home")
    attention_choice.choose("auto", shape, 128)
    assert measured[2:] == [[128], [128]]


def test_measuring_draws_nothing_from_the_runs_generators():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    attention_choice._measure(Shape(2, 8, "float32", 1), [128])
    assert torch.equal(torch.rand(3), expected)


def test_a_record_is_read_back_and_anything_else_is_not(monkeypatch):
    choice = timed([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])
    content = json.loads(json.dumps(choice.record()))
    assert attention_choice.recorded(content) == choice
    fixed = Choice(choice.machine, choice.shape, fixed=(FLASH, BLOCKS))
    assert attention_choice.recorded(json.loads(json.dumps(fixed.record()))) == fixed
    for damage in (
        {"machine": "other"},
        {"shape": [1]},
        {"shape": [1, 2, "load", 1]},
        {"times": {"0": [[1, 2]] * 3}},
        {"times": {"128": [[1, 2]] * 2}},
        {"times": {"128": 3}},
        {"times": None},
        {"fixed": ["blocks", "other"]},
    ):
        assert attention_choice.recorded(content | damage) is None
    assert attention_choice.recorded(None) is None
