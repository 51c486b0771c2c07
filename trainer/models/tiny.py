"""A tiny random base for tests and smoke runs."""

from __future__ import annotations

import hashlib
import json

import torch
from filelock import FileLock

from tasks import wheel
from trainer.models.base import Base
from trainer.models.gguf import _save

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if"
    " message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{%"
    " endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny(
    seed: int,
    layers: int,
    hidden_size: int,
    max_length: int,
    dtype: str,
    attn_implementation: str,
    quantization: str,
    double_quant: bool,
) -> Base:
    """A seeded random Llama over bytes, made in the cache."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings = {
        "seed": seed,
        "layers": layers,
        "hidden_size": hidden_size,
        "max_length": max_length,
        "version": 1,
    }
    folder = (
        wheel.cache_dir()
        / "models"
        / f"tiny-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            bytes_ = Tokenizer(
                models.BPE({token: i for i, token in enumerate(specials + alphabet)}, [])
            )
            bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bytes_.decoder = decoders.ByteLevel()
            bytes_.add_special_tokens([AddedToken(token, special=True) for token in specials])
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=bytes_,
                pad_token="<|pad|>",
                bos_token="<|im_start|>",
                eos_token="<|im_end|>",
                chat_template=CHATML,
            )
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=max_length,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                _save(folder, LlamaForCausalLM(config), tokenizer)
    return Base(str(folder), dtype, attn_implementation, quantization, double_quant)
