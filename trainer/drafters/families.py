"""The kind of decoder layer that EAGLE's heads are made of.

    target        the target's own class: every setting of it, and `init=last_layer`
    llama, qwen3  a plain layer of that class, of the target's sizes, which engines can compute
    auto          the target's own where engines can compute it, otherwise llama

A layer of another class than the target's has its own rotary embedding: the target's table if it is
a plain one that rotates all of a head, otherwise the default one. It sees all positions. For a
target with experts its MLP is as wide as the experts that one token is sent to.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trainer.drafters import DrafterError
from trainer.models.layer_config import of_layer

# The model types of targets, and the draft layer that engines have for them.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "qwen3"}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_TABLES = ("default", "linear", "llama3", "yarn")  # rotary tables that no position changes


@dataclass
class Family:
    """A model of one layer, as trainer.drafters.layers builds layers from models. It has the
    target's device, and its own `config` and `decoder`, so that it can also stand for the target
    where a layer's inputs are made."""

    target: Any
    config: Any
    inner: Any
    decoder: Any

    def get_decoder(self) -> Any:
        return self.decoder

    def parameters(self) -> Any:
        return self.target.parameters()

    def _init_weights(self, part: Any) -> None:
        self.inner._init_weights(part)


def family_of(model: Any, layer: str, init: str, keeps_biases: bool) -> Family | None:
    """Return the family of a head's layer for drafter.layer=`layer`; None for the target's own.

    Raises:
        DrafterError: init=last_layer, with a layer of another class than the target's.
    """
    config = model.config.get_text_config()
    kind = kind_of(layer, config, keeps_biases)
    if kind == "target":
        return None
    if init == "last_layer":
        raise DrafterError(
            f"drafter.init=last_layer copies the last layer of {type(model).__name__}, and"
            f" drafter.layer={layer} makes a {kind} layer: set drafter.init=random, or"
            " drafter.layer=target, which no engine can load"
        )
    settings = layer_config(config, kind)
    settings._attn_implementation = "eager" if config._attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        inner = _CLASSES[kind][1](settings)
    # These two compute here; they are not only built from the settings.
    norm, rotary = type(inner.model.norm), type(inner.model.rotary_emb)(settings)
    # A table on another device than the target would be copied in each step.
    device = model.get_input_embeddings().weight.device
    decoder = SimpleNamespace(
        layers=inner.model.layers,
        norm=norm(settings.hidden_size, settings.rms_norm_eps),
        rotary_emb=rotary if device.type == "meta" else rotary.to(device),
    )
    return Family(model, settings, inner, decoder)


def kind_of(layer: str, config: Any, keeps_biases: bool) -> str:
    """Return llama, qwen3 or target for drafter.layer=`layer`. `keeps_biases` says whether the
    head's layer has the biases of the target's."""
    if layer != "auto":
        return layer
    biased = getattr(config, "attention_bias", False) or config.model_type == "qwen2"
    own = unlike_engines(config) is None and not (keeps_biases and biased)
    return "target" if own else "llama"


def unlike_engines(config: Any) -> str | None:
    """Return why engines cannot compute the last layer of a model, from its text config; None if
    they can."""
    if config.model_type not in FAMILIES:
        return (
            "engines build draft layers of Llama's and Qwen3's kind, and this one is of"
            f" {config.model_type}'s"
        )
    if config.hidden_act != "silu":
        return f"its MLP's activation is {config.hidden_act}, and engines assume silu"
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ]
    if kinds[-1] != "full_attention":
        return (
            f"its layer is of the kind {kinds[-1]} (window {config.sliding_window}), and engines"
            " let draft layers see everything"
        )
    rope = config.rope_parameters
    if "rope_type" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return (
            f"its rotary embedding {rope} does not rotate all of a head, or differs between layers"
        )
    return None


def layer_config(config: Any, kind: str) -> Any:
    """Return transformers' config of one llama or qwen3 layer with a target's sizes."""
    config = of_layer(config)
    heads = config.num_attention_heads
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": _width(config),
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": _even(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "hidden_act": "silu",
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 2048,
        "rms_norm_eps": getattr(config, "rms_norm_eps", None) or 1e-6,
        "initializer_range": getattr(config, "initializer_range", None) or 0.02,
        "rope_parameters": _table(config),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    if kind == "llama":
        settings["mlp_bias"] = False
    return _CLASSES[kind][0](**settings)


def _width(config: Any) -> int:
    """Return the width of the MLP: that of the target's, or of the experts of one token."""
    experts = getattr(config, "num_experts_per_tok", None)
    each = getattr(config, "moe_intermediate_size", None)
    wide = getattr(config, "intermediate_size", None)
    if isinstance(experts, int) and isinstance(each or wide, int):
        return int(each or wide) * experts  # type: ignore[arg-type]
    return wide if isinstance(wide, int) else 4 * config.hidden_size


def _even(size: int) -> int:
    return size + size % 2  # rotary embeddings turn pairs


def _table(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary table."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _TABLES and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return dict(rope)
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    theta = next((table["rope_theta"] for table in tables if table.get("rope_theta")), 1e4)
    return {"rope_type": "default", "rope_theta": float(theta)}
