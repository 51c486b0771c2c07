"""Tiny models of transformers' families, in memory and as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from adapters import io
from adapters.delta import Start
from scripts.zoo.families import every
from scripts.zoo.making import spread
from tests.toys import adapters as toys


def model_of(name: str, device: str = "cpu") -> Any:
    """A tiny random model of a family of scripts.zoo."""
    family = every()[name]
    auto: Any = getattr(transformers, family.auto)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = auto.from_config(family.config())
        if device == "cpu":
            spread(model)
    return model.eval()


def folder_of(name: str, folder: Path) -> Path:
    """The model's folder, without a tokenizer."""
    model_of(name).save_pretrained(folder)
    return folder


def moved(adapter: Any, model: Any, size: float = 0.2) -> Any:
    """The model with an adapter none of whose matrices is zero."""
    model = adapter.attach(model, Start(steps=4, data=toys.batches))
    draw = torch.Generator().manual_seed(1)
    for delta in (delta for _, delta in io.deltas(model)):
        nn.init.normal_(delta.B, std=size, generator=draw)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """The logits of two rows of tokens."""
    ids = torch.arange(3, 35).view(2, 16)
    return model(input_ids=ids, use_cache=False).logits
