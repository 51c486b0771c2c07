"""The optimiser's parameter groups, and the clipping of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters.delta import Adapter
from trainer.drafters import Drafter
from trainer.training.fsdp import clip_grad_norm, grad_norm


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
) -> tuple[Tensor, Tensor]:
    """Clip the gradients. Return their norm before clipping, and the factor of the adapter's
    gradients. A drafter whose loss does not reach the adapter (`detach`) is clipped by its own
    norm."""
    limit = max_norm if max_norm is not None else float("inf")
    detached = set(drafter.parameters()) if drafter is not None and drafter.detach else set()
    groups = [
        [p for p in parameters if p not in detached],
        [p for p in parameters if p in detached],
    ]
    norms = [clip_grad_norm(group, limit) for group in groups if group]
    factor = (limit / (norms[0] + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return norm, factor


def part_norms(parts: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """Return the norm of the gradients of each part that has some."""
    with_gradient = {
        name: [p for p in parameters if p.grad is not None] for name, parameters in parts.items()
    }
    return {name: grad_norm(group) for name, group in with_gradient.items() if group}
