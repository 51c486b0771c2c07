"""The contract of an adapter, and how deltas are attached to a model's linear layers and merged
into their weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Yields micro-batches of the training data, from the first, for what needs data before training.
Batches = Callable[[], Iterable[dict[str, Tensor]]]


class AdapterError(ValueError):
    """The adapter does not fit the model. The message says what was asked for and what there is."""


class NeedsWeights(AdapterError):
    """What the adapter trains depends on the weights, which a model on the meta device does not
    have."""


@dataclass(frozen=True)
class Start:
    """What an adapter may need to know when it is attached."""

    # modules without trained weights (a classification head), trained beside the adapter
    new_modules: tuple[str, ...] = ()
    steps: int = 1  # planned optimiser steps of the run
    data: Batches | None = None  # the training data, for what is computed from it before training
    folder: Path | None = None  # where files for the user go, on the process that writes them
    saved: dict[str, Any] | None = None  # an earlier `Adapter.state`: nothing is computed anew then


@dataclass(frozen=True)
class Recompute:
    """Recipe to recompute a tensor from tensors that are saved anyway. The producer stores it as
    `tensor.recompute`."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def saved_for_backward(x: Tensor) -> tuple[Callable[..., Tensor] | None, *tuple[Tensor, ...]]:
    """Return the function and the tensors that recompute `x`, or `(None,)` if `x` itself must be
    saved for the backward pass."""
    recipe: Recompute | None = getattr(x, "recompute", None)
    return (None,) if recipe is None else (recipe.make, *recipe.tensors)


class Delta(nn.Module):
    """A trainable correction of one frozen linear layer. `forward` and `weight` must be the same
    correction: forward(x, x Wᵀ) = x weight(W)ᵀ, which every adapter is tested for.

    A delta may keep a part of itself in the base's weight while it is attached: `hold` puts it
    there, and `release` gives the base its own weight back, bit for bit. Whoever wants the base
    alone, or merges, releases first."""

    def forward(self, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        """The corrected output, given the layer's input x and its frozen output y."""
        raise NotImplementedError

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The corrected weight, in w's dtype."""
        raise NotImplementedError

    def linear(self, base: Any, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """The corrected layer; overridden where the frozen product is not the base's own
        forward."""
        return self.forward(x, base(x))

    def hold(self, base: Any) -> None:
        """Put what this delta keeps in the base's weight there, if it is not there yet."""

    def release(self, base: Any) -> None:
        """Give the base its own weight back, bit for bit."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a Delta on its output."""

    def __init__(self, base: Any, delta: Delta):
        super().__init__()
        self.base = base
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.linear(self.base, x)

    # Models read these of their linear layers.
    @property
    def weight(self) -> Any:
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias


class Adapter:
    """A method, configured for one run. Methods made of Deltas override `make`; others override the
    rest."""

    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] = []
    exportable = True  # whether `save` can write a folder for stock PEFT
    # whether torch.compile may take what it grafts on together with the layers around
    compiles = True
    # the step at which the schedule of rates begins anew, for methods with a phase before the one
    # that counts
    restart = 0

    def make(self, linear: nn.Module) -> Delta:
        """The Delta of one linear layer; called once per target."""
        raise NotImplementedError

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        """Freeze `model`, graft the adapter onto it and return the model to call.

        Raises:
            AdapterError: a target matches nothing, or the adapter cannot sit there.
        """
        freeze(model)
        for name, linear in targets(
            model, self.target_modules, self.exclude_modules, start.new_modules
        ):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(linear, self.make(linear)))
        train_modules(model, start.new_modules)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters, in groups with an `lr_scale` on the optimiser's rate. Vectors are
        not decayed, unless their group says its own `weight_decay`."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def optimizer(self, groups: list[dict[str, Any]], make: Any) -> torch.optim.Optimizer:
        """The optimiser of the groups; `make` is the configured class with its settings, a
        functools.partial.

        Raises:
            AdapterError: the method needs another optimiser.
        """
        return make(groups)

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint holds of the adapter: `tensors` by name, and `extra`, which is plain
        data and tensors."""
        return {"tensors": trainable_tensors(model), "extra": {}}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Put a `state` back, in place.

        Raises:
            AdapterError: names, shapes or dtypes differ; nothing is loaded then.
        """
        copy_tensors(self.state(model)["tensors"], state["tensors"])

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term to add to the loss, once per step."""
        return None

    def before_step(self, model: nn.Module, loss_scale: float) -> None:
        """Called before each optimiser step and before gradients are clipped, also for steps that
        will be passed over. What a backward hook saw is `loss_scale` times too large; parameters'
        gradients are not."""

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Called after each optimiser step, with the gradients still there; `step` of them are
        done. Returns numbers to log."""
        return None

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold the adapter into the weights, in place and in their dtype, and return the model
        without it."""
        untie(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear):
                merge_linear(module)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base)
        return model

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        """Write the adapter as stock PEFT loads it."""
        raise AdapterError(
            f"{type(self).__name__} has no layout that PEFT reads. Export the merged model:"
            " to=merged"
        )

    def load_stock(self, base: nn.Module, folder: Path) -> nn.Module:
        """What stock PEFT makes of a folder that `save` wrote, on a plain base."""
        import peft

        return peft.PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]

    def disabled(self, model: nn.Module) -> Any:
        """A context in which the adapter is switched off, so that the base alone answers."""
        return switched_off(model)


def freeze(model: nn.Module) -> None:
    """No parameter of `model` is trained."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def train_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Train the named modules in fp32, whatever the base computes in; their inputs are cast on the
    way in."""
    for name in names:
        module = model.get_submodule(name).float().requires_grad_(True)
        module.register_forward_pre_hook(_to_own_dtype)


def _to_own_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def is_linear(module: nn.Module) -> bool:
    """Linear layers: nn.Linear, its quantised children in bitsandbytes, and GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def features(linear: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, also where its stored weight is transposed or packed."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.in_features, linear.out_features


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits from hidden states, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def untie(model: nn.Module) -> None:
    """Give an adapted output layer a weight of its own: merged into a tied one, its update would
    change the embedding too."""
    head: Any = output_layer(model)
    embedding = model.get_input_embeddings() if head is not None else None  # type: ignore[operator]
    linear = getattr(head, "base", None) or getattr(head, "base_layer", None)  # ours, or PEFT's
    if (
        isinstance(linear, nn.Linear)
        and isinstance(embedding, nn.Embedding)
        and linear.weight is embedding.weight
    ):
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False  # type: ignore[union-attr, assignment]


def targets(
    model: nn.Module,
    wanted: str | list[str],
    exclude: Iterable[str] = (),
    new_modules: Iterable[str] = (),
) -> list[tuple[str, nn.Module]]:
    """Linear layers by name: `all-linear` is all but the output layer, a list holds names' ends, a
    string is a pattern.

    Raises:
        AdapterError: some entry matches no linear layer; the message lists what there is.
    """
    head = output_layer(model)
    fresh = tuple(f"{name}." for name in new_modules)
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module) and not f"{name}.".startswith(fresh or ("\0",))
    ]
    if wanted == "all-linear":
        chosen = [(name, module) for name, module in linears if module is not head]
    elif isinstance(wanted, str):
        try:
            chosen = [(name, module) for name, module in linears if re.fullmatch(wanted, name)]
        except re.error as error:
            raise AdapterError(
                f"adapter.target_modules={wanted!r} is no regular expression: {error}"
            ) from error
        if not chosen:
            raise AdapterError(
                f"adapter.target_modules={wanted!r} matches no linear layer. {_choices(linears)}"
            )
    else:
        for entry in wanted:
            if not any(_ends(name, entry) for name, _ in linears):
                raise AdapterError(
                    f"adapter.target_modules has {entry!r}, which matches no linear layer."
                    f" {_choices(linears)}"
                )
        chosen = [
            (name, module)
            for name, module in linears
            if any(_ends(name, entry) for entry in wanted)
        ]
    for entry in exclude:
        if not any(_ends(name, entry) for name, _ in linears):
            raise AdapterError(
                f"adapter.exclude_modules has {entry!r}, which matches no linear layer."
                f" {_choices(linears)}"
            )
    chosen = [
        (name, module)
        for name, module in chosen
        if not any(_ends(name, entry) for entry in exclude)
    ]
    if not chosen:
        raise AdapterError(
            f"adapter.target_modules={wanted!r} without {list(exclude)!r} leaves no linear layer."
            f" {_choices(linears)}"
        )
    return chosen


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _choices(linears: list[tuple[str, nn.Module]]) -> str:
    counts: dict[str, int] = {}
    for name, _ in linears:
        counts[name.rpartition(".")[2]] = counts.get(name.rpartition(".")[2], 0) + 1
    return "The model's linear layers: " + ", ".join(
        f"{name} ({count}x)" for name, count in counts.items()
    )


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require a gradient, and the buffers of Deltas."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, Delta):
            tensors |= {
                f"{name}.{key}": b
                for key, b in module.named_buffers()
                if key in module.state_dict()
            }
    return tensors


def copy_tensors(into: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved tensors into live ones of the same names, all or none.

    Raises:
        AdapterError: a name, shape or dtype differs.
    """
    missing, unknown = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    if missing or unknown:
        raise AdapterError(
            f"the saved adapter does not fit this model: {len(missing)} tensors are missing"
            f" {missing[:3]}, {len(unknown)} are unknown {unknown[:3]}. It was trained with another"
            " adapter or base."
        )
    for name, tensor in into.items():
        if (tensor.shape, tensor.dtype) != (saved[name].shape, saved[name].dtype):
            raise AdapterError(
                f"the saved adapter does not fit this model: {name} is {tuple(saved[name].shape)}"
                f" {saved[name].dtype} there and {tuple(tensor.shape)} {tensor.dtype} here. It was"
                " trained with another adapter or base."
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def float_weight(linear: Any) -> Float[Tensor, "o i"]:
    """The dense (out, in) weight of a linear layer in fp32, dequantised where it is packed."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, state=getattr(linear, "state", None)).float()
    dense = weight.detach().float() if weight.dtype != torch.float64 else weight.detach()
    return dense.t() if isinstance(linear, Conv1D) else dense


def set_float_weight(linear: Any, dense: Float[Tensor, "o i"]) -> None:
    """Put a dense (out, in) weight back into a linear layer, in place and in its dtype."""
    with torch.no_grad():
        linear.weight.copy_(
            (dense.t() if isinstance(linear, Conv1D) else dense).to(linear.weight.dtype)
        )


def refuse_quantised(linear: Any) -> None:
    """
    Raises:
        AdapterError: the layer is quantised, where a merge would round what was trained away.
    """
    weight = linear.weight
    if not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params"):
        raise AdapterError(
            "the base is quantised: a merge would round the adapter away. Load it with"
            " base.quantization=none"
        )


def merge_linear(layer: AdaptedLinear) -> None:
    """Fold a Delta into its base's weight: corrected in fp32, rounded once.

    Raises:
        AdapterError: the base is quantised.
    """
    refuse_quantised(layer.base)
    layer.delta.release(layer.base)
    with torch.no_grad():
        set_float_weight(layer.base, layer.delta.weight(float_weight(layer.base)))


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base alone answers: every AdaptedLinear passes its frozen output on."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for layer in layers:
        layer.delta.release(layer.base)
        layer.forward = layer.base.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
            layer.delta.hold(layer.base)
