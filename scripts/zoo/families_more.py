"""Causal language models of transformers as their classes make them from one shared set of sizes,
with little or nothing written for a family. They show how a family that nobody listed fares."""

from __future__ import annotations

from typing import Any

# sizes of compressed keys and values, as in DeepSeek V3
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What a family has in addition to families_decoder.COMMON and EXPERTS. None leaves a key out.
MORE: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": MLA,
    "axk2": MLA | {"index_head_dim": 16, "index_n_heads": 2},
    "bailing_hybrid": MLA | HYBRID,
    "biogpt": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 4},
    "cohere2_moe": {},
    "cpmant": {},
    "ctrl": {},
    "cwm": {},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4}
    },
    "diffllama": {},
    "doge": {},
    "exaone_moe": {},
    "flint": {},
    "gemma4_unified_text": {},
    "glm": {},
    "glm4_moe_lite": MLA,
    "gpt-sw3": {},
    "gpt_neox_japanese": {},
    "granite_swa": {},
    "granitemoe_swa": {},
    "hrm_text": {},
    "hy_v3": {},
    "hyperclovax": {},
    "inkling_text": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jetmoe": {},
    "kimi_linear": MLA | HYBRID,
    "kolibri1": {},
    "laguna": {},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": MLA,
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": MLA,
    "minimax": {},
    "minimax_m3_vl_text": {},
    "modernbert-decoder": {},
    "nemotron_h": {},
    "olmo_hybrid": {},
    "openai-gpt": {},
    "persimmon": {},
    "solar_open": {},
    "vaultgemma": {},
    "xglm": {},
    "xlm": {},
    "youtu": MLA,
}
