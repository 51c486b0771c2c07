"""Factors of few values against loops over their entries, and their packed file."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import compress
from adapters.bilora import BiLoRA, levels, rounded
from adapters.delta import AdaptedLinear
from adapters.errors import AdapterError

LEVELS = {1: [-0.6745, 0.6745], 2: [-1.266, -0.378, 0.378, 1.266]}  # of the authors' iteration


def naive(w: Any, bits: int) -> torch.Tensor:
    """Each entry by its nearest level, in the units of the whole tensor."""
    numbers = [float(x) for x in w.flatten()]
    mean, spread = statistics.fmean(numbers), statistics.stdev(numbers)
    result = []
    for x in numbers:
        u = (x - mean) / (spread + 1e-5)
        result.append(min(levels(bits), key=lambda level: abs(level - u)) * spread + mean)
    return torch.tensor(result, dtype=torch.float64).view(w.shape)


def layer(bits: int, fused: bool) -> AdaptedLinear:
    torch.manual_seed(4)
    linear = nn.Linear(7, 5, dtype=torch.float64).requires_grad_(False)
    delta = BiLoRA(linear, 3, 0.7, 0.0, torch.float64, fused, bits)
    nn.init.normal_(delta.B, mean=0.1)
    return AdaptedLinear(linear, delta)


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_those_of_the_authors_iteration(bits):
    assert list(levels(bits)) == pytest.approx(LEVELS[bits], abs=1e-3)


def test_sixteen_levels_are_the_medians_of_their_intervals():
    points = torch.tensor(levels(4), dtype=torch.float64)
    assert len(points) == 16
    torch.testing.assert_close(points, -points.flip(0), rtol=0, atol=1e-6)
    cdf = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).cdf
    inner = (points[1:] + points[:-1]) / 2
    low, high = cdf(inner[:-1]), cdf(inner[1:])
    torch.testing.assert_close(cdf(points[1:-1]), (low + high) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_layer_computes_with_rounded_factors_and_their_gradients(bits, fused):
    adapted = layer(bits, fused)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    upstream = torch.randn(2, 6, 5, dtype=torch.float64)
    y = adapted(x)
    (y * upstream).sum().backward()
    A, B = (naive(f.detach(), bits) for f in (adapted.delta.A, adapted.delta.B))
    w, rows, gradients = adapted.base.weight, x.reshape(12, 7), upstream.reshape(12, 5)
    expected = torch.stack([w @ row + 0.7 * B @ (A @ row) + adapted.base.bias for row in rows])
    torch.testing.assert_close(y.reshape(12, 5), expected)
    torch.testing.assert_close(adapted.delta.weight(w), w + 0.7 * B @ A)
    reference = 0.7 * sum(torch.outer(g, A @ row) for g, row in zip(gradients, rows, strict=True))
    torch.testing.assert_close(adapted.delta.B.grad, reference)
    reference = 0.7 * sum(torch.outer(B.T @ g, row) for g, row in zip(gradients, rows, strict=True))
    torch.testing.assert_close(adapted.delta.A.grad, reference)


def test_zeros_stay_zero_and_learn_more_than_their_mean():
    assert not rounded(torch.zeros(4, 3), 1).any()
    adapted = layer(1, True)
    nn.init.zeros_(adapted.delta.B)
    optimizer = torch.optim.SGD(adapted.delta.parameters(), lr=0.1)
    adapted(torch.randn(9, 7, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert len(adapted.delta.B.unique()) == 15
    assert len(adapted.delta.factors()[1].unique()) == 2


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_packed_file_has_as_many_bits_and_the_same_numbers(tmp_path, bits):
    torch.manual_seed(0)
    tensors = {
        f"{name}.{key}": rounded(torch.randn(shape), bits)
        for name in ("q_proj", "v_proj")
        for key, shape in (("lora_A.weight", (16, 211)), ("lora_B.weight", (128, 16)))
    } | {"score.weight": torch.randn(2, 8), "k_proj.lora_B.weight": torch.zeros(4, 2)}
    file = tmp_path / "compact.safetensors"
    coded = [key for key in tensors if "lora" in key]
    compress.write(file, tensors, coded)
    read = compress.read(file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
    entries = sum(tensors[key].numel() for key in coded)
    assert entries * bits / 8 <= file.stat().st_size < entries * bits / 8 + 1000


def test_a_packed_file_that_is_cut_off_is_refused(tmp_path):
    file = tmp_path / "compact.safetensors"
    compress.write(file, {"x.lora_A.weight": rounded(torch.randn(8, 8), 1)}, ["x.lora_A.weight"])
    stored = load_file(file)
    assert len(stored[":levels"]) == 8
    save_file(stored | {":levels": stored[":levels"][:4]}, file, {"format": compress.WITH_LEVELS})
    with pytest.raises(AdapterError, match=r"compact.safetensors: its stream :levels is cut off"):
        compress.read(file)
