"""Medusa's own file, as TGI reads it; vLLM 0.33 and SGLang have no Medusa."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from trainer.exporting.draft_head import DraftHead

FILE = "medusa_lm_head.safetensors"


def content(head: DraftHead, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config) of the file."""
    return head.tensors, {
        "medusa_num_heads": head.drafts,
        "medusa_num_layers": head.blocks,
        "base_model_name_or_path": verifier,
        "version": "2",
    }


def expected_shapes(
    config: dict[str, Any], size: tuple[int, int], full: bool
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors, from the config and the target's (V, d); with `full`
    each head has an output layer."""
    _, d = size
    heads, blocks = config["medusa_num_heads"], config["medusa_num_layers"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (f"{i}.{j}.linear" for i in range(heads) for j in range(blocks)):
        shapes |= {f"{name}.weight": (d, d), f"{name}.bias": (d,)}
    return shapes | ({f"{i}.{blocks}.weight": size for i in range(heads)} if full else {})


def logits(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    state: Float[Tensor, " d"],
    output: Float[Tensor, "V d"],
) -> Float[Tensor, "K V"]:
    """Compute each head's logits after one state."""
    rows = []
    for i in range(config["medusa_num_heads"]):
        x = state
        for j in range(config["medusa_num_layers"]):
            x = x + F.silu(
                F.linear(x, tensors[f"{i}.{j}.linear.weight"], tensors[f"{i}.{j}.linear.bias"])
            )
        rows.append(F.linear(x, tensors.get(f"{i}.{config['medusa_num_layers']}.weight", output)))
    return torch.stack(rows)
