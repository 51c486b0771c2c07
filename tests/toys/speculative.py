"""A small target with drafters, its text without them, and a test of distributions."""

from __future__ import annotations

import torch
import transformers
from omegaconf import OmegaConf
from transformers import GenerationConfig

from trainer.assembly.build import instantiate
from trainer.config import compose

SIZES = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "mistral, a window of 6": ("Mistral", {"sliding_window": 6}),
    "gemma2, a cap and a window of 5": (
        "Gemma2",
        {"sliding_window": 5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4},
    ),
    "gpt2": (
        "GPT2",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "tie_word_embeddings": False},
    ),
    "granite, scaled logits": ("Granite", {"logits_scaling": 0.25}),
}
PROMPT = torch.tensor([5, 9, 13, 7, 30, 22, 11])


def tiny(kind="llama", **changes):
    name, settings = MODELS[kind]
    torch.manual_seed(2)  # its texts go through many tokens
    built = getattr(transformers, f"{name}Config")(**(SIZES | settings | changes))
    made = (
        transformers.GPT2LMHeadModel
        if name == "GPT2"
        else getattr(transformers, f"{name}ForCausalLM")
    )
    return made(built).eval()


def alone(model, ids, count, stops=(), **settings):
    """transformers' own text."""
    asked = GenerationConfig(
        max_new_tokens=count,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        **{"do_sample": False} | settings,
    )
    out = model.generate(
        input_ids=ids.unsqueeze(0),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=asked,
    )
    return out[0, len(ids) :].tolist()


def made(name, model, *changes):
    """The drafter of conf/drafter/NAME.yaml with changes, its weights random."""
    adapter = "lora" if name == "registers" else "none"
    settings = [f"drafter={name}", f"adapter={adapter}", "base=tiny", "task.path=x"]
    settings += changes
    node = OmegaConf.to_container(compose.compose(settings).drafter)
    drafter = instantiate(node)(model=model).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return drafter


def p_value(actual, reference):
    """Of Pearson's χ², texts expected less than five times taken together. 0 where a text came that
    cannot be."""
    if actual[reference == 0].sum() > 0:
        return 0.0
    expected = reference * actual.sum()
    often = expected >= 5
    a = torch.cat([actual[often], actual[~often].sum().view(1)])
    b = torch.cat([expected[often], expected[~often].sum().view(1)])
    a, b = a[b > 0], b[b > 0]
    return float(
        torch.special.gammaincc(
            torch.tensor((len(a) - 1) / 2).double(), ((a - b) ** 2 / b).sum() / 2
        )
    )
