"""Tiny random encoders and encoder-decoders with their tokenizers, as folders to load."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.zoo.families_encoder import configs, tokenizer

__all__ = ["ENCODERS", "PAIRS", "configs", "made", "tokenizer"]

# a choice of scripts.zoo's, which has more
ENCODERS = (
    "bert",
    "roberta",
    "xlm_roberta",
    "distilbert",
    "electra",
    "albert",
    "deberta_v2",
    "modernbert",
)
PAIRS = ("t5", "flan_t5", "bart", "t5gemma")


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
