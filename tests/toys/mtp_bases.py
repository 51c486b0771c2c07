"""Tiny bases of each family that has layers for multi-token prediction."""

from __future__ import annotations

import json

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

MOE = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LINEAR = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 8,
}
# transformers looks for the MTP layers of the first two behind as many layers as the released
# models have.
KINDS = {
    "glm4_moe": {
        "num_hidden_layers": 46,
        "first_k_dense_replace": 45,
        "n_routed_experts": 4,
        **MOE,
    },
    "deepseek_v3": {
        "num_hidden_layers": 61,
        "first_k_dense_replace": 60,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 2,
        **MOE,
    },
    "mellum": {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        **MOE,
    },
    "qwen3_next": {"num_experts": 4, **LINEAR, **MOE},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {"num_experts": 4, **LINEAR, **MOE},
}


def tiny_of(kind, **changes):
    """A random model of a family, with weights that tell its layers apart."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind](**sizes | KINDS[kind] | changes)
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def names_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
