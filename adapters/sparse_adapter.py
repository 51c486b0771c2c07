"""The parts that RoSA and SpIEL share: attaching sparse deltas, their state and their files."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters import containers, experts, lora, mask, sddmm, trained_copies
from adapters.delta import (
    AdaptedLinear,
    AdapterError,
    Start,
    ends_with,
    freeze,
    train_modules,
)
from adapters.linear import features, output_layer
from adapters.sparse import SparseDelta, layers, supports
from adapters.targets import targets

log = logging.getLogger("trainer")
TINY = 0.01  # of the largest layer's entries


class SparseAdapter(experts.UpdatesExperts):
    """The common base class of RoSA and SpIEL."""

    compiles = False
    rank: int | None = None
    alpha = 0.0
    rslora = False
    dropout = 0.0
    dtype = torch.float32  # of the low-rank part
    target_parameters: str | list[str] = []

    def __init__(
        self,
        density: float,
        density_pattern: dict[str, float],
        target_modules: str | list[str],
        exclude_modules: list[str],
        gradient: str,
        sparse_dtype: str,
        within: str = "all",
    ):
        for ending, value in density_pattern.items():
            if not isinstance(value, int | float):
                raise AdapterError(
                    f"adapter.density_pattern has {ending}: {value!r}: expected a number, as"
                    " {down_proj: 0.01}"
                )
        self.density, self.density_pattern = density, dict(density_pattern)
        self.target_modules, self.exclude_modules = target_modules, list(exclude_modules)
        self.way, self.sparse_dtype = gradient, getattr(torch, sparse_dtype)
        self.within = within

    def new_delta(self, linear: Any, k: int) -> SparseDelta:
        """Return the delta of one target. Called once per target."""
        return SparseDelta(linear, k, self.sparse_dtype)

    def begin(self, model: nn.Module, start: Start) -> None:
        """Choose the supports, or prepare to. Called when all deltas of a new run are attached."""

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        freeze(model)
        linears = targets(model, self.target_modules, self.exclude_modules, start.new_modules)
        linears = self._large_enough(linears)
        sizes = self._sizes(linears)
        _untie_targets(model, linears)
        for name, linear in linears:
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                child,
                AdaptedLinear(linear, self.new_delta(linear, sizes[name])),
            )
        self._confine(model)
        train_modules(model, start.new_modules)
        trained_copies.attach(model, self.train_modules, start.new_tokens)
        self._attach_experts(model)
        if any(layer.delta.values is not None for _, layer in layers(model)):
            # PEFT has no sparse method for Conv1D, and no LoRA that wraps SHiRA's 8-bit layers.
            eight_bit = self.rank is not None and any(
                type(linear.weight).__name__ == "Int8Params" for _, linear in linears
            )
            self.exportable = not eight_bit and not any(
                isinstance(linear, Conv1D) for _, linear in linears
            )
            # PEFT's low-rank parts fill zeros of the base.
            self.exportable &= self.within == "all" or self.rank is None
            if experts.layers(model):  # of PEFT's methods for both parts only LoRA has experts
                self.exportable &= containers.holds_pair(model)
        self.ways = dict(start.saved["extra"]["ways"]) if start.saved is not None else {}
        if self.way == "native" and sddmm.library() is None:
            raise AdapterError(
                "adapter.gradient=native needs a C compiler (gcc 12, clang, or another that $CC"
                " names), and none here compiles adapters/sddmm.c: install one, or set"
                " gradient=auto"
            )
        if next(model.parameters()).device.type == "meta":
            return model
        for _, layer in layers(model):
            self._choose_way(layer)
        if start.saved is None:
            self.begin(model, start)
        return model

    def _confine(self, model: nn.Module) -> None:
        """With within=nonzero, let zeros of the base stay zero.

        Raises:
            AdapterError: the base has no zeros, or a support is larger than what is not zero.
        """
        if self.within == "all":
            return
        zeros = 0
        for name, layer in layers(model):
            delta = layer.delta
            delta.confined = True
            if layer.base.weight.device.type == "meta":
                zeros = 1  # as far as is known
                continue
            allowed: Any = delta.surviving(layer.base)
            count, k = int(allowed.sum()), 0 if delta.values is None else len(delta.indices)
            zeros += len(allowed) - count
            if k > count:
                raise AdapterError(
                    f"adapter.within=nonzero: {name} has {count} entries that are not zero, and its"
                    f" density asks for {k}: lower adapter.density"
                )
        if not zeros:
            raise AdapterError(
                "adapter.within=nonzero keeps zeros of the base, and it has none. Use within=all,"
                " or a base that graft shrink has pruned"
            )

    def _attach_experts(self, model: nn.Module) -> None:
        """Put low-rank updates on the tensors of experts that target_parameters names.

        Raises:
            AdapterError: none has such a name, or the method has no low-rank part.
        """
        if not self.target_parameters:
            return
        rank = self.rank
        if rank is None:
            raise AdapterError(
                f"adapter.target_parameters={self.target_parameters} gives experts a low-rank"
                " update, and this adapter has none: sparse updates are of linear layers only, here"
                " and in PEFT. Set adapter=rosa or adapter=lora"
            )
        scale = lora.scaling(rank, self.alpha, self.rslora)
        experts.attach(model, self.target_parameters, rank, scale, self.dtype)

    def _large_enough(self, linears: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
        """Leave out tiny layers of which the density is less than one entry, as Gemma 3n's of
        4 x 4, unless they were named."""
        sizes = {name: math.prod(features(linear)) for name, linear in linears}
        if self.target_modules != "all-linear" or not 0 < self.density <= 1:
            return linears
        tiny = max(sizes.values()) * TINY
        named = tuple(self.density_pattern)
        small = [
            name
            for name, size in sizes.items()
            if size < tiny and size * self.density < 1 and not ends_with(name, *named)
        ]
        if small:
            log.info(
                "%d layers, such as %s of %d entries, are too small for one at density %g and get"
                " no adapter",
                len(small),
                small[0],
                sizes[small[0]],
                self.density,
            )
        return [layer for layer in linears if layer[0] not in set(small)]

    def _sizes(self, linears: list[tuple[str, nn.Module]]) -> dict[str, int]:
        """Return the number of entries of each layer's support. The first pattern that a name ends
        with sets its density."""
        used, sizes = set(), {}
        self.densest = 0.0
        for name, linear in linears:
            pattern = next((end for end in self.density_pattern if ends_with(name, end)), None)
            used.add(pattern)
            i, o = features(linear)
            density = self.density if pattern is None else self.density_pattern[pattern]
            sizes[name] = mask.entries(o, i, density, name)
            self.densest = max(self.densest, density)
        if unused := sorted(set(self.density_pattern) - used):  # type: ignore[type-var]
            raise AdapterError(
                f"adapter.density_pattern has {unused[0]!r}, which is the end of no adapted layer's"
                f" name, such as {linears[0][0]}"
            )
        return sizes

    def _choose_way(self, layer: AdaptedLinear) -> None:
        """Choose how the gradient is computed. A resumed run keeps the choice, since the methods
        round differently."""
        delta: Any = layer.delta
        if delta.values is None:
            return
        key = f"{delta.o} {delta.i} {len(delta.values)}"
        if key not in self.ways:
            weight = layer.base.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            layer_kind = (delta.o, delta.i, len(delta.values), dtype, weight.device)
            self.ways[key] = sddmm.fastest(*layer_kind) if self.way == "auto" else self.way
        delta.way = self.ways[key]
        device = layer.base.weight.device
        if delta.way == "native" and not sddmm.native_available(torch.float32, device):
            delta.way = "sampled"  # the same sums in another order

    def ignores_skips(self) -> bool:
        return type(self).after_clipping is SparseAdapter.after_clipping

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        for _, layer in layers(model):
            layer.delta.folded_version = None  # some optimisers do not increase tensors' versions
            layer.delta.refresh(layer.base)
        if step == 1:
            mask.refuse_divergence(supports(model))
        return None

    def state(self, model: nn.Module) -> dict[str, Any]:
        state = super().state(model)
        state["extra"]["ways"] = self.ways
        state["extra"]["settled"] = list(supports(model))
        return state

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        attached = list(layers(model))
        for _, layer in attached:
            layer.delta.take_out(layer.base)
        try:
            super().load_state(model, state)
            with_support = set(state["extra"]["settled"])
            for name, layer in attached:
                layer.delta.has_support = name in with_support
        finally:
            for _, layer in attached:
                layer.delta.fold_in(layer.base)

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        if not self._has_support(model):
            containers.save_low_rank(self, model, folder, base_name, task_type)
        elif experts.layers(model) or any(layer.delta.packed for _, layer in layers(model)):
            self.save_pair(model, folder, base_name, task_type)
        else:
            containers.save_supertuning(self, model, folder, base_name, task_type)

    def _has_support(self, model: nn.Module) -> bool:
        """Return whether some layer has a support.

        Raises:
            AdapterError: stock PEFT cannot load this adapter, or there is nothing to save.
        """
        if not self.exportable:
            raise AdapterError(
                "stock PEFT cannot load this adapter: export the merged model with to=merged"
            )
        has_support = any(layer.delta.has_support for _, layer in layers(model))
        if not has_support and self.rank is None:
            raise AdapterError(
                "the adapter has no support yet, so there is nothing to save: the run ended before"
                " its mask"
            )
        return has_support

    def save_pair(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        """Write the sparse part as SHiRA and the low-rank part as LoRA. Stock PEFT loads these two
        adapters also onto 4-bit bases."""
        if not self._has_support(model):
            raise AdapterError(
                "the adapter has no sparse part, so there is no pair to write: export it with"
                " to=peft"
            )
        shira = folder / "shira" if self.rank else folder
        containers.save_shira(self, model, shira, base_name, task_type)
        if self.rank:
            containers.save_low_rank(self, model, folder / "lora", base_name, task_type)

    def load_stock(self, base: nn.Module, folder: Path) -> nn.Module:
        if (folder / "shira").exists():
            return containers.load_pair(base, folder)
        return super().load_stock(base, folder)


def _untie_targets(model: nn.Module, linears: list[tuple[str, nn.Module]]) -> None:
    """Copy weights that a target shares with other modules. A delta that is folded into a shared
    weight would change the other modules too."""
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    for _, linear in linears:
        weight: Any = linear.weight
        if users[id(weight)] > 1:
            users[id(weight)] -= 1
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            if linear is output_layer(model):
                model.config.tie_word_embeddings = False  # type: ignore[union-attr, assignment]
