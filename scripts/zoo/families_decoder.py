"""Causal language models of transformers, two layers of width 32 each."""

from __future__ import annotations

import functools
from typing import Any

from scripts.zoo import checks, checks_decoder
from scripts.zoo.families import Check, Family
from scripts.zoo.families_more import MLA, MORE

# trainer.models.tiny's 259 tokens, and some that transformers' own tokenizer classes add
VOCABULARY = 264
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
CHECKS: dict[str, Check] = {
    "load": checks.load,
    "preflight": checks.preflight,
    **{name: checks.method(name) for name in checks.METHODS},
    "packing": checks_decoder.packing,
    "resume": checks.resume,
    "merged": checks.merged,
    "generate": checks_decoder.generate,
    **{name: checks_decoder.head(name) for name in checks_decoder.HEADS},
}
# What a family has in addition to COMMON. A value of None leaves that key out.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "ministral": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "sliding_window": 16,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
    },
    "gemma4_text": {
        "sliding_window": 16,
        "num_hidden_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
    },
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 16},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "head_dim": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "cohere": {},
    "cohere2": {"sliding_window": 16},
    "exaone4": {"sliding_window": 16},
    "glm4": {},
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8,
    },
    "nemotron": {},
    "helium": {},
    "apertus": {},
    "arcee": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "nanochat": {},
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3_moe": {},
    "qwen3_next": {
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "qwen3_5_moe_text": {
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "deepseek_v2": MLA | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": MLA | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "glm4_moe": {
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "gpt_oss": {"sliding_window": 16},
    "olmoe": {},
    "flex_olmo": {},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "dots1": {
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "minimax_m2": {},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}
STATE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "granitemoehybrid": EXPERTS
    | {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def config(name: str, changes: dict[str, Any]) -> Any:
    """A tiny config of a model type."""
    from transformers import AutoConfig

    settings = {key: value for key, value in (COMMON | changes).items() if value is not None}
    return AutoConfig.for_model(name, **settings)


def vision_language(name: str, text: str, changes: dict[str, Any], **outer: Any) -> Any:
    """A tiny config of a vision-language model."""
    from transformers import AutoConfig

    settings = COMMON | {"model_type": text} | changes
    return AutoConfig.for_model(
        name, text_config=settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, **outer
    )


def _vision_language() -> dict[str, Any]:
    qwen = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return {
        "gemma3": functools.partial(
            vision_language,
            "gemma3",
            "gemma3_text",
            DENSE["gemma3_text"],
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=263,
        ),
        "qwen2_5_vl": functools.partial(
            vision_language,
            "qwen2_5_vl",
            "qwen2_5_vl_text",
            {"rope_parameters": rope},
            vision_config=qwen,
            image_token_id=263,
            video_token_id=262,
        ),
        "llama4": functools.partial(
            vision_language,
            "llama4",
            "llama4_text",
            EXPERTS | MOE["llama4_text"],
            vision_config=VISION | {"vision_output_dim": 16, "projector_output_dim": 16},
            image_token_index=263,
        ),
        "smolvlm": functools.partial(
            vision_language,
            "smolvlm",
            "llama",
            {},
            vision_config=VISION,
            image_token_id=263,
            scale_factor=2,
        ),
        "mistral3": functools.partial(
            vision_language,
            "mistral3",
            "mistral",
            {},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
            image_token_index=263,
        ),
    }


def rows() -> list[dict[str, Any]]:
    """Chats that add two numbers."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{7 * a % 31}="},
                {"role": "assistant", "content": str(a + 7 * a % 31)},
            ]
        }
        for a in range(24)
    ]


def _has_experts(name: str) -> bool:
    """Return whether a family's layers have routed experts."""
    return name == "granitemoehybrid" or (name in MOE and name != "qwen3_5_text")


def families() -> list[Family]:
    """The table's families of decoders."""
    result = []
    for group, table in (
        ("dense", DENSE),
        ("moe", {name: EXPERTS | changes for name, changes in MOE.items()}),
        ("state", STATE),
    ):
        for name, changes in table.items():
            make = functools.partial(config, name, changes)
            of_experts = {key: checks.method(key) for key in checks.EXPERTS}
            steps = CHECKS | (of_experts if _has_experts(name) else {})
            result.append(Family(name, group, make, "AutoModelForCausalLM", steps, rows))
    short = {key: CHECKS[key] for key in ("load", "lora", "merged", "generate")}
    for name, changes in MORE.items():
        make = functools.partial(config, name, EXPERTS | changes)
        result.append(Family(name, "more", make, "AutoModelForCausalLM", short, rows))
    for name, make in _vision_language().items():
        auto = "AutoModelForImageTextToText"
        result.append(Family(name, "vision", make, auto, CHECKS, rows))
    return result
