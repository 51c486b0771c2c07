"""Weights of decoder layers set to zero in a pattern: the methods magnitude, wanda, sparsegpt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.exporting.merged import PRUNED
from trainer.models.base import BaseError
from trainer.shrinking import magnitude, sparsegpt, wanda
from trainer.shrinking.families import Shape, linears_of
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.walk import Method


class Sparse(Method):
    """Prunes the linears of each layer. `by` is magnitude, wanda or sparsegpt; `part` is all, mlp
    or attention. `patterns` are those of single linears, where they differ."""

    def __init__(self, by: str, pattern: Pattern, part: str, shape: Shape):
        self.by, self.pattern, self.part, self.shape = by, pattern, part, shape
        self.patterns: dict[nn.Module, Pattern] = {}
        self.reads = by != "magnitude"
        self._statistics: dict[str, Any] = {}
        # Linears with the same input, such as q, k and v, share a statistic: that of the first.
        self._source: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}  # of the row that is running

    def check(self, layers: nn.ModuleList) -> None:
        """Check that the pattern divides the sizes of the weights.

        Raises:
            BaseError: it does not divide one of them.
        """
        for name, linear in linears_of(layers[0], self.shape, self.part).items():
            if (fault := self.pattern.fault(linear.in_features)) is not None:
                choices = "pattern=unstructured" if self.pattern.group else "another density="
                raise BaseError(
                    f"pattern={self.pattern.name}: {fault} ({name} of the decoder layers). Use"
                    f" {choices}, or part=mlp or part=attention if only the other part does not fit"
                )

    def watch(self, layer: nn.Module) -> list[Any]:
        """Hook the linears."""
        make = {"wanda": wanda.InputNorms, "sparsegpt": sparsegpt.Gram}.get(self.by)
        self._statistics, self._source = {}, {}
        if make is None:
            return []
        linears = linears_of(layer, self.shape, self.part)
        self._statistics = {name: make() for name in linears}
        return [
            linear.register_forward_pre_hook(self._reader(name)) for name, linear in linears.items()
        ]

    def _reader(self, name: str) -> Callable[..., None]:
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in self._source:
                same = (other for other, seen in self._inputs.items() if seen is inputs[0])
                self._source[name] = next(same, name)
            if self._source[name] == name:
                self._inputs[name] = inputs[0]
                self._statistics[name].add(inputs[0].flatten(0, -2))

        return read

    def see(self, before: Tensor, after: Tensor) -> None:
        """Forget the row's inputs."""
        self._inputs.clear()

    @torch.no_grad()
    def change(self, layer: nn.Module) -> dict[str, Any]:
        """Prune the linears. The figures are the share of weights that stay, and with patterns of
        their own that of each linear."""
        stay = total = 0
        shares: dict[str, float] = {}
        for name, linear in linears_of(layer, self.shape, self.part).items():
            pattern = self.patterns.get(linear, self.pattern)
            linear.weight.copy_(self._pruned(name, linear.weight, pattern))
            stay += int(linear.weight.count_nonzero())
            total += linear.weight.numel()
            shares[name] = round(pattern.density, 4)
        self._statistics.clear()
        return {"density": stay / total} | ({"linears": shares} if self.patterns else {})

    def _pruned(self, name: str, weight: Tensor, pattern: Pattern) -> Tensor:
        if self.by == "magnitude":
            return magnitude.prune(weight, pattern)
        statistic = self._statistics[self._source[name]]
        if self.by == "wanda":
            return wanda.prune(weight, statistic.norms, pattern)
        return sparsegpt.prune(weight, statistic, pattern)


def refuse_pruned(layers: nn.ModuleList, shape: Shape, path: str, action: str) -> None:
    """Refuse a base whose weights are pruned already.

    Raises:
        BaseError: names the first such weight.
    """
    for index, layer in enumerate(layers):
        for name, linear in linears_of(layer, shape).items():
            zeros = 1 - float(linear.weight.count_nonzero()) / linear.weight.numel()
            if zeros >= PRUNED:
                pattern = Pattern.of("2:4")
                kind = ", in the pattern 2:4" if pattern.follows(linear.weight) else ""
                raise BaseError(
                    f"base {path!r} is pruned already: {zeros:.0%} of {name} in layer {index} is"
                    f" zero{kind}. {action}"
                )
