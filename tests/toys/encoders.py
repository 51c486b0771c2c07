"""Tiny random encoders and encoder-decoders with their tokenizers, as folders to load."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.zoo.families_encoder import ENCODERS, PAIRS, configs, tokenizer

__all__ = ["ENCODERS", "PAIRS", "configs", "made", "tokenizer"]


def made(family: str, folder: Path) -> Path:
    """Write a family's checkpoint and tokenizer into a folder, and return it."""
    import transformers

    config, auto, style = configs()[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(folder)
    tokenizer(style).save_pretrained(folder)
    return folder
