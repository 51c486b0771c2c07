"""The optimiser's parameter groups, and the clipping of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters.delta import Adapter
from trainer.drafters import Drafter
from trainer.training.fsdp import clip_grad_norm


def parameter_groups(
    adapter: Adapter, model: nn.Module, drafter: Drafter | None
) -> list[dict[str, Any]]:
    """Group the parameters of adapter and drafter. Vectors, such as norms and biases, have no
    weight decay, unless their group sets one."""
    groups = []
    of_drafter = drafter.parameter_groups() if drafter is not None else []
    for group in [*adapter.parameter_groups(model), *of_drafter]:
        if "weight_decay" in group:
            groups.append(group)
            continue
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        groups += [group | {"params": matrices}] if matrices else []
        groups += [group | {"params": vectors, "weight_decay": 0.0}] if vectors else []
    return groups


def clip_gradients(
    parameters: list[nn.Parameter], drafter: Drafter | None, max_norm: float | None
) -> Tensor:
    """Clip the gradients and return their norm before clipping. A drafter whose loss does not reach
    the adapter (`detach`) is clipped by its own norm."""
    limit = max_norm if max_norm is not None else float("inf")
    detached = set(drafter.parameters()) if drafter is not None and drafter.detach else set()
    groups = [
        [p for p in parameters if p not in detached],
        [p for p in parameters if p in detached],
    ]
    norms = [clip_grad_norm(group, limit) for group in groups if group]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
