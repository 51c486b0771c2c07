"""A layer of a block drafter (trainer.drafters.block): Qwen3's decoder layer, whose keys and values
are those of the context and of the block itself."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import rotate_half

TOGETHER = 32  # anchors whose blocks attend at once
Turn = tuple[Tensor, Tensor]  # cos and sin of positions
KeysValues = tuple[Float[Tensor, "B G T c"], Float[Tensor, "B G T c"]]


def run_block(
    layer: Any,
    z: Float[Tensor, "B A K d"],
    turn: Turn,
    context: KeysValues,
    sees: Bool[Tensor, "B A T"],
) -> Float[Tensor, "B A K d"]:
    """Run one layer on blocks that see some of the context, and themselves."""
    attention, (b, a, k, _) = layer.self_attn, z.shape
    normed = layer.input_layernorm(z).flatten(1, 2)
    query = _turned(attention.q_norm(_heads(attention.q_proj(normed), attention)), turn)
    keys, values = keys_values(layer, normed, turn)
    out = []
    for first in range(0, a, TOGETHER):
        n = min(TOGETHER, a - first)
        part = slice(first * k, (first + n) * k)
        itself = torch.eye(n, dtype=torch.bool, device=z.device).expand(b, -1, -1)
        mask = torch.cat(
            [sees[:, first : first + n], itself.repeat_interleave(k, dim=2)], dim=2
        ).repeat_interleave(k, dim=1)
        out.append(
            F.scaled_dot_product_attention(
                query[:, :, part],
                torch.cat([context[0], keys[:, :, part]], dim=2),
                torch.cat([context[1], values[:, :, part]], dim=2),
                mask.unsqueeze(1),
                enable_gqa=True,
            )
        )
    mixed = torch.cat(out, dim=2).transpose(1, 2).reshape(b, a, k, -1)
    z = z + attention.o_proj(mixed)
    return z + layer.mlp(layer.post_attention_layernorm(z))


def keys_values(layer: Any, states: Float[Tensor, "B T d"], turn: Turn) -> KeysValues:
    """Return a layer's keys, turned to their positions, and values of normed states."""
    attention = layer.self_attn
    keys = attention.k_norm(_heads(attention.k_proj(states), attention))
    return _turned(keys, turn), _heads(attention.v_proj(states), attention).transpose(1, 2)


def _heads(states: Tensor, attention: Any) -> Float[Tensor, "B T H c"]:
    return states.unflatten(-1, (-1, attention.head_dim))


def _turned(states: Float[Tensor, "B T H c"], turn: Turn) -> Float[Tensor, "B H T c"]:
    cos, sin = (part.unsqueeze(1).to(states.dtype) for part in turn)
    states = states.transpose(1, 2)
    return states * cos + rotate_half(states) * sin
