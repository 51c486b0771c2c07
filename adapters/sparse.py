"""A sparse delta of frozen linear layers, on a support that stays or changes, alone or beside a
low-rank one.

    y = (W + S) x + s B A D(x) + b

    W (o, i)  frozen      S  k values at flat indices row · i + col, zero at the start      s B A  low rank, if there is one
    D  dropout, on the low-rank branch only

A dense weight *holds* W + S while it is attached: W's own entries at the support are kept aside,
and the sum is written anew when the values have changed. So the forward pass is one dense product,
nothing dense is copied or kept for the backward pass, and the base comes back bit for bit. On a
bf16 base W + S is rounded to bf16, as it is wherever such weights are served; the values themselves
are fp32 and collect what rounding hides. A 4- or 8-bit weight is dequantised, added to and
multiplied, and that is done again in the backward pass.

Forward    y = x (W + S)ᵀ + s (x̃ Aᵀ) Bᵀ + b          x̃ = D(x)
Backward   dx = dy (W + S) + D'(s (dy B) A)     dA = s (dy B)ᵀ x̃     dB = s dyᵀ (x̃ Aᵀ)     dS_j = Σ_t dy[t, row_j] x[t, col_j]
Shapes     x (t, i), dy (t, o), A (r, i), B (o, r), S and dS (k,)
Notes      x, or what it can be made from, is kept once for all three parts, and x̃ Aᵀ (t, r); D's mask only where its rate is not 0.

The formulas are those of RoSA (Nikdan et al. 2024, arXiv 2401.04679); its reference code rebuilds W
+ S in each forward and each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adapters import containers, mask, sddmm
from adapters.delta import (
    AdaptedLinear,
    Adapter,
    AdapterError,
    Delta,
    Start,
    features,
    float_weight,
    freeze,
    output_layer,
    saved_for_backward,
    targets,
    train_modules,
)

Watcher = Callable[[Tensor, Tensor], None]  # is given dy (t, o) and x (t, i) of each backward pass


class SparseDelta(Delta):
    """The sparse, and possibly low-rank, update of one linear layer. It has no support until
    `settle` gives it one."""

    values: Any  # (k,), the trained entries; None where there are none
    indices: Any  # (k,) int32, sorted row · i + column
    A: Any  # (r, i), and B (o, r), of methods with a low-rank part; else None
    B: Any
    kept: Any  # (k,) the base's own entries while this is held
    crow: Any  # (o + 1,) and col (k,) int32: the support in CSR
    col: Any
    scale = 0.0
    dropout = 0.0

    def __init__(self, linear: Any, k: int, dtype: torch.dtype):
        super().__init__()
        self.i, self.o = features(linear)
        device = linear.weight.device
        self.values = nn.Parameter(torch.zeros(k, device=device, dtype=dtype)) if k else None
        self.register_buffer(
            "indices", torch.zeros(k, device=device, dtype=torch.int32) if k else None
        )
        self.register_parameter("A", None)
        self.register_parameter("B", None)
        for name in ("kept", "crow", "col"):
            self.register_buffer(name, None, persistent=False)
        self.settled = False  # whether the indices are a support
        self.way = "gathered"  # of sddmm
        self.watch: Watcher | None = None
        # the version of the values that the base's weight holds
        self.written: tuple[int, int] | None = None
        self.packed = is_packed(linear)
        self.transposed = isinstance(linear, Conv1D)

    def settle(self, indices: Int[Tensor, " k"], base: Any) -> None:
        """Take sorted flat indices for the support; values stay as they are. The base must not hold
        this delta."""
        assert self.kept is None
        self.indices.copy_(indices)
        self.settled = True
        self.hold(base)

    def hold(self, base: Any) -> None:
        if not self.settled or self.kept is not None or self.indices.device.type == "meta":
            return
        flat = self.indices.long()
        self.crow = torch.searchsorted(
            flat // self.i, torch.arange(self.o + 1, device=flat.device)
        ).int()
        self.col = (flat % self.i).int()
        if self.packed:
            return
        self.kept = base.weight.detach().view(-1).index_select(0, self._stored())
        self.written = None
        self.write(base)

    def release(self, base: Any) -> None:
        if self.kept is not None:
            with torch.no_grad():
                base.weight.view(-1).index_copy_(0, self._stored(), self.kept)
            self.kept = self.written = None

    def write(self, base: Any) -> None:
        """Bring the base's weight up to date with the values."""
        version = (id(self.values), self.values._version) if self.values is not None else None
        if self.kept is None or version == self.written:
            return
        with torch.no_grad():
            wide = torch.promote_types(self.kept.dtype, self.values.dtype)
            base.weight.view(-1).index_copy_(
                0, self._stored(), (self.kept.to(wide) + self.values).to(self.kept.dtype)
            )
        self.written = version

    def _stored(self) -> Tensor:
        """The support as positions in the base's memory."""
        flat = self.indices.long()
        return flat % self.i * self.o + flat // self.i if self.transposed else flat

    def linear(self, base: Any, x: Tensor) -> Tensor:
        if self.values is not None and self.settled:
            self.write(base)
        return _Linear.apply(x, self.values, self.A, self.B, base, self, *saved_for_backward(x))

    def dense(self, base: Any, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """W + S in a dtype: the held weight itself where it has that dtype, else a new tensor."""
        if not self.packed:
            weight = base.weight.t() if self.transposed else base.weight
            return weight.to(dtype)
        dense = float_weight(base)
        if self.settled:
            dense.view(-1).index_add_(0, self.indices, self.values.detach().float())
        return dense.to(dtype)

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        if self.settled:
            w = w.flatten().index_add(0, self.indices, self.values.to(w.dtype)).view(w.shape)
        if self.A is not None and self.B is not None:
            w = w + self.scale * (self.B.to(w.dtype) @ self.A.to(w.dtype))
        return w

    def gradient(self, dy: Float[Tensor, "t o"], x: Float[Tensor, "t i"]) -> Float[Tensor, " k"]:
        """The loss's gradient at the support."""
        if self.way == "gathered":
            return sddmm.gathered(dy, x, self.indices)
        native = self.way == "native" and x.dtype in sddmm.NATIVE  # autocast's fp16 is not
        return (sddmm.native if native else sddmm.sampled)(dy, x, self.crow, self.col)


def is_packed(linear: Any) -> bool:
    """Whether a linear layer's weight is quantised."""
    return not linear.weight.is_floating_point() or type(linear.weight).__name__ in (
        "Params4bit",
        "Int8Params",
    )


class _Linear(torch.autograd.Function):
    """The layer of the module's text; see its Forward and Backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        base: Any,
        delta: SparseDelta,
        make: Any,
        *of: Tensor,
    ) -> Tensor:
        dtype = _compute_dtype(x, base)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            bias = base.bias.to(dtype) if base.bias is not None else None
            y = F.linear(flat, delta.dense(base, dtype), bias)
            low = kept = None
            if A is not None and B is not None:
                dropped = flat
                if delta.dropout and delta.training:
                    kept = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - delta.dropout)
                    dropped = flat * kept / (1 - delta.dropout)
                low = dropped @ A.to(dtype).t()
                y.addmm_(low, B.to(dtype).t(), alpha=delta.scale)
        # A reference to the weight, by which autograd notices a change before the backward pass.
        ctx.save_for_backward(
            A,
            B,
            low,
            kept,
            None if delta.packed else base.weight,
            *(of if make is not None else (flat,)),
        )
        ctx.base, ctx.delta, ctx.make, ctx.dtype, ctx.shape = base, delta, make, dtype, x.shape
        ctx.dtypes = (x.dtype, values.dtype if values is not None else None)
        return y.view(*x.shape[:-1], delta.o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        A, B, low, kept, _, *of = ctx.saved_tensors
        delta: SparseDelta = ctx.delta
        dx = dvalues = dA = dB = None
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.to(ctx.dtype).reshape(-1, delta.o)
            x = (
                of[0]
                if ctx.make is None
                else ctx.make(*of).to(ctx.dtype).reshape(-1, ctx.shape[-1])
            )
            if delta.watch is not None:
                delta.watch(dy, x)
            if delta.settled and ctx.needs_input_grad[1]:
                dvalues = delta.gradient(dy, x).to(ctx.dtypes[1])
            # before there is a support nothing else has a gradient, and 16-mixed looks there for
            # infinities
            elif A is None:
                dvalues = torch.zeros_like(delta.values) + 0 * dy.float().sum()
            if ctx.needs_input_grad[0]:
                dx = dy @ delta.dense(ctx.base, x.dtype)
            if A is not None and B is not None:
                dlow = delta.scale * (dy @ B.to(x.dtype))
                if ctx.needs_input_grad[2]:
                    dropped = x if kept is None else x * kept / (1 - delta.dropout)
                    dA = (dlow.t() @ dropped).to(A.dtype)
                if ctx.needs_input_grad[3]:
                    dB = (delta.scale * (dy.t() @ low)).to(B.dtype)
                if dx is not None and kept is None:
                    dx.addmm_(dlow, A.to(x.dtype))
                elif dx is not None:
                    dx += (dlow @ A.to(x.dtype)) * kept / (1 - delta.dropout)
        return (
            dx.view(ctx.shape).to(ctx.dtypes[0]) if dx is not None else None,
            dvalues,
            dA,
            dB,
            None,
            None,
            None,
            *(None for _ in of),
        )


def _compute_dtype(x: Tensor, base: Any) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return base.weight.dtype if not is_packed(base) else x.dtype


class SparseAdapter(Adapter):
    """What RoSA and SpIEL share: attaching sparse deltas, holding them in the weights, their state
    and their files."""

    compiles = False
    rank: int | None = None
    alpha = 0.0
    rslora = False
    dropout = 0.0

    def __init__(
        self,
        density: float,
        density_pattern: dict[str, float],
        target_modules: str | list[str],
        exclude_modules: list[str],
        gradient: str,
        sparse_dtype: str,
    ):
        if wrong := [
            f"{end}: {value!r}"
            for end, value in density_pattern.items()
            if not isinstance(value, int | float)
        ]:
            raise AdapterError(
                f"adapter.density_pattern has {wrong[0]}: expected a number, as {{down_proj: 0.01}}"
            )
        self.density, self.density_pattern = density, dict(density_pattern)
        self.target_modules, self.exclude_modules = target_modules, list(exclude_modules)
        self.way, self.sparse_dtype = gradient, getattr(torch, sparse_dtype)

    def new_delta(self, linear: Any, k: int) -> SparseDelta:
        """The delta of one target; called once per target."""
        return SparseDelta(linear, k, self.sparse_dtype)

    def begin(self, model: nn.Module, start: Start) -> None:
        """Called when all deltas are attached and nothing is saved: choose supports, or prepare
        to."""

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        freeze(model)
        found = targets(model, self.target_modules, self.exclude_modules, start.new_modules)
        sizes = self._sizes(found)
        _own_weights(model, found)
        for name, linear in found:
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                child,
                AdaptedLinear(linear, self.new_delta(linear, sizes[name])),
            )
        train_modules(model, start.new_modules)
        if any(layer.delta.values is not None for _, layer in layers(model)):
            # PEFT has neither a sparse method for Conv1D, nor a LoRA that goes around SHiRA's 8-bit
            # layers.
            eight_bit = self.rank is not None and any(
                type(linear.weight).__name__ == "Int8Params" for _, linear in found
            )
            self.exportable = not eight_bit and not any(
                isinstance(linear, Conv1D) for _, linear in found
            )
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

    def _sizes(self, found: list[tuple[str, nn.Module]]) -> dict[str, int]:
        """Entries of each layer's support; the first pattern that a name ends with gives its
        density."""
        used, sizes = set(), {}
        self.densest = 0.0
        for name, linear in found:
            pattern = next(
                (end for end in self.density_pattern if name == end or name.endswith("." + end)),
                None,
            )
            used.add(pattern)
            i, o = features(linear)
            density = self.density if pattern is None else self.density_pattern[pattern]
            sizes[name] = mask.entries(o, i, density, name)
            self.densest = max(self.densest, density)
        if unused := sorted(set(self.density_pattern) - used):  # type: ignore[type-var]
            raise AdapterError(
                f"adapter.density_pattern has {unused[0]!r}, which is the end of no adapted layer's"
                f" name, such as {found[0][0]}"
            )
        return sizes

    def _choose_way(self, layer: AdaptedLinear) -> None:
        """How the gradient is computed. A resumed run takes the same, since the other one rounds
        otherwise."""
        delta: Any = layer.delta
        if delta.values is None:
            return
        key = f"{delta.o} {delta.i} {len(delta.values)}"
        if key not in self.ways:
            weight = layer.base.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            measured = (delta.o, delta.i, len(delta.values), dtype, weight.device)
            self.ways[key] = sddmm.fastest(*measured) if self.way == "auto" else self.way
        delta.way = self.ways[key]
        if delta.way == "native" and not sddmm.possible(torch.float32, layer.base.weight.device):
            delta.way = "sampled"  # the same sums in another order

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        for _, layer in layers(model):
            layer.delta.written = None  # optimisers of other libraries do not count versions
            layer.delta.write(layer.base)
        if step == 1:
            mask.refuse_divergence(supports(model))
        return None

    def state(self, model: nn.Module) -> dict[str, Any]:
        state = super().state(model)
        state["extra"]["ways"] = self.ways
        state["extra"]["settled"] = [name for name, layer in layers(model) if layer.delta.settled]
        return state

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        attached = list(layers(model))
        for _, layer in attached:
            layer.delta.release(layer.base)
        try:
            super().load_state(model, state)
            settled = set(state["extra"]["settled"])
            for name, layer in attached:
                layer.delta.settled = name in settled
        finally:
            for _, layer in attached:
                layer.delta.hold(layer.base)

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        if not self._has_support(model):
            containers.save_low_rank(self, model, folder, base_name, task_type)
        elif any(layer.delta.packed for _, layer in layers(model)):
            self.save_pair(model, folder, base_name, task_type)
        else:
            containers.save_supertuning(self, model, folder, base_name, task_type)

    def _has_support(self, model: nn.Module) -> bool:
        """
        Raises:
            AdapterError: stock PEFT has nothing for this adapter.
        """
        if not self.exportable:
            raise AdapterError(
                "stock PEFT cannot load this adapter: export the merged model with to=merged"
            )
        settled = any(layer.delta.settled for _, layer in layers(model))
        if not settled and self.rank is None:
            raise AdapterError(
                "the adapter has no support yet, so there is nothing to save: the run ended before"
                " its mask"
            )
        return settled

    def save_pair(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        """Write the sparse part as SHiRA and the low-rank part as LoRA, two adapters that stock
        PEFT also puts on 4-bit bases."""
        if not self._has_support(model):
            raise AdapterError(
                "the adapter has no sparse part, so there is no pair to write: export it with"
                " to=peft"
            )
        containers.save_shira(
            self, model, folder / "shira" if self.rank else folder, base_name, task_type
        )
        if self.rank:
            containers.save_low_rank(self, model, folder / "lora", base_name, task_type)

    def load_stock(self, base: nn.Module, folder: Path) -> nn.Module:
        return (
            containers.load_pair(base, folder)
            if (folder / "shira").exists()
            else super().load_stock(base, folder)
        )


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers with a sparse delta, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and isinstance(module.delta, SparseDelta):
            yield name, module


def supports(model: nn.Module) -> dict[str, Tensor]:
    """The supports of all layers that have one."""
    return {name: layer.delta.indices for name, layer in layers(model) if layer.delta.settled}


def sparse_values(model: nn.Module) -> list[nn.Parameter]:
    """The values of all sparse deltas."""
    return [layer.delta.values for _, layer in layers(model) if layer.delta.values is not None]


def _own_weights(model: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    """Give targets that share their weight one of their own: what is held there must not change the
    others."""
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    for _, linear in found:
        weight: Any = linear.weight
        if users[id(weight)] > 1:
            users[id(weight)] -= 1
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            if linear is output_layer(model):
                model.config.tie_word_embeddings = False  # type: ignore[union-attr, assignment]
