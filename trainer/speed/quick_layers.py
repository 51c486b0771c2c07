"""A whole decoder layer of Llama's form in one call of few_rows.c, for a few tokens in bf16 on a
CPU.

    a = x + attention(norm(x)) W_o
    y = a + (silu(norm(a) W_gate) · norm(a) W_up) W_down

Its parts are those of trainer.speed.quick_passes, rounded at the same places. torch and Python take
as long between the parts of a layer of SmolLM2-135M as its parts do.

Only layers that have these modules and no others are taken, without biases, adapters and hooks, and
only if a layer computes what its own modules do on random numbers. A drafter's LoRA may be added to
the last places of each sequence (few_rows.LowRank).
"""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer.speed import elementwise, few_rows, fused
from trainer.speed.roomy_cache import RoomyLayer

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_CACHES = {"past_key_values", "cache"}  # the names of a layer's cache, by transformers' version
# The last two do not change what a layer computes.
_INPUTS = {"attention_mask", "position_embeddings", *_CACHES, "position_ids", "use_cache"}


class LowRank(ctypes.Structure):
    """`low_rank` of few_rows.c."""

    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64)]


class Parts(ctypes.Structure):
    """`layer_parts` of few_rows.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ["input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down", "low"]
        ),
        *((name, ctypes.c_int64) for name in ("changed", "hidden", "inner")),
        *((name, ctypes.c_void_p) for name in ("norm", "gated", "rotated")),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "scale")),
    ]


def is_layer(module: Any) -> bool:
    """Return whether a module has a layer's parts, and nothing that C would leave out."""
    if {name for name, _ in module.named_children()} != _LAYER or module._parameters:
        return False
    attention, mlp = module.self_attn, module.mlp
    linears: list[Any] = [getattr(attention, name, None) for name in _ATTENTION]
    linears += [getattr(mlp, name, None) for name in _MLP]
    norms = module.input_layernorm, module.post_attention_layernorm
    return (
        len(list(attention.children())) == 4
        and len(list(mlp.children())) == 4
        and not attention._parameters
        and not mlp._parameters
        and fused.is_gated(mlp)
        and all(few_rows.is_product(one) and one.bias is None for one in linears)
        and all(fused.is_norm(norm) and norm.weight.dtype == torch.bfloat16 for norm in norms)
        and isinstance(getattr(attention, "scaling", None), float)
        and isinstance(getattr(attention, "layer_idx", None), int)
        and getattr(attention, "head_dim", 1) % few_rows.LANES == 0
        and not any(
            part._forward_hooks or part._forward_pre_hooks
            for part in module.modules()
            if part is not module
        )
    )


def computes_the_same(module: Any) -> bool:
    """Return whether `decoder_layer` gives what a layer of `is_layer` gives, on random numbers."""
    attention, hidden = module.self_attn, module.input_layernorm.weight.shape[0]
    d, index = attention.head_dim, attention.layer_idx
    heads = attention.k_proj.out_features // d
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16()

    x, (keys, values) = drawn(1, 3, hidden), drawn(2, 1, heads, 5, d)
    angles = drawn(1, 3, d // 2).repeat(1, 1, 2)
    names = _CACHES & inspect.signature(type(module).forward).parameters.keys()
    mask = torch.ones(1, 1, 3, 8, dtype=torch.bool).tril(5)
    results = []
    for forward in (type(module).forward, decoder_layer):
        cache = DynamicCache()
        cache.layers = [RoomyLayer() for _ in range(index + 1)]
        cache.update(keys, values, index)
        inputs: dict[str, Any] = dict.fromkeys(names, cache)
        inputs |= {"attention_mask": mask, "position_embeddings": (angles.cos(), angles.sin())}
        try:
            out = forward(module, x, **inputs)
        except (TypeError, AttributeError):  # it takes other inputs
            return False
        entries: Any = cache.layers[index]
        results.append((out, entries.keys, entries.values))
    if any(type(out) is not Tensor for out, *_ in results):
        return False
    return all(
        one.shape == two.shape
        and torch.allclose(one, two, rtol=2e-2, atol=2e-2 * float(two.abs().max()))
        for one, two in zip(*results, strict=True)
    )


def decoder_layer(self: Any, hidden_states: Tensor, *more: Any, **inputs: Any) -> Any:
    layer = _entries(inputs, self.self_attn.layer_idx)
    mask, angles = inputs.get("attention_mask"), inputs.get("position_embeddings")
    others = any(inputs[name] is not None for name in inputs.keys() - _INPUTS)
    others |= any(low.rows != hidden_states.shape[1] for low in _lows(_linears(self)))
    if more or others or layer is None or not _fits(hidden_states, layer, angles, mask):
        return type(self).forward(self, hidden_states, *more, **inputs)
    return _computed(self, hidden_states, layer, angles, mask)


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn._modules, layer.mlp._modules
    return [*(attention[name] for name in _ATTENTION), *(mlp[name] for name in _MLP)]


def _lows(linears: list[Any]) -> list[few_rows.LowRank]:
    return [low for one in linears if (low := vars(one).get("low_rank")) is not None]


def _entries(inputs: dict[str, Any], index: int) -> RoomyLayer | None:
    """Return what a layer's cache has of the text so far."""
    for name in _CACHES & inputs.keys():
        cache = inputs[name]
        if isinstance(cache, DynamicCache) and index < len(cache.layers):
            layer = cache.layers[index]
            if type(layer) is RoomyLayer and layer.is_initialized:
                return layer
    return None


def _fits(x: Tensor, layer: Any, angles: Any, mask: Tensor | None) -> bool:
    """Return whether C supports these inputs."""
    B, n, _ = x.shape
    keys, count = layer.keys, layer.keys.shape[2] + n
    return (
        0 < B * n <= few_rows.MOST
        and x.dtype == keys.dtype == layer.values.dtype == torch.bfloat16
        and keys.shape == layer.values.shape
        and isinstance(angles, tuple)
        and len(angles) == 2
        and all(
            one.dtype == torch.bfloat16
            and one.shape in ((1, n, keys.shape[3]), (B, n, keys.shape[3]))
            for one in angles
        )
        and (
            n == 1
            if mask is None
            else mask.dtype in (torch.bool, torch.bfloat16)
            and mask.shape in ((1, 1, n, count), (B, 1, n, count))
            and mask.stride(3) == 1
        )
    )


def _computed(self: Any, x: Tensor, layer: Any, angles: Any, mask: Tensor | None) -> Tensor:
    attention, linears = self.self_attn, _linears(self)
    x = x.contiguous()
    cosine, sine = (one.contiguous() for one in angles)
    (B, n, hidden), inner = x.shape, self.mlp.gate_proj.out_features
    layer.lengthen(n)
    keys, values = layer.keys, layer.values
    G, count, d = keys.shape[1:]
    H = attention.q_proj.out_features // d
    steps = (
        few_rows.Steps(),
        few_rows.Steps(*keys.stride()[:3]),
        few_rows.Steps(*values.stride()[:3]),
    )
    shape = few_rows.Shape(B, H, G, n, count, d, *few_rows.described(mask), *steps)
    norms = self.input_layernorm, self.post_attention_layernorm
    weights = [
        module._parameters["weight"].data_ptr()
        for module in (norms[0], *linears[:4], norms[1], *linears[4:])
    ]
    low, changed, room = _low_ranks(linears)
    eps = [norm.variance_epsilon for norm in norms]
    place = None if low is None else ctypes.addressof(low)
    sizes = changed, hidden, inner
    parts = Parts(*weights, place, *sizes, *_functions(), *eps, attention.scaling)
    rows = B * n
    width = 2 * hidden + 3 * H * d + 3 * G * d + 2 * inner
    numbers = x.new_empty(rows * width + 10 * 32 + room)
    y, scratch = torch.empty_like(x), few_rows.scratch_of(shape)
    call: Any = few_rows.library().layer  # type: ignore[union-attr]
    call(
        ctypes.addressof(parts),
        *(tensor.data_ptr() for tensor in (x, y, cosine, sine)),
        n * d if len(cosine) > 1 else 0,
        *(tensor.data_ptr() for tensor in (keys, values)),
        None if mask is None else mask.data_ptr(),
        ctypes.addressof(shape),
        numbers.data_ptr(),
        scratch.data_ptr(),
    )
    return y


def _low_ranks(linears: list[Any]) -> tuple[ctypes.Array[LowRank] | None, int, int]:
    """Return (the low-rank products of a decoder layer's linear layers, how many places of a
    sequence they change, how many numbers of memory they need)."""
    lows = _lows(linears)
    if not lows:
        return None, 0, 0
    array = (LowRank * len(linears))()  # zeros: a layer without one
    for place, linear in enumerate(linears):
        if (low := vars(linear).get("low_rank")) is not None:
            low.used = True
            array[place] = LowRank(low.a.data_ptr(), low.b.data_ptr(), len(low.a))
    changed = lows[0].last
    return array, changed, max(changed * (len(low.a) + len(low.b)) for low in lows) + 32


def _functions() -> list[int | None]:
    names = ("norm_bf16", "gated_bf16", "rotated_bf16")
    return [
        ctypes.cast(getattr(elementwise.library(), name), ctypes.c_void_p).value for name in names
    ]
