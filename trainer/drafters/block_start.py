"""The start of a block drafter as the target's last layers (drafter.init=last_layer).

    F = [0 .. 0 I]              c is the last of the states that are read
    layer n of N                weights of the target's layer L - N + n, n = 1 .. N
    norm_out                    the target's final norm

So the context's keys and values are those that the target's layers would compute of that state. All
of a drafter's layers read one c, and each of the target's layers has its own norm γ before its
attention: γ goes into the columns of q, k and v, and norm_c and the layers' input norms start at 1.
Where the target has no norms of queries and keys, those of the drafter start at the length that the
weights give these vectors on average. Biases of q, k and v are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainer.drafters import DrafterError
from trainer.drafters.families import FAMILIES
from trainer.drafters.layers import final_norm_of, layer_from_end
from trainer.drafters.starts import copy_layer, copy_weights, pass_last


def start_as_last_layers(
    model: Any, fc: nn.Linear, blocks: Sequence[nn.Module], norm: nn.Module
) -> None:
    """Give a block drafter's parts the weights of the target's last layers, in place. norm_c starts
    at 1 already.

    Raises:
        DrafterError: the target's layers are not of Llama's or Qwen's kind, there are fewer than
        `blocks`, or they have other shapes.
    """
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES or config.hidden_act != "silu":
        kind = config.model_type if config.model_type not in FAMILIES else config.hidden_act
        raise DrafterError(
            f"drafter.init=last_layer copies layers of Llama's or Qwen's kind with silu, and"
            f" {type(model).__name__}'s are of the kind {kind}: set drafter.init=random"
        )
    pass_last(fc)
    for number, layer in enumerate(blocks):
        _start_layer(layer_from_end(model, len(blocks) - number), layer)
    copy_weights(final_norm_of(model), norm)


@torch.no_grad()
def _start_layer(source: Any, layer: Any) -> None:
    """Copy one layer."""
    normed = hasattr(source.self_attn, "q_norm")
    copy_layer(source, layer, () if normed else ("self_attn.q_norm", "self_attn.k_norm"))
    attention, gain = layer.self_attn, layer.input_layernorm.weight
    if gain.is_meta:
        return
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight.mul_(gain)
    gain.fill_(1.0)
    if not normed:
        # A normed state has entries of length 1 on average.
        for linear, norm in (
            (attention.q_proj, attention.q_norm),
            (attention.k_proj, attention.k_norm),
        ):
            norm.weight.fill_(linear.weight.square().sum(1).mean().sqrt())
