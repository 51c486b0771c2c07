"""The interface of an adapter, and how deltas are attached to a model's linear layers and merged
into their weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapters import trained_copies
from adapters.errors import AdapterError, NeedsWeights
from adapters.linear import (
    ends_with,
    float_weight,
    set_float_weight,
)
from adapters.merging import refuse_quantised, untie
from adapters.state import copy_tensors
from adapters.targets import targets

__all__ = ["AdapterError", "NeedsWeights", "copy_tensors", "ends_with", "refuse_quantised", "untie"]

# Yields micro-batches of the training data from the first, for adapters that read data before
# training.
Batches = Callable[[], Iterable[dict[str, Tensor]]]


@dataclass(frozen=True)
class Start:
    """The facts of the run that an adapter may need when it is attached."""

    # modules without pretrained weights (a classification head), trained together with the adapter
    new_modules: tuple[str, ...] = ()
    steps: int = 1  # planned optimiser steps of the run
    data: Batches | None = None  # training data, for initialisations that are computed from it
    folder: Path | None = None  # for files for the user; only set on the rank that writes them
    saved: dict[str, Any] | None = None  # an earlier `Adapter.state`; nothing is computed again
    new_tokens: tuple[int, ...] = ()  # ids of tokens that the base has no trained rows for


@dataclass(frozen=True)
class Recompute:
    """Recipe to recompute a tensor from saved ones; its producer has it as `tensor.recompute`."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def saved_for_backward(x: Tensor) -> tuple[Callable[..., Tensor] | None, *tuple[Tensor, ...]]:
    """Return the function and the tensors that recompute `x`, or `(None,)` if `x` itself must be
    saved for the backward pass."""
    recipe: Recompute | None = getattr(x, "recompute", None)
    return (None,) if recipe is None else (recipe.make, *recipe.tensors)


class Delta(nn.Module):
    """A trainable correction of one frozen linear layer.

    `forward` and `weight` must be the same correction: forward(x, x Wᵀ) = x weight(W)ᵀ. A test
    checks this for every adapter.

    A delta may store a part of itself in the base's weight while it is attached. `fold_in` puts
    that part there. `take_out` restores the base's weight, bit for bit. Call `take_out` before
    merging, or before the base is used alone.
    """

    has_weight = True  # False if the correction depends on x, so that `weight` raises

    @property
    def reads_gradients(self) -> bool:
        """Return whether the next backward pass also reads the gradient of the layer's output. It
        is then that of a whole micro-batch, as the step has it."""
        return False

    def forward(self, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        """Return the corrected output, given the layer's input x and its frozen output y."""
        raise NotImplementedError

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Return the corrected weight, in w's dtype."""
        raise NotImplementedError

    def linear(self, base: Any, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """Apply the corrected layer. Override it if the frozen product is not the base's own
        forward."""
        return self.forward(x, base(x))

    def fold_in(self, base: Any) -> None:
        """Write this delta's part into the base's weight, if it is not there yet."""

    def take_out(self, base: Any) -> None:
        """Restore the base's weight, bit for bit."""


class Pool(nn.ModuleDict):
    """Modules whose parameters several deltas share: a module of the model, not of a delta."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a Delta on its output."""

    def __init__(self, base: Any, delta: Delta):
        super().__init__()
        self.base = base
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.linear(self.base, x)

    @property
    def reads_gradients(self) -> bool:
        return self.delta.reads_gradients

    # Models read these of their linear layers.
    @property
    def weight(self) -> Any:
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias


class Adapter:
    """A method, configured for one run. Methods that consist of Deltas override `make`; others
    override the rest."""

    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] = []
    train_modules: list[str] = []  # modules of the base that are trained whole
    mergeable = True  # whether a weight can hold its correction
    exportable = True  # whether `save` can write a folder for stock PEFT
    compiles = True  # whether torch.compile may compile it together with the layers around it
    reads_micro_batches = False  # whether more than a step's summed gradient decides something
    selects_by_rank = False  # whether what it selects depends on the number of ranks
    restart = 0  # the step at which the learning rate schedule starts again

    def make(self, linear: nn.Module) -> Delta:
        """Return the Delta of one linear layer. Called once per target."""
        raise NotImplementedError

    def plan(self, steps: int, rows: int) -> int:
        """Return how many steps the method takes before the `steps` that train its result, each of
        `rows` sequences. Called once, before anything is attached."""
        return 0

    def planned_settings(self) -> dict[str, Any]:
        """Return settings that `plan` has resolved to numbers, as run.yaml records them."""
        return {}

    @property
    def only_prepares(self) -> bool:
        """Return whether its steps so far only chose a mask: it changes no logits yet."""
        return False

    def plan_text(self, steps: int) -> str | None:
        """Say what the `steps` steps of a run are for, if not all train the result."""
        return None

    def plan_warnings(self, steps: int, rows: int) -> list[str]:
        """Return warnings about a run of `steps` steps, each of `rows` sequences."""
        return []

    @property
    def names_modules(self) -> bool:
        """Return whether settings name modules of the model, which may be misspelt."""
        return bool(
            self.target_modules != "all-linear" or self.exclude_modules or self.train_modules
        )

    def check_names(self, model: nn.Module) -> None:
        """Check the modules that settings name, on a model without weights.

        Raises:
            AdapterError: a name matches nothing.
        """
        targets(model, self.target_modules, self.exclude_modules)
        trained_copies.chosen(model, self.train_modules)

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        """Freeze `model`, graft the adapter onto it and return the model to call.

        Raises:
            AdapterError: a target matches nothing, or the adapter does not work on it.
        """
        freeze(model)
        linears = targets(model, self.target_modules, self.exclude_modules, start.new_modules)
        for name, linear in linears:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(linear, self.make(linear)))
        train_modules(model, start.new_modules)
        trained_copies.attach(model, self.train_modules, start.new_tokens)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups, each with an `lr_scale` on the learning rate.
        Vectors are not decayed unless their group sets `weight_decay`."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def optimizer(self, groups: list[dict[str, Any]], make: Any) -> torch.optim.Optimizer:
        """Return the optimiser of the groups. `make` is the configured class with its settings, a
        functools.partial.

        Raises:
            AdapterError: the method needs another optimiser.
        """
        return make(groups)

    def state(self, model: nn.Module) -> dict[str, Any]:
        """Return the adapter's part of a checkpoint: `tensors` by name, and `extra` (plain data and
        tensors)."""
        return {"tensors": trainable_tensors(model), "extra": {}}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Load a `state`, in place.

        Raises:
            AdapterError: names, shapes or dtypes differ. Nothing is loaded then.
        """
        copy_tensors(self.state(model)["tensors"], state["tensors"])

    def attach_continued(self, model: nn.Module, start: Start, state: dict[str, Any]) -> nn.Module:
        """Attach the adapter for a new run, with the weights of an earlier run's `state`."""
        model = self.attach(model, start)
        self.load_state(model, state)
        return model

    def refuse_continuing(self) -> None:
        """Refuse a new run from an earlier one's weights where the method cannot continue them.

        Raises:
            AdapterError: the method needs a start of its own.
        """

    def stock_faults(self, settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
        """Return how a stock PEFT folder's config differs from this adapter with its `settings`."""
        return [
            f"{type(self).__name__} does not read PEFT's folders: give the folder of a run of the"
            " same method"
        ]

    def load_stock_folder(self, model: nn.Module, folder: Path) -> None:
        """Load the tensors of a stock PEFT folder that has no `stock_faults`, in place.

        Raises:
            AdapterError: modules or shapes differ.
        """
        raise AdapterError(f"adapter.from={folder}: {type(self).__name__} does not read it")

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a term to add to the loss, once per step."""
        return None

    def before_step(self, model: nn.Module, loss_scale: float) -> None:
        """Act before each optimiser step and before gradients are clipped, also in steps that are
        skipped afterwards. Gradients that a backward hook saw are `loss_scale` times too large;
        parameters' gradients are not."""

    def after_clipping(self, model: nn.Module, factor: Tensor) -> None:
        """Act after `before_step`. `factor`, a scalar tensor of at most 1, has scaled the step's
        gradients when they were clipped. Skipped steps do not call this."""

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Act after optimiser step number `step`, before the gradients are cleared. Return numbers
        to log."""
        return None

    def ignores_skips(self) -> bool:
        """Return whether the adapter does the same after a step that was skipped as after any. Then
        the host need not know which it was. An adapter with hooks of its own says so itself."""
        hooks = ("after_clipping", "after_step")
        return all(getattr(type(self), hook) is getattr(Adapter, hook) for hook in hooks)

    def refuse_merging(self) -> None:
        """Refuse to merge a correction that no weight can hold.

        Raises:
            AdapterError: names the adapter.
        """
        if not self.mergeable:
            raise AdapterError(
                f"the correction of {type(self).__name__} depends on the input, so no weight holds"
                " it: use the run's folder"
            )

    def merge(self, model: nn.Module) -> nn.Module:
        """Merge the adapter into the weights, in place and in their dtype, and return the model
        without it."""
        self.refuse_merging()
        untie(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear):
                merge_linear(module)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base)
        trained_copies.dissolve(model)
        return model

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        """Write the adapter in the format that stock PEFT loads."""
        raise AdapterError(
            f"{type(self).__name__} has no layout that PEFT reads. Export the merged model:"
            " to=merged"
        )

    def load_stock(self, base: nn.Module, folder: Path) -> nn.Module:
        """Load a folder that `save` wrote with stock PEFT, onto a plain base."""
        import peft

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*a tied layer is part of the adapter.*")
            return peft.PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]

    def disabled(self, model: nn.Module) -> Any:
        """Return a context in which the adapter is switched off and the base alone answers."""
        return switched_off(model)


def freeze(model: nn.Module) -> None:
    """Stop training all parameters of `model`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def train_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Train the named modules in fp32, whatever the base's dtype. Their inputs are cast to fp32."""
    for name in names:
        module = model.get_submodule(name).float().requires_grad_(True)
        module.register_forward_pre_hook(cast_inputs)


def cast_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast a module's inputs to its parameters' dtype: a forward pre-hook."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters that require a gradient, and the buffers
    of Deltas."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, Delta):
            tensors |= {
                f"{name}.{key}": b
                for key, b in module.named_buffers()
                if key in module.state_dict()
            }
    return tensors


def merge_linear(layer: AdaptedLinear) -> None:
    """Merge a Delta into its base's weight. The sum is computed in fp32 and rounded once.

    Raises:
        AdapterError: the base is quantised.
    """
    refuse_quantised(layer.base)
    layer.delta.take_out(layer.base)
    with torch.no_grad():
        set_float_weight(layer.base, layer.delta.weight(float_weight(layer.base)))


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let the base alone answer: every AdaptedLinear returns its frozen output."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    copies = [module for _, module in trained_copies.modules(model)]
    for layer in layers:
        layer.delta.take_out(layer.base)
    for module in [*layers, *copies]:
        module.forward = module.base.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in copies:
            del module.forward
        for layer in layers:
            del layer.forward
            layer.delta.fold_in(layer.base)
