"""Sizes of a trained adapter: parameters, ranks, bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

from adapters import io
from adapters.delta import AdaptedLinear, AdapterError, Pool
from adapters.linear import float_weight
from trainer.assembly.trained import Trained
from trainer.storage import run_folder


@dataclass
class Size:
    """Sizes of one layer; unknown values are None."""

    module: str
    bytes: int  # in the adapter's file
    parameters: int  # trained
    density: float | None = None  # share of the update's entries that are not zero
    norm: float | None = None  # of the update, over the base weight's
    rank: float | None = None  # effective


@torch.no_grad()
def sizes(run: Trained, spectrum: bool) -> list[Size]:
    """Return the sizes of every layer with an update, then of the modules that are saved whole; a
    single row if the adapter has no such layers.

    Raises:
        AdapterError: the run saves no adapter.
    """
    if not run.adapter.exportable:
        name = run_folder.read(str(run.folder))[1]["identity"]["choices"].get("adapter", "none")
        raise AdapterError(f"adapter={name} leaves no adapter to measure")
    stored = _stored(run)
    parameters = {name: p.numel() for name, p in run.model.named_parameters() if p.requires_grad}
    layers = []
    for name, saved_as, base, update, factors in _updates(run):
        size = Size(saved_as, _take(stored, saved_as), _take(parameters, name))
        size.density = float((update != 0).double().mean())
        size.norm = float(update.norm() / base.double().norm())
        if spectrum:
            values = low_rank_svdvals(*factors) if factors else torch.linalg.svdvals(update.float())
            size.rank = effective_rank(values)
        layers.append(size)
    if not layers:  # prompt methods: the saved tensors are not the trained parameters
        return [Size("all", sum(stored.values()), sum(parameters.values()))]
    pools = [name for name, module in run.model.named_modules() if isinstance(module, Pool)]
    shared = [name for name in parameters if name.startswith(tuple(f"{pool}." for pool in pools))]
    rest = sorted({key.rpartition(".")[0] for key in [*stored, *shared]})
    names = {name: _own_name(name) for name in parameters}
    for module in rest:
        trained = sum(
            count for name, count in parameters.items() if names[name].rpartition(".")[0] == module
        )
        layers.append(
            Size(
                module,
                sum(size for key, size in stored.items() if key.rpartition(".")[0] == module),
                trained,
            )
        )
    return layers


def effective_rank(values: Float[Tensor, " n"]) -> float:
    """Return exp of the entropy of the singular values over their sum; 0 if all are zero."""
    total = values.double().sum()
    if not total:
        return 0.0
    shares = values.double() / total
    return float(torch.special.entr(shares).sum().exp())


def low_rank_svdvals(B: Float[Tensor, "o r"], A: Float[Tensor, "r i"]) -> Float[Tensor, " n"]:
    """Return the singular values of B A, from those of an r x r matrix."""
    left, right = torch.linalg.qr(B.double())[1], torch.linalg.qr(A.double().t())[1]
    return torch.linalg.svdvals(left @ right.t())


def _updates(
    run: Trained,
) -> Iterator[tuple[str, str, Tensor, Tensor, tuple[Tensor, Tensor] | None]]:
    """Yield (name, name in the file, W, D, factors of D up to its scale if D = B A) of each adapted
    layer, in fp64."""
    for name, module in list(run.model.named_modules()):
        if isinstance(module, AdaptedLinear):
            delta: Any = module.delta
            delta.take_out(module.base)
            base = float_weight(module.base).double()
            update = delta.weight(base) - base
            delta.fold_in(module.base)
            yield name, name, base, update, _factors(delta)
        elif isinstance(module, BaseTunerLayer):
            yield (
                name,
                name.removeprefix(io.PREFIX),
                *_merged(run.adapter, name.removeprefix(io.PREFIX), module),
            )


def _factors(delta: Any) -> tuple[Tensor, Tensor] | None:
    """Return B and A if they are all of a delta's update, up to its scale."""
    if hasattr(delta, "factors"):
        A, B = delta.factors()
        return B, A
    alone = hasattr(delta, "A") and getattr(delta, "values", None) is None
    return (delta.B, delta.A) if alone else None


def _merged(
    adapter: Any, name: str, module: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return (W, D, factors) of a PEFT layer from merging it, since some methods do not add an
    update."""
    linear = module.get_base_layer()
    original = linear.weight.detach().clone()
    base = float_weight(linear).double()
    # PiSSA and similar initialisations have subtracted a part from the weight.
    base = base + adapter._initial_part(name, module).double() if adapter.initial else base.clone()
    try:
        module.merge()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"PEFT cannot merge {name}, so its update is unknown: {error}"
        ) from error
    update = float_weight(linear).double() - base
    module.merged_adapters.clear()
    linear.weight.data.copy_(original)
    plain = (
        not adapter.initial
        and hasattr(module, "lora_A")
        and not getattr(module, "lora_variant", {})
    )
    if not plain or "default" not in module.lora_A:
        return base, update, None
    return base, update, (module.lora_B["default"].weight, module.lora_A["default"].weight)


def _stored(run: Trained) -> dict[str, int]:
    """Return the bytes of each tensor of the adapter's file, by its key without PEFT's prefix."""
    stored = {}
    with tempfile.TemporaryDirectory() as temporary:
        kind = io.task_type(run.model, run.task.kind == "label")
        run.adapter.save(run.model, Path(temporary), run.base.path, kind)
        for path in Path(temporary).rglob("adapter_model.safetensors"):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(key)
                    stored[key.removeprefix(io.PREFIX)] = tensor.numel() * tensor.element_size()
    return stored


def _take(counts: dict[str, int], module: str) -> int:
    return sum(counts.pop(key) for key in list(counts) if key.startswith(f"{module}."))


def _own_name(name: str) -> str:
    """Return a parameter's name in the file."""
    return name.removeprefix(io.PREFIX).replace(".default", "").replace("modules_to_save.", "")
