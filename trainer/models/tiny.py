"""A tiny random base for tests and smoke runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks import wheel
from trainer.models.base import Base
from trainer.models.gguf import save_pretrained
from trainer.storage.locks import locked

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
    add_tokens: Sequence[str],
) -> Base:
    """Return a seeded random Llama over bytes, which is made once and kept in the cache."""
    settings = {
        "seed": seed,
        "layers": layers,
        "hidden_size": hidden_size,
        "max_length": max_length,
        "version": 1,
    }
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = wheel.cache_dir() / "models" / f"tiny-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{folder}.lock"), "the tiny base"):
        if not (folder / "config.json").exists():
            tokenizer = byte_tokenizer()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _model(len(tokenizer), layers, hidden_size, max_length)
                save_pretrained(folder, model, tokenizer)
    return Base(
        str(folder),
        dtype,
        attn_implementation,
        quantization,
        double_quant,
        add_tokens=tuple(add_tokens),
    )


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte and three special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    over_bytes = Tokenizer(
        models.BPE({token: index for index, token in enumerate(specials + alphabet)}, [])
    )
    over_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    over_bytes.decoder = decoders.ByteLevel()
    over_bytes.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=over_bytes,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


def _model(vocabulary: int, layers: int, hidden_size: int, max_length: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
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
    )
