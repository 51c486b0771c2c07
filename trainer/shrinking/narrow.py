"""MLPs narrowed to the same number of neurons in every layer.

    activation         S_j = n_j
    activation_weight  S_j = n_j ‖W_down,:j‖₂        n_j = ‖h_j‖₂ over all calibration tokens

h (t, f) is the input of the down projection. Of each layer the neurons of largest S stay, in their
order: rows of the up projections, and columns of the down projection.

Differs from the paper (CFSP, arXiv 2409.13199): its score sums |W| divided by column sums, whose
mean over a column is a constant, so that only n_j was left of it. `activation` is what it computes;
`activation_weight` has the effect of a neuron on the output. The paper gives each layer a width of
its own, which no config.json of transformers can say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.base import BaseError
from trainer.shrinking.families import Shape, replace
from trainer.shrinking.walk import Method
from trainer.shrinking.wanda import InputNorms


def width(share: float, neurons: int, multiple: int) -> int:
    """Return how many of the neurons stay: the share of them, to the nearest multiple.

    Raises:
        BaseError: none or all would stay.
    """
    left = round(share * neurons / multiple) * multiple
    if not 0 < left < neurons:
        smaller = next(m for m in (64, 32, 16, 8, 4, 2, 1) if m < neurons)
        raise BaseError(
            f"ffn={share:g} of {neurons} neurons, in multiples of {multiple}, is {left}, which"
            f" leaves {'none' if not left else 'all'}. Use another ffn=, or multiple={smaller}"
        )
    return left


class Narrow(Method):
    """Keeps `neurons` neurons of each MLP, by `score`."""

    def __init__(self, neurons: int, score: str, shape: Shape):
        self.neurons, self.score, self.shape = neurons, score, shape
        self._norms = InputNorms()

    def watch(self, layer: nn.Module) -> list[Any]:
        """Hook the down projection."""
        self._norms = InputNorms()

        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._norms.add(inputs[0].flatten(0, -2))

        return [layer.get_submodule(self.shape.down).register_forward_pre_hook(read)]

    @torch.no_grad()
    def change(self, layer: nn.Module) -> dict[str, Any]:
        """Narrow the MLP. The figure is the share of the score that stays."""
        down: Any = layer.get_submodule(self.shape.down)
        scores = self._norms.norms
        if self.score == "activation_weight":
            scores = scores * down.weight.to(scores.dtype).norm(dim=0)
        stay = scores.topk(self.neurons).indices.sort().values
        tensors = {f"{self.shape.down}.weight": down.weight[:, stay].clone()}
        for name in self.shape.up:
            up: Any = layer.get_submodule(name)
            tensors[f"{name}.weight"] = up.weight[stay].clone()
            if up.bias is not None:
                tensors[f"{name}.bias"] = up.bias[stay].clone()
        replace(layer, tensors)
        return {"score": float(scores[stay].sum() / scores.sum())}


def check(shape: Shape, family: str) -> None:
    """Check that the projections of a family's MLP are known.

    Raises:
        BaseError: they are one packed weight.
    """
    if not shape.up:
        raise BaseError(
            f"method=narrow: the family {family!r} has the MLP's projections in one packed weight,"
            " which this method does not know. Use method=drop_layers or wanda"
        )
