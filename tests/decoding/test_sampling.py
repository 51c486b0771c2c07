"""The probabilities of sampling are those of plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.decoding.sampling import Sampling


def naive(logits, temperature, top_k, top_p):
    """The law of the next token over the values of a list."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k] if top_k else order
    weights = {i: math.exp(logits[i] / temperature) for i in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in kept:  # the fewest whose mass reaches top_p
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    rest = sum(weights[i] for i in nucleus)
    return [weights[i] / rest if i in nucleus else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.8])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4])
def test_probabilities_are_those_of_plain_loops(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, 20)
    law = Sampling(temperature, top_p, top_k).to_probabilities()
    expected = [naive(row, temperature, top_k, top_p) for row in logits.tolist()]
    torch.testing.assert_close(law(logits), torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_no_temperature_is_greedy():
    assert Sampling(0.0, 0.5, 3).to_probabilities() is None


def test_a_seed_repeats():
    first, second = (Sampling(1.0, seed=3).generator(torch.device("cpu")) for _ in range(2))
    assert torch.rand(3, generator=first).tolist() == torch.rand(3, generator=second).tolist()
    assert Sampling(1.0).generator(torch.device("cpu")) is None
