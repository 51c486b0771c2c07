"""Linear layers: which modules are linear, their sizes, and their weights as dense matrices.

The layers are nn.Linear, its quantised subclasses in bitsandbytes, and GPT-2's Conv1D, which stores
its weight transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adapters import shards
from adapters.packed import Packed4bit

PACKED = ("Params4bit", "Int8Params")  # bitsandbytes' classes of quantised weights


# Subclasses whose forward is their own and still x Wᵀ + b, by (class, whether on the meta device)
_tried: dict[tuple[type, bool], bool] = {}


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes x Wᵀ + b. A subclass with a forward of its own is tried out:
    Falcon's layers do, and Llama 4's router, which returns a tuple, does not."""
    kind: Any = type(module)
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if (
        kind.forward in (nn.Linear.forward, Conv1D.forward)
        or type(module.weight).__name__ in PACKED
    ):
        return True
    key = (kind, module.weight.is_meta)
    if key not in _tried:
        _tried[key] = _is_product(module)
    return _tried[key]


@torch.no_grad()
def _is_product(linear: Any) -> bool:
    """Return whether a layer's own forward gives x Wᵀ + b for an x; on the meta device, its
    shape."""
    weight = linear.weight
    x = torch.linspace(-1, 1, 2 * linear.in_features, dtype=torch.float32, device=weight.device)
    x = x.view(2, -1).to(weight.dtype)
    try:
        y, expected = type(linear).forward(linear, x), F.linear(x, weight, linear.bias)
    except Exception:  # an own forward may want another shape, or a kernel that is not here
        return False
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-3)


def features(linear: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer, also where its stored weight is transposed or packed."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.in_features, linear.out_features


def ends_with(name: str, *endings: str) -> bool:
    """Return whether one of `endings` is the whole dotted name, or its last parts."""
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that computes logits from hidden states, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def is_packed(linear: Any) -> bool:
    """Return whether a linear layer's weight is quantised."""
    weight = linear.weight
    return not weight.is_floating_point() or type(weight).__name__ in PACKED


def float_weight(linear: Any) -> Float[torch.Tensor, "o i"]:
    """Return the dense (out, in) weight of a linear layer in fp32 (fp64 stays fp64). A packed
    weight is dequantised. A sharded weight is gathered: all ranks must call it together."""
    if isinstance(linear, Packed4bit):
        return linear.dense().float()
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, state=getattr(linear, "state", None)).float()
    dense = shards.whole(weight)
    dense = dense.float() if dense.dtype != torch.float64 else dense
    return dense.t() if isinstance(linear, Conv1D) else dense


def set_float_weight(linear: Any, dense: Float[torch.Tensor, "o i"]) -> None:
    """Put a dense (out, in) weight back into a linear layer, in place and in the layer's dtype."""
    with torch.no_grad():
        linear.weight.copy_(
            (dense.t() if isinstance(linear, Conv1D) else dense).to(linear.weight.dtype)
        )


def not_a_view(y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the output of an own autograd function in another shape. Autograd refuses to change a
    view that such a function returns, and Falcon adds to its layers' outputs in place."""
    return torch.ops.aten._unsafe_view(y, shape)  # as F.linear itself ends
