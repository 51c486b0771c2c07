"""Low-rank updates of the experts of a mixture, whose matrices are no linear layers.

transformers keeps the matrices of all experts of a layer in one tensor W (E, o, i), or (E, i, o) in
gpt-oss. Each expert e gets an update of its own:

    W_e + s B_e A_e        A (E r, i), rows e r .. e r + r - 1 are A_e
                           B (o, r E), columns e, e + E, ... are B_e

This is PEFT's layout for `target_parameters`, which its LoRA alone has; RoSA's low-rank part is
saved in it too. The corrected tensor exists during a forward pass of its layer: as much memory
again as the layer's experts take.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from adapters.delta import Adapter, AdapterError, Delta, ends_with

ALL = "all-experts"
_INSIDE = re.compile(r"(^|\.)experts(\.|$)")  # and not shared_experts


class ExpertLoRA(Delta):
    """The low-rank update of one tensor of experts; see the module's text."""

    def __init__(
        self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype, transposed: bool
    ):
        super().__init__()
        self.experts, first, second = weight.shape
        i, o = (first, second) if transposed else (second, first)
        self.A = nn.Parameter(
            torch.empty(self.experts * rank, i, device=weight.device, dtype=dtype)
        )
        self.B = nn.Parameter(
            torch.empty(o, rank * self.experts, device=weight.device, dtype=dtype)
        )
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as adapters.lora, and as PEFT
        nn.init.zeros_(self.B)
        self.rank, self.scale, self.transposed = rank, scale, transposed

    def weight(self, w: Float[Tensor, "e o i"]) -> Float[Tensor, "e o i"]:
        A = self.A.to(w.dtype).view(self.experts, self.rank, -1)
        B = self.B.to(w.dtype).view(-1, self.rank, self.experts).permute(2, 0, 1)
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return torch.baddbmm(w, left, right, alpha=self.scale)


class AdaptedExperts(nn.Module):
    """A frozen module of experts whose tensors are corrected while it is called."""

    def __init__(self, base: Any, deltas: dict[str, ExpertLoRA]):
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict(deltas)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return torch.func.functional_call(self.base, self.corrected(), inputs, options)

    def corrected(self) -> dict[str, Tensor]:
        """Return the corrected tensors by name."""
        deltas: Any = self.deltas
        return {name: delta.weight(getattr(self.base, name)) for name, delta in deltas.items()}


class UpdatesExperts(Adapter):
    """An adapter that may also have updates of experts (`attach`)."""

    def merge(self, model: nn.Module) -> nn.Module:
        merge(model)
        return super().merge(model)

    @contextlib.contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model), super().disabled(model):
            yield


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model's routed experts by name: those inside a module called
    experts, and matrices of several experts in one tensor (E, ., .)."""
    tensors: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd | Delta):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            fused = parameter.ndim == 3 and min(parameter.shape[:2]) > 1
            if fused or _INSIDE.search(prefix):
                tensors[f"{prefix}.{key}" if prefix else key] = parameter
    return tensors


def chosen(model: nn.Module, entries: str | list[str]) -> list[str]:
    """Return the names of the tensors of experts that `entries` names: all-experts, or the ends of
    their names.

    Raises:
        AdapterError: an entry matches none. The message lists those of the model.
    """
    names = [name for name, parameter in expert_tensors(model).items() if parameter.ndim == 3]
    if entries == ALL:
        entries = sorted({_end(name) for name in names}) or [ALL]
    endings = [entries] if isinstance(entries, str) else list(entries)
    for ending in endings:
        if not any(ends_with(name, ending) for name in names):
            known = ", ".join(sorted({_end(name) for name in names})) or "none"
            raise AdapterError(
                f"adapter.target_parameters has {ending!r}, which matches no tensor of experts. The"
                f" model's: {known}"
            )
    return [name for name in names if ends_with(name, *endings)]


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def attach(
    model: nn.Module, entries: str | list[str], rank: int, scale: float, dtype: torch.dtype
) -> None:
    """Put a low-rank update on each of the chosen tensors of experts."""
    of_module: dict[str, list[str]] = {}
    for name in chosen(model, entries) if entries else []:
        parent, _, key = name.rpartition(".")
        of_module.setdefault(parent, []).append(key)
    for name, keys in of_module.items():
        experts: Any = model.get_submodule(name)
        transposed = bool(getattr(experts, "is_transposed", False))
        deltas = {
            key: ExpertLoRA(getattr(experts, key), rank, scale, dtype, transposed) for key in keys
        }
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, AdaptedExperts(experts, deltas))


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the adapted modules of experts by name."""
    return [
        (n, module) for n, module in model.named_modules() if isinstance(module, AdaptedExperts)
    ]


def adapted_ids(model: nn.Module) -> set[int]:
    """Return the ids of the experts' tensors that have an update, ours or PEFT's."""
    ids = set()
    for module in model.modules():
        if isinstance(module, AdaptedExperts):
            ids |= {id(getattr(module.base, key)) for key in module.deltas}
        elif type(module).__name__ == "ParamWrapper":
            ids.add(id(module.get_param()))  # type: ignore[operator]
    return ids


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Merge the updates into the experts, in place, and put the plain modules back."""
    for name, layer in layers(model):
        for key, delta in layer.deltas.items():
            weight = getattr(layer.base, key)
            weight.copy_(delta.weight(weight.float()).to(weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let the frozen experts alone answer."""
    live = [layer for _, layer in layers(model)]
    for layer in live:
        layer.forward = layer.base.forward
    try:
        yield
    finally:
        for layer in live:
            del layer.forward


def stock_tensors(model: nn.Module, prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the updates under PEFT's keys, and the names for target_parameters. PEFT wraps the
    tensors of a module one in the other, the first one innermost."""
    tensors: dict[str, Tensor] = {}
    names = []
    for name, layer in layers(model):
        for depth, (key, delta) in enumerate(reversed(layer.deltas.items())):
            place = f"{prefix}{name}{'.base_layer' * depth}"
            tensors |= {f"{place}.lora_A.weight": delta.A, f"{place}.lora_B.weight": delta.B}
            names.append(f"{name}.{key}")
    return tensors, sorted(names)
