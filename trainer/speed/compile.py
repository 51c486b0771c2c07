"""torch.compile over the decoder layers, one after another, in training.

A graph is compiled for each kind of layer, and all layers of that kind share it. Lengths and batch
sizes are symbols in the graph, so batches of other lengths and resumed runs use the same code.
Attention on a CPU (trainer.speed.attention) stays outside: its blocks follow each batch's mask.
Evaluation and generation run the plain layers.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adapters.delta import Adapter
from trainer.config.errors import ConfigError
from trainer.speed import attention

GRAPHS = 64  # per function, at most: one for each kind of layer, more for batches of one row


def refuse(adapter: Adapter, device: torch.device) -> None:
    """Refuse compile=true where it cannot work.

    Raises:
        ConfigError: the adapter or this machine does not support compiled layers.
    """
    if not adapter.compiles:
        raise ConfigError(
            f"compile=true: {type(adapter).__name__} changes weights and gradients by code that"
            " cannot be compiled: set compile=false"
        )
    name = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ConfigError(
            f"compile=true: on a CPU a C++ compiler is needed, and {name} is not installed: install"
            " it, name another in $CXX, or set compile=false"
        )


def compile_layers(model: nn.Module) -> int:
    """Compile the decoder layers of `model`, in place, and return how many. Call it after
    everything that is trained has been attached.

    The first layer stays plain: its input has no gradient, so it would need graphs that no other
    layer shares, and compilation would take twice as long.

    Raises:
        ConfigError: the model does not say which modules are its layers.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(
            f"compile=true: {type(model).__name__} does not say which modules are its layers"
            " (_no_split_modules): set compile=false"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    ALL_ATTENTION_FUNCTIONS.register(
        attention.BLOCKED, torch.compiler.disable(attention.blocked_attention_forward)
    )
    for layer in layers[1:]:
        layer.forward = _in_training(layer, layer.forward)  # type: ignore[method-assign]
    return len(layers) - 1


def _in_training(layer: nn.Module, plain: Any) -> Any:
    compiled = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else plain)(*args, **kwargs)

    return forward
