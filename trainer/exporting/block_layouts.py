"""Block drafters (DSpark, DFlash) in the layouts of speculators and SGLang.

speculators   DSpark as speculators 0.9 and vLLM 0.33 read it: a nested config
sglang        DSpark flat, as SGLang 0.5.23 and vLLM 0.33 read it: a Qwen3 config

Both hold neither embedding nor head, which are the target's; with a draft vocabulary speculators'
holds the head's rows, d2t and t2d. The anchor's slot predicts too
(`sample_from_anchor`), which both engines know for DSpark only: vLLM refuses it for DFlash. A head
without a Markov head is therefore written as DSpark with one of zeros, which computes the same.
SGLang's draft always has a head that predicts acceptance; where none was trained, it gets one that
predicts 1, so that all tokens are verified.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from trainer.exporting.draft_head import DraftHead, flat_rope, output_weight

FILE = "model.safetensors"
W1, W2 = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
CONFIDENCE, BIAS = "confidence_head.proj.weight", "confidence_head.proj.bias"
RANK = 16  # of a Markov head of zeros; kernels take multiples of 16
CERTAIN = 20.0  # σ(20) = 1 - 2e-9


def fillers(head: DraftHead, to: str) -> dict[str, Tensor]:
    """Return the tensors that the layout requires and that were not trained."""
    size, missing = head.layer["hidden_size"], {}
    rank = _rank(head)
    if W1 not in head.own:
        rows = {W1: head.layer["vocab_size"], W2: _drafted(head)}
        missing = {name: torch.zeros(count, rank) for name, count in rows.items()}
    if to == "sglang" and CONFIDENCE not in head.own:
        missing |= {CONFIDENCE: torch.zeros(1, size + rank), BIAS: torch.full((1,), CERTAIN)}
    return missing


def _drafted(head: DraftHead) -> int:
    return len(head.tensors["d2t"]) if "d2t" in head.tensors else head.layer["vocab_size"]


def _rank(head: DraftHead) -> int:
    return head.tensors[W1].shape[1] if W1 in head.tensors else RANK


def speculators(head: DraftHead, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config) in speculators' layout."""
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": head.drafts,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    config = {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "transformers_version": transformers.__version__,
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": head.target},
        },
        "transformer_layer_config": head.layer,
        "aux_hidden_state_layer_ids": list(head.layers),
        # It would mask the slots of layers with a sliding window, which there are none of.
        "sliding_window_non_causal": True,
        "tie_word_embeddings": False,
    }
    return head.tensors | fillers(head, "speculators"), config | _common(
        head, CONFIDENCE in head.own
    )


def sglang(head: DraftHead, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config) in SGLang's layout. Its layers count from 0 without the
    embeddings."""
    reads = [layer - 1 for layer in head.layers]
    config = flat_rope(head.layer) | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": head.depth,
        "target_layer_ids": reads,
        "dflash_config": {"mask_token_id": head.mask_token, "target_layer_ids": reads},
    }
    return head.tensors | fillers(head, "sglang"), config | _common(head, True)


def _common(head: DraftHead, confidence: bool) -> dict[str, Any]:
    return {
        "block_size": head.drafts,
        "draft_vocab_size": _drafted(head),
        "mask_token_id": head.mask_token,
        "sample_from_anchor": True,
        "markov_rank": _rank(head),
        "markov_head_type": "vanilla",
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence,
    }


def expected_shapes(
    to: str, config: dict[str, Any], size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors, from the config and the target's (V, d)."""
    vocabulary, d = size
    layer = config.get("transformer_layer_config", config)
    each, f = layer["head_dim"], layer["intermediate_size"]
    q, kv = layer["num_attention_heads"] * each, layer["num_key_value_heads"] * each
    rank, states = config["markov_rank"], config.get("aux_hidden_state_layer_ids")
    states = config["target_layer_ids"] if states is None else states
    one: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "self_attn.q_norm": (each,),
        "self_attn.k_norm": (each,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {
        f"layers.{n}.{name}.weight": shape
        for n in range(layer["num_hidden_layers"])
        for name, shape in one.items()
    }
    shapes |= {"fc.weight": (d, len(states) * d), "hidden_norm.weight": (d,), "norm.weight": (d,)}
    drafted = config["draft_vocab_size"]
    shapes |= {W1: (vocabulary, rank), W2: (drafted, rank)}
    if drafted < vocabulary:
        shapes |= {"lm_head.weight": (drafted, d), "d2t": (drafted,), "t2d": (vocabulary,)}
    if config["enable_confidence_head"]:
        shapes |= {CONFIDENCE: (1, d + rank), BIAS: (1,)}
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
    settings: Any = AutoConfig.for_model(
        **{key: value for key, value in layer.items() if key not in ("architectures", "dtype")}
    )
    eps, block, n = settings.rms_norm_eps, config["block_size"], len(states)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]

    embedding = model.get_input_embeddings().weight.detach().float().cpu()
    z = embedding[torch.tensor([int(ids[-1])] + [config["mask_token_id"]] * (block - 1))]
    context = norm(F.linear(states, tensors["fc.weight"]), "hidden_norm")
    cos, sin = Qwen3RotaryEmbedding(settings)(z, torch.arange(n + block)[None])
    for i in range(settings.num_hidden_layers):
        part = {
            name.removeprefix(f"layers.{i}.").removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"layers.{i}.")
        }
        x = norm(z, f"layers.{i}.input_layernorm")

        def heads(kind: str, rows: Tensor, part: dict[str, Tensor] = part) -> Tensor:
            y = F.linear(rows, part[f"self_attn.{kind}_proj"])
            return y.unflatten(-1, (-1, settings.head_dim)).transpose(0, 1)

        def turned(y: Tensor, first: int) -> Tensor:
            left, right = y.chunk(2, dim=-1)
            return y * cos[0, first:] + torch.cat([-right, left], -1) * sin[0, first:]

        seen = torch.cat([context, x])
        q = turned(norm(heads("q", x), f"layers.{i}.self_attn.q_norm"), n)
        k = turned(norm(heads("k", seen), f"layers.{i}.self_attn.k_norm"), 0)
        k, v = (y.repeat_interleave(len(q) // len(k), 0) for y in (k, heads("v", seen)))
        mixed = (q @ k.transpose(1, 2) / math.sqrt(settings.head_dim)).softmax(-1) @ v
        z = z + F.linear(mixed.transpose(0, 1).flatten(1), part["self_attn.o_proj"])
        y = norm(z, f"layers.{i}.post_attention_layernorm")
        gate = F.silu(F.linear(y, part["mlp.gate_proj"])) * F.linear(y, part["mlp.up_proj"])
        z = z + F.linear(gate, part["mlp.down_proj"])
    before = torch.cat([ids[-1:], drafted])
    u = norm(z, "norm")[: len(before)]
    output = tensors["lm_head.weight"] if "lm_head.weight" in tensors else output_weight(model)
    return F.linear(u, output) + F.linear(tensors[W1][before], tensors[W2])
