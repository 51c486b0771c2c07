"""Operations by formula against those that torch counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapters.delta import Start
from tests.toys import adapters as toys
from trainer.callbacks import progress
from trainer.models import flops
from trainer.models.flops import Counts, Work


@pytest.mark.parametrize("full", [False, True])
def test_the_formula_is_what_torch_counts(full):
    """torch counts all T x T products of attention, so the row's pairs are these here."""
    model: Any = toys.llama(torch.float32, vocab_size=97)
    model.set_attn_implementation("eager")
    if not full:
        toys.lora(fused=False).attach(model, Start())
    T = 12
    ids = torch.arange(T)[None] + 3
    counts = flops.count(model)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    wide = sum(width for width, _ in counts.attention)
    ours = counts.flop(T, T, ()) + 12 * wide * T * T
    # The first layer's input needs no gradient: not by its frozen weights, nor by what is attached.
    first = model.model.layers[0].self_attn
    missing = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(first, name)
        missing += layer.weight.numel() + (0 if full else layer.delta.A.numel())
    embedded = model.model.embed_tokens.weight.requires_grad
    assert counter.get_total_flops() == ours - (0 if embedded else 2 * T * missing)


def test_counts_of_a_llama():
    model: Any = toys.llama(torch.float32, vocab_size=97)
    body = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    toys.lora().attach(model, Start())
    counts = flops.count(model)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (counts.frozen, counts.trained) == (body, adapters)
    assert counts.head == 97 * model.config.hidden_size
    assert not counts.head_trained
    config = model.config
    width = config.num_attention_heads * config.head_dim
    assert counts.attention == ((width, None),) * config.num_hidden_layers


def test_pairs_are_those_that_a_mask_leaves():
    for n in (1, 2, 7):
        for window in (None, 1, 3, 9):
            seen = sum(1 for i in range(n) for j in range(i + 1) if not window or i - j < window)
            assert flops.pairs(n, window) == seen


def test_layers_by_their_kind():
    config = SimpleNamespace(
        num_hidden_layers=4,
        num_attention_heads=2,
        hidden_size=8,
        head_dim=None,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention", "linear_attention", "full_attention"],
    )
    assert flops._attention(config) == ((8, None), (8, 3), (8, None))
    counts = Counts(0, 0, 0, False, flops._attention(config))
    assert counts.flop(0, 0, [5, 2]) == 12 * 8 * (2 * (15 + 3) + (12 + 3))
    experts = SimpleNamespace(num_experts=8, num_experts_per_tok=2)
    assert flops._active(experts) == 0.25
    assert flops._active(SimpleNamespace()) == 1.0


def test_utilisation_is_the_part_of_the_peak():
    model: Any = toys.llama(torch.float32, vocab_size=97)
    work = Work.of(model, [4, 6], 1e9)
    counts = work.counts
    whole = counts.flop(10, 7, [4, 6])
    assert work.rate(10 / 0.5, 7 / 0.5) == pytest.approx(whole / 0.5)
    module, row = SimpleNamespace(work=work), {"tokens_per_s": 20.0, "trained_per_s": 14.0}
    part = whole / 0.5 / 1e9 / 2
    trainer: Any = SimpleNamespace(world_size=2)
    assert progress._of_peak(trainer, module, row).endswith(f" TFLOP/s, {part:.0%} of peak")
    assert progress._of_peak(trainer, SimpleNamespace(), row) == ""


def test_a_known_gpu_has_its_data_sheet(monkeypatch):
    for name, rate in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert flops.peak(torch.device("cuda"), torch.bfloat16)[0] == rate
    rate, source = flops.peak(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
    assert source == "measured"
