"""A LoRA on a draft head: the head is frozen, and its linear layers get low-rank updates.

    y = W x + s B A x        W of the earlier head, s = alpha / r, see adapters.lora

A head that a fine-tune made stale is re-aligned with few trained numbers: gradients, moments and
checkpoints have the size of A and B. The layers that give logits, which are as wide as the
vocabulary, stay as they are, and so do norms, biases and tables. B is zero at the start, so the
first predictions are the earlier head's own.

`merge` adds the update to the weights. A run saves the merged head, in the same formats as any
other, and decodes with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.delta import AdaptedLinear
from adapters.errors import AdapterError
from adapters.linear import (
    ends_with,
    features,
    float_weight,
    is_linear,
    output_layer,
    set_float_weight,
)
from adapters.lora import LoRA, scaling
from adapters.targets import targets
from trainer.drafters import Drafter, DrafterError


class UpdatedLinear(AdaptedLinear):
    """A frozen layer with its update. Its `weight` has both, since some heads read it."""

    @property
    def weight(self) -> Any:
        w = self.base.weight
        if isinstance(self.base, Conv1D):
            return self.delta.weight(w.t()).t()
        return self.delta.weight(w)

    @property
    def in_features(self) -> int:
        return features(self.base)[0]

    @property
    def out_features(self) -> int:
        return features(self.base)[1]


class WithLoRA(Drafter):
    """The changes to a drafter whose linear layers have updates: it saves and loads these alone."""

    def state(self) -> dict[str, Tensor]:
        """Return A (r, i) and B (o, r) of each layer by its name in the head."""
        return {
            f"{name}.{key}": getattr(layer.delta, key).detach()
            for name, layer in updated(self)
            for key in ("A", "B")
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        Drafter.load_state(self, state)

    def restore(self) -> None:
        for _, layer in updated(self):
            nn.init.zeros_(layer.delta.B)


def updated(drafter: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers that have updates, by name."""
    return [
        (name, module)
        for name, module in drafter.named_modules()
        if isinstance(module, UpdatedLinear)
    ]


def attach(
    drafter: Drafter, model: nn.Module, rank: int, alpha: float, target_modules: str | list[str]
) -> None:
    """Freeze a drafter for `model`, and give its linear layers updates, in place.

    Raises:
        DrafterError: it has no such layers.
    """
    layers = chosen(drafter, model, target_modules)
    trained = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    drafter.requires_grad_(False)
    for name, linear in layers:
        delta = LoRA(linear, rank, scaling(rank, alpha, rslora=False), 0.0, torch.float32)
        _put(drafter, name, UpdatedLinear(linear, delta))
    drafter.__dict__["trained_before"] = trained
    kind: Any = type(drafter)
    # As torch.nn.utils.parametrize does: the object stays the same for all that hold it.
    drafter.__class__ = type(f"{kind.__name__}WithLoRA", (WithLoRA, kind), {})


@torch.no_grad()
def merge(drafter: Drafter) -> None:
    """Add the updates to a drafter's weights, in place. Without updates nothing changes."""
    if not isinstance(drafter, WithLoRA):
        return
    for name, layer in updated(drafter):
        set_float_weight(layer.base, layer.delta.weight(float_weight(layer.base)))
        _put(drafter, name, layer.base)
    for parameter in drafter.__dict__.pop("trained_before"):
        parameter.requires_grad_(True)
    drafter.__class__ = type(drafter).__mro__[2]


def chosen(
    drafter: Drafter, model: nn.Module, target_modules: str | list[str]
) -> list[tuple[str, Any]]:
    """Return the linear layers that `target_modules` names."""
    linears = [(name, layer) for name, layer in drafter.named_modules() if is_linear(layer)]
    if linears and target_modules != "all-linear":
        try:
            return targets(drafter, target_modules)
        except AdapterError as error:
            raise DrafterError(
                str(error)
                .replace("adapter.", "drafter_adapter.")
                .replace("The model's", "The head's")
            ) from None
    head = output_layer(model)
    size = features(head)[1] if head is not None else 0
    sizes = {size, len(getattr(drafter, "d2t", ()))}  # of logits, also over a draft vocabulary
    inner: list[tuple[str, Any]] = [
        (name, layer)
        for name, layer in linears
        if layer.weight.requires_grad
        and features(layer)[1] not in sizes
        and not ends_with(name, "lm_head")
    ]
    if not inner:
        kind = type(drafter).__name__
        raise DrafterError(
            f"drafter_adapter=lora puts a LoRA on a head's linear layers, and {kind} has none but"
            " those that give logits: set drafter_adapter=none, which trains the whole head"
        )
    return inner


def _put(drafter: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    # not get_submodule: `layers` of a drafter is a tuple of numbers, and may be modules as well
    dict(drafter.named_modules())[parent].add_module(child, layer)
