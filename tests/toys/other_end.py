"""A base whose tokenizer ends texts in another token than chats end answers in, as Qwen's and
SmolLM's bases do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eom|>"]


def tokenizer(**more: Any) -> Any:
    """A tokenizer of bytes that ends texts in <|endoftext|>. <|im_end|> and <|eom|> are special,
    and no named ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    over_bytes = Tokenizer(models.BPE({t: i for i, t in enumerate(SPECIALS + alphabet)}, []))
    over_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    over_bytes.decoder = decoders.ByteLevel()
    over_bytes.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=over_bytes, eos_token="<|endoftext|>", **{"pad_token": "<|pad|>"} | more
    )


def base(folder: Path, **more: Any) -> Path:
    """Write a random base into a folder, which ends texts in <|endoftext|> alone."""
    words = tokenizer(**more)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # with a small head no adapter can make one token likely
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
