"""Linear layers: which modules are linear, their sizes, and their weights as dense matrices.

The layers are nn.Linear, its quantised subclasses in bitsandbytes, and GPT-2's Conv1D, which stores
its weight transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from transformers.pytorch_utils import Conv1D

PACKED = ("Params4bit", "Int8Params")  # bitsandbytes' classes of quantised weights


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer."""
    return isinstance(module, nn.Linear | Conv1D)


def features(linear: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer, also where its stored weight is transposed or packed."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.in_features, linear.out_features


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that computes logits from hidden states, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def is_packed(linear: Any) -> bool:
    """Whether a linear layer's weight is quantised."""
    weight = linear.weight
    return not weight.is_floating_point() or type(weight).__name__ in PACKED


def float_weight(linear: Any) -> Float[torch.Tensor, "o i"]:
    """Return the dense (out, in) weight of a linear layer in fp32 (fp64 stays fp64). A packed
    weight is dequantised."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, state=getattr(linear, "state", None)).float()
    dense = weight.detach().float() if weight.dtype != torch.float64 else weight.detach()
    return dense.t() if isinstance(linear, Conv1D) else dense


def set_float_weight(linear: Any, dense: Float[torch.Tensor, "o i"]) -> None:
    """Put a dense (out, in) weight back into a linear layer, in place and in the layer's dtype."""
    with torch.no_grad():
        linear.weight.copy_(
            (dense.t() if isinstance(linear, Conv1D) else dense).to(linear.weight.dtype)
        )
