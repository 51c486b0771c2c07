"""SparseGPT, Wanda and magnitude against naive references in float64."""

from __future__ import annotations

import pytest
import torch

from trainer.models.base import BaseError
from trainer.shrinking import magnitude, sparsegpt, wanda
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.sparsegpt import Gram

PATTERNS = [Pattern.of("2:4"), Pattern.of("4:8"), Pattern.of("unstructured", 0.4)]


def problem(rows=8, inputs=16, tokens=200, seed=0):
    """A weight, and correlated inputs of which one is always 0."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=draw, dtype=torch.float64) @ mix
    x[:, 5] = 0
    return torch.randn(rows, inputs, generator=draw, dtype=torch.float64), x


def gram_of(x):
    gram = Gram()
    for part in x.split(7):
        gram.add(part)
    return gram


def naive_sparsegpt(weight, x, pattern, block):
    """Optimal brain surgeon, row by row, with the inverse of each remaining Hessian."""
    inputs = x.shape[1]
    hessian = 2 / len(x) * x.T @ x
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(inputs, dtype=x.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(inputs)]
    w = weight.clone()
    w[:, dead] = 0
    gone = torch.zeros(w.shape, dtype=torch.bool)
    for j in range(inputs):
        group = pattern.group or block
        if j % group == 0:
            stop = min(j + group, inputs)
            cost = torch.stack([w[:, p] ** 2 / inverses[p][0, 0] for p in range(j, stop)], 1)
            if pattern.group:
                for row in range(len(w)):
                    order = cost[row].argsort()[: group - pattern.stays]
                    gone[row, j + order] = True
            else:
                count = round((1 - pattern.density) * cost.numel())
                for place in cost.flatten().argsort()[:count].tolist():
                    gone[place // (stop - j), j + place % (stop - j)] = True
        for row in range(len(w)):
            if gone[row, j]:
                step = w[row, j] / inverses[j][0, 0]
                w[row, j:] -= step * inverses[j][0]
                w[row, j] = 0
    return w


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern, block, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    weight, x = problem()
    pruned = sparsegpt.prune(weight, gram_of(x), pattern)
    expected = naive_sparsegpt(weight, x, pattern, block)
    assert torch.equal(pruned == 0, expected == 0)
    assert torch.allclose(pruned, expected, atol=1e-10)
    assert (pruned[:, 5] == 0).all()  # the dead input
    if pattern.group:
        assert pattern.follows(pruned)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_wanda_is_a_double_loop(pattern):
    weight, x = problem()
    norms = wanda.InputNorms()
    for part in x.split(7):
        norms.add(part)
    pruned = wanda.prune(weight, norms.norms, pattern)
    expected = weight.clone()
    for row in range(len(weight)):
        scores = [abs(weight[row, j]) * x[:, j].norm() for j in range(16)]
        step = pattern.group or 16
        count = pattern.stays if pattern.group else round(pattern.density * 16)
        for start in range(0, 16, step):
            order = sorted(range(start, start + step), key=lambda j: float(scores[j]))
            expected[row, order[: step - count]] = 0
    assert torch.equal(pruned, expected)


def test_on_correlated_inputs_each_method_loses_less_than_the_simpler_one():
    pattern = Pattern.of("2:4")
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(400, 32, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(32, 32, generator=draw, dtype=torch.float64) * torch.logspace(-1, 1, 32)
    weight = torch.randn(64, 32, generator=draw, dtype=torch.float64)
    norms = wanda.InputNorms()
    norms.add(x)
    results = [
        sparsegpt.prune(weight, gram_of(x), pattern),
        wanda.prune(weight, norms.norms, pattern),
        magnitude.prune(weight, pattern),
    ]
    lost = [float((x @ (weight - result).T).norm()) for result in results]
    assert lost[0] < lost[1] < lost[2]
    assert all(pattern.follows(result) for result in results)


def test_magnitude_keeps_the_largest_and_the_dtype():
    weight = torch.tensor([[1.0, -3.0, 0.5, 2.0, 0, 0, 1e-3, 0]]).bfloat16()
    pruned = magnitude.prune(weight, Pattern.of("2:4"))
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned[0, :4], torch.tensor([0, -3.0, 0, 2.0]).bfloat16())


def test_inputs_without_a_covariance_are_refused_by_name():
    gram = Gram()
    gram.add(torch.full((4, 8), float("nan")))
    with pytest.raises(BaseError, match="method=sparsegpt: the inputs of a layer"):
        sparsegpt.prune(torch.ones(2, 8), gram, Pattern.of("2:4"))
