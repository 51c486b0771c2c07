"""A folder with a random model of a family, as a user has one on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from scripts.zoo.families import Family, Place
from trainer.models.tiny import byte_tokenizer


def make(family: Family, folder: Path) -> Place:
    """Make the family's model and rows in `folder`, and return where they are."""
    base = folder / "base"
    if not (base / "config.json").exists():
        torch.manual_seed(0)
        auto: Any = getattr(transformers, family.auto)
        model = auto.from_config(family.config())
        spread(model)
        (family.tokenizer or byte_tokenizer)().save_pretrained(base)
        model.save_pretrained(base)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in family.rows()), "utf-8")
    return Place(family, str(base), rows, folder)


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Draw linear layers, embeddings and experts so that every layer changes what it reads.

    Weights at transformers' 0.02 leave attention almost uniform at this width, so that a wrong mask
    or position would hardly change a logit.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, nn.Linear | Conv1D):
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            nn.init.normal_(module.weight, std=1 / math.sqrt(inputs))
    for parameter in model.parameters():
        if parameter.ndim == 3 and parameter.shape[-1] > 4:  # experts, not a convolution
            nn.init.normal_(parameter, std=1 / math.sqrt(max(parameter.shape[-2:])))
        elif parameter.ndim == 1 and not parameter.any():  # Gemma 3n multiplies by one of these
            nn.init.normal_(parameter, std=0.1)
