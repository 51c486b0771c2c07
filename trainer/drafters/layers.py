"""Shared parts of drafters that are trained on a target's hidden states: their settings, and
decoder layers of the target's own family.

A drafter's layer has the class, the sizes and the kind of attention (full, or sliding over the same
window) of the target's last one. Rotary embeddings are the target's. In packed sequences a new row
starts where position_ids is not the previous value plus one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from adapters.linear import features
from trainer.drafters import Drafter, DrafterError, Target, TargetOutput
from trainer.drafters.starts import copy_layer, copy_weights
from trainer.models.cache_argument import cache_argument, with_cache
from trainer.models.heads import Head, after_output, captured_layers, decoder_of

_NORMS = ("norm", "final_layernorm", "final_layer_norm")
_TAKEN = {"attention_mask", "position_ids", "position_embeddings"}
_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class Heads(Drafter):
    """The settings of all methods: `weights` of the offsets' losses, or `default` if they are None;
    `weight` multiplies them all.

    Raises:
        DrafterError: `offsets` is less than 1, or there is not one weight for each of them.
    """

    def __init__(
        self,
        offsets: int,
        weights: list[float] | None,
        default: list[float],
        weight: float,
        detach: bool,
        lr_scale: float,
    ):
        super().__init__()
        if offsets < 1:
            raise DrafterError(
                f"drafter.offsets={offsets}, but a drafter predicts at least 1 token beyond the"
                " next"
            )
        if weights is not None and len(weights) != offsets:
            raise DrafterError(
                f"drafter.weights={list(weights)} are {len(weights)}, and"
                f" drafter.offsets={offsets}: give one for each, or null"
            )
        self.offsets = offsets
        self.weights = [
            weight * float(value) for value in (default if weights is None else weights)
        ]
        self.detach, self.lr_scale = detach, lr_scale

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group | {"lr_scale": self.lr_scale} for group in super().parameter_groups()]


def decayed(beta: float, count: int) -> list[float]:
    """Return beta^(k-1) for k = 1 .. count, divided by their sum."""
    powers = [beta**k for k in range(count)]
    return [power / sum(powers) for power in powers]


def decoder_layer(model: Any, init: str, back: int = 1) -> nn.Module:
    """Return a trained fp32 layer of the class of the model's last one, which stores its keys and
    values as a cache's layer 0.

    `init` is random, as transformers starts the model's own, or last_layer, a copy of the weights
    of the `back`-th layer from the end, dequantised if they are packed. It is on the meta device if
    the model is.

    Raises:
        DrafterError: the model's layers cannot be built and called that way; the message says why.
    """
    layers = _layers(model)
    last, config = layers[-1], model.config.get_text_config()

    make: Any = type(last)
    layer = _fresh(model, lambda: make(config, layer_idx=len(layers) - 1))
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0
    if init == "last_layer":
        copy_layer(layer_from_end(model, back), layer)
    return layer


def final_norm(model: Any, init: str) -> nn.Module:
    """Return a trained fp32 norm of the class of the model's last one: started as transformers
    starts it, or a copy with `init` last_layer.

    Raises:
        DrafterError: the norm is not where transformers' decoders have it, or its layers are not as
        `decoder_layer` needs them.
    """
    _layers(model)
    source = final_norm_of(model)
    norm = _fresh(model, lambda: copy.deepcopy(source))
    if init == "last_layer":
        copy_weights(source, norm)
    return norm


def final_norm_of(model: Any) -> nn.Module:
    """Return a target's final norm.

    Raises:
        DrafterError: it is not where transformers' decoders have it.
    """
    decoder = decoder_of(model)
    for name in _NORMS:
        if (norm := getattr(decoder, name, None)) is not None:
            return norm
    raise DrafterError(
        f"{type(decoder).__name__} has no final norm called {', '.join(_NORMS)}: {_INSTEAD}"
    )


def projection(model: Any, inputs: int, outputs: int) -> nn.Linear:
    """Return a trained fp32 linear layer without a bias, started as transformers starts the model's
    own."""
    return _fresh(model, lambda: nn.Linear(inputs, outputs, bias=False))


def output_layer(model: Any) -> nn.Linear:
    """Return a trained fp32 copy of the model's output layer, (V, d), dequantised if it is
    packed."""
    source = model.get_output_embeddings()
    inputs, outputs = features(source)
    layer = _fresh(
        model, lambda: nn.Linear(inputs, outputs, bias=getattr(source, "bias", None) is not None)
    )
    copy_weights(source, layer)
    return layer


def head_of_layer(layer: nn.Linear, target: Target) -> Head:
    """Return the function from hidden states (n, d) to logits (n, V) of an `output_layer`, with the
    scale or the cap that follows the target's own."""
    finish = after_output(target.config)

    def head(hidden: Tensor) -> Tensor:
        with autocast_like(hidden):
            return finish(layer(hidden.to(layer.weight.dtype)))

    return head


_INSTEAD = "set drafter=mtp_medusa, whose heads do not need it, or drafter=none"


def layers_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a target.

    Raises:
        DrafterError: it keeps them under another name.
    """
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise DrafterError(
            f"{type(model).__name__} has no get_decoder().layers, so a head of decoder layers"
            f" cannot be built: {_INSTEAD}"
        )
    return layers


def layer_from_end(model: Any, back: int) -> nn.Module:
    """Return a target's decoder layer; 1 is its last one.

    Raises:
        DrafterError: it has fewer layers.
    """
    layers = layers_of(model)
    if back > len(layers):
        raise DrafterError(
            f"drafter.draft_layers={back} and drafter.init=last_layer copy the target's last {back}"
            f" layers, and {type(model).__name__} has {len(layers)}: set fewer draft_layers, or"
            " drafter.init=random"
        )
    return layers[-back]


@torch.no_grad()
def requested_layers(depth: int, requested: list[int]) -> tuple[int, ...]:
    """Return drafter.aux_layers, the states of a target of `depth` layers that a head reads.

    Raises:
        DrafterError: the target has no such states, or they are not ascending.
    """
    ascending = list(requested) == sorted(set(requested))
    if not requested or not ascending or requested[0] < 0 or requested[-1] > depth:
        raise DrafterError(
            f"drafter.aux_layers={list(requested)}: give ascending numbers of the target's"
            f" hidden_states, from 0 (the embeddings) to {depth} (the output of its last layer)"
        )
    return tuple(requested)


def check_states(model: Any, layers: tuple[int, ...]) -> None:
    """Check that the states between a target's layers are one vector for each token. Those of Gemma
    3n are several. On the meta device some models cannot be tried.

    Raises:
        DrafterError: they are not.
    """
    decoder, size = decoder_of(model), model.config.get_text_config().hidden_size
    device = next(model.parameters()).device
    with captured_layers(decoder, layers) as states:
        try:
            decoder(input_ids=torch.arange(1, 5, device=device)[None], use_cache=False)
        except Exception:
            if device.type != "meta":
                raise
    if unlike := [state for state in states if tuple(state.shape) != (1, 4, size)]:
        raise DrafterError(
            f"the states between {type(model).__name__}'s layers have the shape"
            f" {tuple(unlike[0].shape)} for a text of 4 tokens, and the head reads one vector"
            f" of hidden_size={size} for each token: {_INSTEAD}"
        )


def _layers(model: Any) -> nn.ModuleList:
    decoder, name = decoder_of(model), type(model).__name__
    layers = layers_of(model)
    if getattr(decoder, "rotary_emb", None) is None:
        raise DrafterError(f"{name}'s layers do not take rotary embeddings as an input: {_INSTEAD}")
    forward = type(layers[-1]).forward
    missing = _TAKEN - inspect.signature(forward).parameters.keys()
    if cache_argument(forward) is None:
        missing.add("a cache")
    if missing:
        raise DrafterError(
            f"{type(layers[-1]).__name__} does not take {', '.join(sorted(missing))}: {_INSTEAD}"
        )
    if unknown := _unknown_inputs(layers[-1]):
        raise DrafterError(
            f"{type(layers[-1]).__name__}'s attention needs {', '.join(unknown)}, which a head does"
            f" not have: {_INSTEAD}"
        )
    kind = _kind(model.config.get_text_config())
    if kind not in _MASKS:
        raise DrafterError(
            f"{name}'s last layer is of the kind {kind}, and heads are built of"
            f" {', '.join(_MASKS)}: {_INSTEAD}"
        )
    return layers


def _unknown_inputs(layer: nn.Module) -> list[str]:
    """Return the inputs that a layer's attention must be given and a head has no values for, as
    Gemma 4's keys and values of other layers."""
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        return []
    return [
        name
        for name, parameter in list(inspect.signature(attention.forward).parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in _TAKEN
    ]


def _kind(config: Any) -> str:
    """Return the last layer's kind of attention, as transformers' `layer_types` calls it."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[-1]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def _fresh(model: Any, build: Callable[[], Any]) -> Any:
    """Return the result of `build` in fp32, started as transformers starts the model's own, and
    trained."""
    device = next(model.parameters()).device
    if device.type == "meta":
        with torch.device("meta"):
            return build().float().requires_grad_(True)
    module = build().to("cpu", torch.float32)
    with torch.no_grad():
        for part in module.modules():
            model._init_weights(part)
    return module.to(device).requires_grad_(True)


def layer_inputs(
    target: Target,
    hidden: Float[Tensor, "B T d"],
    positions: Int[Tensor, "B T"],
    cache: DynamicCache | None = None,
) -> Any:
    """Return a `decoder_layer`'s inputs besides `hidden`, of which only shape, dtype and device
    matter. Without a cache, rows of a packed sequence do not see each other. With a cache there is
    a single row, and `positions` follow those in the cache."""
    make_mask: Any = _MASKS[_kind(target.config)]
    mask = make_mask(
        config=target.config,
        inputs_embeds=hidden,
        attention_mask=None,
        position_ids=positions,
        **with_cache(make_mask, cache),
    )
    return {
        "attention_mask": mask,
        "position_ids": positions,
        **layer_cache(target, cache),
        "position_embeddings": rotations(target, hidden, positions),
    }


def layer_cache(target: Target, cache: Any) -> dict[str, Any]:
    """Return a `decoder_layer`'s inputs that concern its cache, None for none."""
    layers: Any = target.decoder.layers
    forward = type(layers[-1]).forward  # the class has it also where C computes the layer
    return with_cache(forward, cache) | {"use_cache": cache is not None}


def rotations(target: Target, hidden: Float[Tensor, "B T d"], positions: Int[Tensor, "B T"]) -> Any:
    """Return a `decoder_layer`'s rotary embeddings, in the dtype of `hidden`."""
    rotary = target.decoder.rotary_emb
    if _takes_layer_type(type(rotary).forward):
        return rotary(hidden, positions, _kind(target.config))
    return rotary(hidden, positions)


@functools.cache
def _takes_layer_type(forward: Callable[..., Any]) -> bool:
    return "layer_type" in inspect.signature(forward).parameters


def window(target: Target) -> int | None:
    """Return how many positions a `decoder_layer` sees, including its own; None for all before
    it."""
    return target.config.sliding_window if _kind(target.config) == "sliding_attention" else None


def run_layer(
    layer: nn.Module, hidden: Float[Tensor, "B T d"], inputs: Any
) -> Float[Tensor, "B T d"]:
    """Return the output of a `decoder_layer`, called with `layer_inputs`."""
    out = layer(hidden, **inputs)
    return out[0] if isinstance(out, tuple) else out


def embeddings_ahead(k: int, output: TargetOutput, target: Target) -> Float[Tensor, "B T d"]:
    """Return the target's embeddings of x_{t+k}, without a gradient; zeros where x_{t+k} is not in
    t's row."""
    # Tokens that wrap around have a smaller position.
    same = output.positions.roll(-k, dims=1) == output.positions + k
    with torch.no_grad():
        embedded = target.embed(output.ids.roll(-k, dims=1))
    return embedded.masked_fill(~same.unsqueeze(-1), 0.0)


def autocast_like(hidden: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Let fp32 weights compute in the dtype of half-precision hidden states."""
    if hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(hidden.device.type, hidden.dtype)
    return contextlib.nullcontext()
