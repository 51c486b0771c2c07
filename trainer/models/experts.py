"""The experts of a mixture, whose matrices are no linear layers."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.conv import _ConvNd

_INSIDE = re.compile(r"(^|\.)experts(\.|$)")  # and not shared_experts


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model's routed experts by name: those inside a module called
    experts, and matrices of several experts in one tensor (E, ., .)."""
    tensors: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            fused = parameter.ndim == 3 and min(parameter.shape[:2]) > 1
            if fused or _INSIDE.search(prefix):
                tensors[name] = parameter
    return tensors
