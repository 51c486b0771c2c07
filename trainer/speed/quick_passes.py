"""Faster passes of frozen models over a few tokens, as decoding runs them, in bf16 on a CPU.

    with quick(model, drafter):
        model(...)

While the context is open, the models' own modules compute some parts in C: linear layers and
attention by trainer.speed.few_rows, RMSNorm and gated MLPs by trainer.speed.elementwise. Their
numbers are those of the plain modules up to rounding. A decoder layer of Llama's form is one call
(trainer.speed.quick_layers). What the C code does not support is computed as before: other dtypes
and devices, many rows, layers of an adapter and of a quantised base.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import time
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.speed import elementwise, few_rows, fused, quick_layers
from trainer.speed.attention import UNSUPPORTED

FEW_ROWS = "few_rows"  # the attention's name in transformers
DIAGONAL = "sdpa_and_diagonal"  # EAGLE's attention, in decoding the same as sdpa
TURNS = 5  # the shortest of at least so many counts
MOST_TURNS = 30  # a busy machine may slow one way down for some turns
SECONDS = 0.1  # turns after the first TURNS start within this time
# C is taken where it is so much faster: near 1 two starts on one machine could choose differently,
# and a text in bf16 with them.
MARGIN = 1.25
SMALLEST = 1 << 16  # numbers of a weight: below, both take microseconds, and the choice is chance


def linear(self: Any, x: Tensor) -> Tensor:
    weight, bias = self._parameters["weight"], self._parameters["bias"]  # 1 µs faster
    if x.dtype == weight.dtype == torch.bfloat16 and 0 < x.numel() <= few_rows.MOST * x.shape[-1]:
        return few_rows.product(x, weight, bias)
    return F.linear(x, weight, bias)


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype == torch.bfloat16 and elementwise.supports(hidden_states, self.weight):
        return elementwise.norm(hidden_states, self.weight, self.variance_epsilon)[0]
    return type(self).forward(self, hidden_states)


def gated(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if gate.dtype == torch.bfloat16 and elementwise.supports(gate, up):
        return self.down_proj(elementwise.gated(gate, up))
    return self.down_proj(self.act_fn(gate) * up)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' sdpa attention."""
    special = dropout or any(more.get(name) is not None for name in UNSUPPORTED)
    if not special and few_rows.can_attend(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return few_rows.attended(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **more
    )  # type: ignore[return-value]


AttentionInterface.register(FEW_ROWS, attention)
_OURS = (linear, norm, gated, quick_layers.decoder_layer)


@dataclass
class Plan:
    """The modules of a model that C can compute."""

    forwards: list[tuple[nn.Module, Callable[..., Tensor]]]
    configs: list[tuple[Any, Any, Any]]  # (attention module, its config, the config with FEW_ROWS)
    layers: list[nn.Module]  # whole decoder layers
    open: int = 0  # contexts


_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def quick(*models: Any) -> Iterator[None]:
    """Let modules of the models compute in C while the context is open, without gradients, where
    that is faster here. GRAFT_PLAIN_DECODING=1 switches it off."""
    plain = os.environ.get("GRAFT_PLAIN_DECODING") == "1"
    with contextlib.ExitStack() as stack:
        for model in models:
            if isinstance(model, nn.Module) and not plain:
                stack.enter_context(_put_in(model))
        yield


@contextlib.contextmanager
def _put_in(model: nn.Module) -> Iterator[None]:
    if model not in _plans:
        _plans[model] = _plan(model)
    plan = _plans[model]
    plan.open += 1
    for module, forward in plan.forwards:
        if "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    for layer in plan.layers:
        # An adapter may have been attached since.
        if "forward" not in vars(layer) and _is_plain(layer) and quick_layers.is_layer(layer):
            layer.forward = types.MethodType(quick_layers.decoder_layer, layer)  # type: ignore[method-assign]
    for module, _, config in plan.configs:
        module.config = config
    try:
        yield
    finally:
        plan.open -= 1
        if not plan.open:
            for module in (*(module for module, _ in plan.forwards), *plan.layers):
                if getattr(vars(module).get("forward"), "__func__", None) in _OURS:
                    del module.forward
            for module, config, _ in plan.configs:
                module.config = config


def _is_plain(layer: nn.Module) -> bool:
    """Return whether no module has a forward of another's on the instance."""
    own = [vars(module).get("forward") for module in layer.modules()]
    return all(one is None or getattr(one, "__func__", None) in _OURS for one in own)


def _plan(model: nn.Module) -> Plan:
    """Find what C can compute. A norm and an MLP are tried on random numbers, one of each class."""
    plan = Plan([], [], [])
    linears = [module for module in model.modules() if few_rows.is_product(module)]
    if not linears or few_rows.library() is None:
        return plan
    if not _is_faster(sorted(linears, key=_size)[len(linears) // 2]):
        return plan
    plan.forwards += [(module, linear) for module in linears if "forward" not in vars(module)]
    if elementwise.library() is not None:
        for forward, fits in ((norm, fused.is_norm), (gated, fused.is_gated)):
            tried: dict[Any, bool] = {}
            for module in model.modules():
                if not fits(module) or "forward" in vars(module):
                    continue
                key = type(module), getattr(module, "variance_epsilon", None)
                if key not in tried:
                    tried[key] = fused.same(module, forward)
                if tried[key]:
                    plan.forwards.append((module, forward))
        plan.layers += _layers(model)
    copies: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if hasattr(module, "num_key_value_groups") and name in ("sdpa", DIAGONAL):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                copies[id(config)]._attn_implementation = FEW_ROWS
            plan.configs.append((module, config, copies[id(config)]))
    return plan


@torch.no_grad()
def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers that C can compute. Each is tried: some models leave out a part in
    some layers. A layer runs in one thread, so that with several its weights must be small."""
    layers = [module for module in model.modules() if quick_layers.is_layer(module)]
    alone = torch.get_num_threads() == 1
    return [
        layer
        for layer in layers
        if _is_plain(layer)
        and (alone or max(p.numel() for p in layer.parameters()) < 2 * few_rows.SHARE)
        and quick_layers.computes_the_same(layer)
    ]


def _size(module: Any) -> int:
    return module.weight.numel()


def _is_faster(module: Any) -> bool:
    return _size(module) >= SMALLEST and _faster(
        tuple(module.weight.shape), torch.get_num_threads()
    )


@functools.cache
@torch.no_grad()
def _faster(shape: tuple[int, int], threads: int) -> bool:
    """Return whether C multiplies a few rows with a weight of this shape faster than torch, which
    may have more threads."""
    # not process_time, which counts other threads, as those that load weights
    clock = time.thread_time if threads == 1 else time.monotonic
    weight = torch.ones(shape, dtype=torch.bfloat16)
    inputs = [weight.new_ones(rows, shape[1]) for rows in (1, 8)]
    calls: list[Any] = [F.linear, few_rows.product]
    shortest = {(call, x.shape[0]): float("inf") for call in calls for x in inputs}
    end = time.monotonic() + SECONDS
    for turn in range(MOST_TURNS):
        if turn >= TURNS and time.monotonic() > end:
            break
        for call, x in itertools.product(calls, inputs):
            started = clock()
            call(x, weight)
            way = call, x.shape[0]
            shortest[way] = min(shortest[way], clock() - started)
    by_torch, by_c = (sum(shortest[call, x.shape[0]] for x in inputs) for call in calls)
    return MARGIN * by_c < by_torch
