"""4-bit layers of bitsandbytes whose tensors FSDP2 can shard.

A weight of bitsandbytes is a tensor of a class of its own, which carries the constants of its
blocks. FSDP2 replaces it by a DTensor, and the constants are lost (peft #2505, axolotl #2992). Here
the bytes and the constants are two ordinary frozen parameters. Both are gathered before the product
and dequantised together, so a shard may end in the middle of a block, and the numbers are those of
an unsharded layer. With double quantisation the constants are bytes too; the few constants of these
are not sharded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from adapters import shards


class Packed4bit(nn.Module):
    """A frozen 4-bit layer y = x Wᵀ + b, made of bitsandbytes' Linear4bit."""

    weight: UInt8[Tensor, "n 1"]  # two entries of W in each byte
    absmax: Tensor  # a constant for each block of 64 entries: fp32, or uint8 if quantised again
    bias: Any

    def __init__(self, linear: Any, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype, self.bias = linear.compute_dtype, linear.bias
        state = copy.copy(linear.weight.quant_state)
        packed = linear.weight.data.view(torch.uint8).view(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(state.absmax, requires_grad=False)
        state.absmax = state.absmax[:0]
        state.to(device)
        self.state = state  # all constants but absmax

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        import bitsandbytes as bnb

        dtype = x.dtype
        x = x.to(self.compute_dtype or dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        product = bnb.matmul_4bit(x, self.weight, self._state(self.absmax), bias=bias)
        return product.to(dtype)

    def dense(self) -> Float[Tensor, "o i"]:
        """Return the dequantised weight. Outside of the layer's forward and backward pass all ranks
        must call it together."""
        import bitsandbytes.functional as bnb

        state = self._state(shards.whole(self.absmax))
        return bnb.dequantize_4bit(shards.whole(self.weight), state)

    def _state(self, absmax: Tensor) -> Any:
        state = copy.copy(self.state)
        state.absmax = absmax
        return state


def unpack_parameters(model: nn.Module, device: torch.device) -> None:
    """Replace the 4-bit layers of bitsandbytes in `model` by Packed4bit. `device` is where they
    will compute."""
    for name, module in list(model.named_modules()):
        if type(getattr(module, "weight", None)).__name__ == "Params4bit" and hasattr(
            module, "compute_dtype"
        ):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Packed4bit(module, device))
