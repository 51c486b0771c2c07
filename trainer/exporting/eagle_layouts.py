"""EAGLE heads in the layouts of speculators and SGLang.

speculators   EAGLE-3 and P-EAGLE as speculators 0.9 and vLLM 0.33 read them: a nested config, and
              embedding and head stored with the layers
sglang        EAGLE-1 and EAGLE-3 flat, as SGLang 0.5.23, SpecForge and vLLM 0.33 read them: a Llama
              config, and midlayer.*
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trainer.exporting.draft_head import DraftHead, flat_rope, output_weight

FILE = "model.safetensors"


def speculators(head: DraftHead, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config) in speculators' layout."""
    layer = dict(head.layer)
    if len(head.layers) != 3:
        # vLLM's Llama draft layer reads their number from here only.
        layer["num_aux_hidden_states"] = len(head.layers)
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": head.drafts,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    classes = {"eagle3": "Eagle3DraftModel", "peagle": "PEagleDraftModel"}
    mask = {"mask_token_id": head.mask_token} if head.method == "peagle" else {}
    return head.tensors, mask | {
        "architectures": [classes[head.method]],
        "speculators_model_type": head.method,
        "speculators_version": "0.9.0",
        "transformers_version": transformers.__version__,
        "speculators_config": {
            "algorithm": head.method,
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": head.target},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": len(head.tensors["lm_head.weight"]),
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        # vLLM and speculators have different defaults.
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": "fc_norm.0.weight" in head.tensors,
        "norm_output": head.norm_output,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
    }


def sglang(head: DraftHead, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config) in SGLang's layout."""
    config = flat_rope(head.layer)
    if head.method == "eagle":
        # SGLang uses the first; vLLM puts Eagle before each and uses the second.
        config["architectures"] = ["LlamaForCausalLMEagle", "LlamaForCausalLM"]
        # SGLang's fc has a bias, which is random if the file has none.
        zero = torch.zeros(head.layer["hidden_size"])
        return {"fc.bias": zero} | head.tensors, config
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(head.tensors["lm_head.weight"]),
        "num_aux_hidden_states": len(head.layers),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": "fc_norm.0.weight" in head.tensors,
        "norm_output": head.norm_output,
        # vLLM reads this key and counts as transformers counts hidden_states; SGLang reads the
        # other and adds 1.
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in head.layers],
            "use_aux_hidden_state": True,
            "norm_before_fc": False,
        },
    }
    return {
        name.replace("layers.0.", "midlayer."): t
        for name, t in head.tensors.items()
        if name != "embed_tokens.weight"
    }, config


def expected_shapes(
    to: str, config: dict[str, Any], size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors, from the config and the target's (V, d)."""
    vocabulary, d = size
    layer = config.get("transformer_layer_config", config)
    eagle3 = "speculators_config" in config or config["architectures"] == ["LlamaForCausalLMEagle3"]
    prefix = "midlayer" if eagle3 and to == "sglang" else "layers.0"
    shapes = {
        f"{prefix}.{name}.weight": shape for name, shape in _layer_shapes(layer, d, eagle3).items()
    }
    if not eagle3:
        return shapes | {"embed_tokens.weight": size, "fc.weight": (d, 2 * d), "fc.bias": (d,)}
    states, drafted = len(config["eagle_aux_hidden_state_layer_ids"]), config["draft_vocab_size"]
    shapes |= {"fc.weight": (d, states * d), "norm.weight": (d,), "lm_head.weight": (drafted, d)}
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{i}.weight": (d,) for i in range(states)}
    for n in range(1, layer["num_hidden_layers"]):
        narrow = _layer_shapes(layer, d, False) | {"input_layernorm": (d,)}
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in narrow.items()}
    if "mask_token_id" in config:
        shapes["mask_hidden"] = (1, 1, states * d)
    if drafted < vocabulary:
        shapes |= {"d2t": (drafted,), "t2d": (vocabulary,)}
    return shapes | ({"embed_tokens.weight": size} if to == "speculators" else {})


def _layer_shapes(layer: dict[str, Any], d: int, eagle3: bool) -> dict[str, tuple[int, ...]]:
    head, inputs = layer["head_dim"], 2 * d if eagle3 else d
    q, kv = layer["num_attention_heads"] * head, layer["num_key_value_heads"] * head
    f = layer["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, inputs),
        "self_attn.k_proj": (kv, inputs),
        "self_attn.v_proj": (kv, inputs),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "post_attention_layernorm": (d,),
    }
    if eagle3:
        shapes |= {"input_layernorm": (d,), "hidden_norm": (d,)}
    if layer["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    return shapes


def logits(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    model: Any,
    states: Float[Tensor, "n f"],
    ids: Int[Tensor, " n"],
    drafted: Int[Tensor, " m"],
) -> Float[Tensor, "k v"]:
    """Compute, from the files alone, the logits after `ids` and after each drafted token."""
    layer = dict(config.get("transformer_layer_config", config))
    layer = {key: value for key, value in layer.items() if key not in ("architectures", "dtype")}
    layer_config = AutoConfig.for_model(**layer)
    eps, eagle3 = layer_config.rms_norm_eps, "norm.weight" in tensors

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]

    embedding = tensors.get("embed_tokens.weight")
    if embedding is None:
        embedding = model.get_input_embeddings().weight.detach().float().cpu()
    tokens = embedding[torch.cat([ids, drafted])]
    if "mask_token_id" in config:
        mask = embedding[config["mask_token_id"]].expand(len(drafted), -1)
        tokens = torch.cat([tokens[: len(ids)], mask])
        states = torch.cat([states, tensors["mask_hidden"][0].expand(len(drafted), -1)])
    if eagle3:
        parts = list(states.chunk(len(config["eagle_aux_hidden_state_layer_ids"]), dim=-1))
        if config["fc_norm"]:
            parts = [norm(f"fc_norm.{i}", part) for i, part in enumerate(parts)]
        states = F.linear(torch.cat(parts, -1), tensors["fc.weight"])
    rows = []
    for _ in range(len(drafted) + 1):
        embedded = tokens[: len(states)]
        if eagle3:
            residual = states
            inputs = torch.cat(
                [
                    norm("layers.0.input_layernorm", embedded),
                    norm("layers.0.hidden_norm", states),
                ],
                -1,
            )
        else:
            residual = inputs = F.linear(
                torch.cat([embedded, states], -1), tensors["fc.weight"], tensors["fc.bias"]
            )
        out = _layer(layer_config, tensors, norm, inputs, residual)
        if "mask_token_id" in config:
            return _at_once(layer_config, tensors, norm, out)[len(ids) - 1 :]
        last = out[-1]
        normed = norm("norm", last) if eagle3 else last
        output = tensors["lm_head.weight"] if eagle3 else output_weight(model)
        rows.append(F.linear(normed, output))
        states = torch.cat([states, (normed if eagle3 and config["norm_output"] else last)[None]])
    return torch.stack(rows)


def _at_once(
    config: Any, tensors: dict[str, Tensor], norm: Callable[[str, Tensor], Tensor], out: Tensor
) -> Float[Tensor, "n v"]:
    """Compute P-EAGLE's layers after the first, and the logits of all slots."""
    for n in range(1, config.num_hidden_layers):
        out = _layer(config, tensors, norm, norm(f"layers.{n}.input_layernorm", out), out, n)
    return F.linear(norm("norm", out), tensors["lm_head.weight"])


def _layer(
    config: Any,
    tensors: dict[str, Tensor],
    norm: Callable[[str, Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
    number: int = 0,
) -> Tensor:
    """Compute a causal decoder layer after its first norm, over (n, inputs)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"layers.{number}.{name}.weight"])

    def heads(kind: str) -> Tensor:
        y = linear(f"self_attn.{kind}_proj", x).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        return (
            norm(f"layers.{number}.self_attn.{kind}_norm", y)
            if kind != "v" and config.model_type == "qwen3"
            else y
        )

    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(len(x))[None])

    def rotated(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * cos[0] + torch.cat([-second, first], -1) * sin[0]

    q, k, v = rotated(heads("q")), rotated(heads("k")), heads("v")
    k, v = (y.repeat_interleave(len(q) // len(k), dim=0) for y in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(config.head_dim)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    hidden = residual + linear("self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
    y = norm(f"layers.{number}.post_attention_layernorm", hidden)
    return hidden + linear(
        "mlp.down_proj", F.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y)
    )
