"""Trained parameters that no gradient reaches."""

from __future__ import annotations

import logging

from torch import nn

log = logging.getLogger("trainer")


def warn_of_untrained(model: nn.Module) -> bool:
    """Log which trained modules have no gradient after a backward pass, while others have one:
    their layers were not called, and they will stay as they are. Experts are left out, since a
    batch may send nothing to some. Return False if no trained parameter has a gradient yet, as
    while a mask is collected."""
    dead: dict[str, int] = {}
    reached: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".experts." not in name:
            module = name.rpartition(".")[0]
            if parameter.grad is not None:
                reached.add(module)
            else:
                dead[module] = dead.get(module, 0) + parameter.numel()
    if not reached:
        return not dead
    if dead := {module: count for module, count in dead.items() if module not in reached}:
        log.warning(
            "%d trained modules get no gradient and stay as they are, such as %s (%d parameters in"
            " all): text does not go through them. Leave them out with adapter.exclude_modules",
            len(dead),
            next(iter(dead)),
            sum(dead.values()),
        )
    return True
