"""Decoder layers left out: those that change the states least.

    angular   I_l = mean over tokens of arccos(cos(h_l, h_l+1)) / π    (CFSP, arXiv 2409.13199)
    cosine    I_l = 1 - mean over tokens of cos(h_l, h_l+1)   (block influence, arXiv 2403.03853)

h_l (t, d) are the states that enter layer l of the unchanged model. The layers of least I go, all
at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.base import BaseError
from trainer.shrinking.divergence import Layers
from trainer.shrinking.evolution import Candidate
from trainer.shrinking.families import Shape
from trainer.shrinking.walk import Method


class Influence(Method):
    """Measures the influence of each layer, by `score`."""

    changes = False

    def __init__(self, score: str):
        self.score = score
        self._sum, self._tokens = 0.0, 0

    def see(self, before: Float[Tensor, "1 t d"], after: Float[Tensor, "1 t d"]) -> None:
        """Add a row's tokens."""
        cosines = F.cosine_similarity(before.double(), after.double(), dim=-1).flatten()
        if self.score == "angular":
            self._sum += float((cosines.clamp(-1, 1).arccos() / torch.pi).sum())
        else:
            self._sum += float((1 - cosines).sum())
        self._tokens += cosines.numel()

    def change(self, layer: nn.Module) -> dict[str, Any]:
        """Return the layer's influence."""
        influence = self._sum / self._tokens
        self._sum, self._tokens = 0.0, 0
        return {"influence": influence}


def check(count: int, layers: int) -> None:
    """Check that a base has more than `count` layers.

    Raises:
        BaseError: it has not.
    """
    if count >= layers:
        raise BaseError(f"layers={count}: the base has {layers}, so at most {layers - 1} can go")


def least(figures: list[dict[str, Any]], count: int) -> list[int]:
    """Return the layers of least influence, in their order in the model."""
    order = sorted(range(len(figures)), key=lambda index: figures[index]["influence"])
    return sorted(order[:count])


def without(layers: int) -> Layers:
    """Return the layers that still run when those of a candidate are left out."""

    def stay(gone: Candidate) -> Iterator[int]:
        return (index for index in range(layers) if index not in gone)

    return stay


def drop(model: Any, shape: Shape, dropped: list[int]) -> None:
    """Take layers out of a model in place, and out of its config: their number, and lists with an
    entry for each layer, such as layer_types."""
    place, _, key = shape.layers.rpartition(".")
    parent = model.get_submodule(place)
    layers = getattr(parent, key)
    total, gone = len(layers), set(dropped)
    stay = [index for index in range(total) if index not in gone]
    setattr(parent, key, nn.ModuleList(layers[index] for index in stay))
    for index, layer in enumerate(getattr(parent, key)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the place of its keys and values in the cache
                module.layer_idx = index
    config = model.config
    lists = {
        name: [value[index] for index in stay]
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == total and not name.endswith("token_id")
    }
    config.num_hidden_layers = len(stay)
    for name, value in lists.items():
        setattr(config, name, value)
