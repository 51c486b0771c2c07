"""Unstructured pruning with another share for each linear, found by a search: EvoPress (arXiv
2410.14649).

    count(l) = round(density i) + l round(step i)       entries of a row that stay at level l

A linear (o, i) goes up and down in levels of as many entries as all of its shape, so that every
candidate keeps as many. The search prunes the whole model's weights by magnitude, or by Wanda's
scores of the whole model's inputs; the result is then pruned by the method itself, layer by layer.

Differs from the paper: there a file holds SparseGPT's weights for each level. Here a level is a
mask over the one weight, and a byte for each entry says from which level on it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.models.base import BaseError
from trainer.shrinking.evolution import Candidate, Levels
from trainer.shrinking.families import linears_of
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.sparse import Sparse
from trainer.shrinking.walk import walk

MOST = 8  # levels above and below, as in the paper


class Norms(Sparse):
    """Reads the norms of the inputs of each linear, and changes nothing."""

    changes = False
    doing = "read inputs"

    def __init__(self, sparse: Sparse):
        super().__init__("wanda", sparse.pattern, sparse.part, sparse.shape)
        self.norms: dict[nn.Module, Tensor] = {}

    def change(self, layer: nn.Module) -> dict[str, Any]:
        """Keep the norms."""
        for name, linear in linears_of(layer, self.shape, self.part).items():
            self.norms[linear] = self._statistics[self._source[name]].norms
        self._statistics.clear()
        return {}


class Masks:
    """The levels of all linears. `space` has the candidates, and `uniform` is the one that keeps
    the same share of each."""

    def __init__(self, layers: nn.ModuleList, sparse: Sparse, step: float, device: torch.device):
        self.density, self.step, self.device = sparse.pattern.density, step, device
        self.linears = [
            list(linears_of(layer, sparse.shape, sparse.part).values()) for layer in layers
        ]
        weights = [linear for linears in self.linears for linear in linears]
        lowest, highest = bounds(weights, self.density, step)
        self.space = Levels(tuple(tuple(each.weight.shape) for each in weights), lowest, highest)
        self.uniform: Candidate = (0,) * len(weights)
        self.first: dict[nn.Module, Tensor] = {}  # the lowest level at which an entry stays, int8

    @torch.no_grad()
    def rank(self, linear: nn.Linear, scores: Float[Tensor, "o i"]) -> None:
        """Take the order of a linear's entries, those of the largest scores first."""
        base, step = counts(linear.in_features, self.density, self.step)
        order = scores.argsort(dim=-1, descending=True)
        ranks = torch.arange(linear.in_features, device=scores.device).expand_as(order)
        levels = (ranks - base).div(step, rounding_mode="floor") + 1
        levels = levels.clamp(self.space.lowest, self.space.highest + 1).to(torch.int8)
        self.first[linear] = torch.empty_like(levels).scatter_(-1, order, levels).to(self.device)

    def run_at(self, candidate: Candidate) -> Iterator[int]:
        """Yield each layer, pruned by a candidate while it is current."""
        levels = iter(candidate)
        for index, linears in enumerate(self.linears):
            whole = [linear.weight.data for linear in linears]
            try:
                for linear in linears:
                    stays = self.first[linear] <= next(levels)
                    linear.weight.data = linear.weight.data * stays
                yield index
            finally:
                for linear, weight in zip(linears, whole, strict=True):
                    linear.weight.data = weight

    def patterns(self, candidate: Candidate) -> dict[nn.Module, Pattern]:
        """Return the pattern of each linear."""
        levels = iter(candidate)
        result: dict[nn.Module, Pattern] = {}
        for linears in self.linears:
            for linear in linears:
                base, step = counts(linear.in_features, self.density, self.step)
                share = (base + next(levels) * step) / linear.in_features
                result[linear] = Pattern("unstructured", share)
        return result


def counts(inputs: int, density: float, step: float) -> tuple[int, int]:
    """Return how many entries of a row stay at level 0, and how many more at the next one."""
    return round(density * inputs), max(1, round(step * inputs))


def bounds(linears: list[nn.Linear], density: float, step: float) -> tuple[int, int]:
    """Return the lowest and the highest level, at which all linears keep some and lose some."""
    lowest, highest = -MOST, MOST
    for linear in linears:
        base, each = counts(linear.in_features, density, step)
        lowest = max(lowest, -((base - 1) // each))
        highest = min(highest, (linear.in_features - 1 - base) // each)
    return lowest, highest


def check(sparse: Sparse, layers: nn.ModuleList, step: float) -> None:
    """Check that there are levels above and below the uniform one.

    Raises:
        BaseError: there are none on one side.
    """
    linears = [
        each for layer in layers for each in linears_of(layer, sparse.shape, sparse.part).values()
    ]
    lowest, highest = bounds(linears, sparse.pattern.density, step)
    if not lowest < 0 < highest:
        raise BaseError(
            f"step={step:g}: density={sparse.pattern.density:g} leaves no level"
            f" {'below' if lowest == 0 else 'above'}. Use a smaller step="
        )


def masks(
    sparse: Sparse,
    model: Any,
    layers: nn.ModuleList,
    rows: list[Int[Tensor, " t"]],
    step: float,
    device: torch.device,
) -> Masks:
    """Return the levels of a model's linears, by the scores of a method."""
    result = Masks(layers, sparse, step, device)
    norms = Norms(sparse)
    if sparse.by != "magnitude":
        walk(model, layers, rows, norms, device)
    for linears in result.linears:
        for linear in linears:
            scores = linear.weight.detach().abs().float()
            if sparse.by != "magnitude":
                scores = scores * norms.norms[linear].to(scores.device)
            result.rank(linear, scores)
    return result
