"""Liger-Kernel's Triton kernels in place of transformers' modules, on a GPU (Hsu et al. 2024, arXiv
2410.10989).

Liger's own function for a model's family decides which of them the model gets: RMSNorm, SwiGLU or
GeGLU, rotary embeddings. Its losses stay out, since trainer.models.losses computes logits only
where a token is trained.

Liger's function also changes the family's module in transformers, for every model that this process
builds or calls afterwards. Here that change is undone, and applies to the one model: a drafter, or
the next run of a sweep, gets what its own config says. Norms allocate the gradient of their input,
while Liger overwrites the incoming gradient, which other code may still read.

More is saved for the backward pass than with trainer.speed.fused: a LoRA after Liger's SwiGLU saves
its own input, and does not recompute it from gate and up. Quantised linear layers stay as they are,
since only the modules between them change.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

from torch import nn

from trainer.speed.rotations import with_globals

INSTALL = "pip install 'liger-kernel>=0.8.5,<0.9' triton"
OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def fault(kind: str, cuda: bool = True, accelerator: str = "auto") -> str | None:
    """Return why a model of transformers' type `kind` cannot have these kernels here, None if it
    can. `cuda` says whether the run computes on such a device; `accelerator` is the one that its
    config names."""
    if (
        importlib.util.find_spec("liger_kernel") is None
        or importlib.util.find_spec("triton") is None
    ):
        return (
            f"fused=liger needs packages that are not installed: {INSTALL}. Without them:"
            " fused=true"
        )
    if not cuda:
        return (
            f"fused=liger needs a GPU with CUDA, and with lightning.accelerator={accelerator} this"
            " run computes elsewhere: set fused=true"
        )
    if kind not in known():
        return (
            f"fused=liger has no kernels for models of the type {kind}, only for"
            f" {', '.join(sorted(known()))}: set fused=true"
        )
    return None


def known() -> frozenset[str]:
    """Return the types of models, as their configs name them, that the installed Liger-Kernel
    supports."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return frozenset(MODEL_TYPE_TO_APPLY_LIGER_FN)


def put_in(model: nn.Module) -> dict[str, int]:
    """Put the kernels into `model`, in place, and return how many modules of each kind have them.
    Call it before an adapter is attached."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    families: dict[str, Any] = {
        name: sys.modules[name]
        for name in {type(m).__module__ for m in model.modules()}
        if name.startswith("transformers.models.")
    }
    plain = {name: dict(vars(family)) for name, family in families.items()}
    try:
        _apply_liger_kernel_to_instance(model=model, **OFF)
    finally:
        changed = {name: _undo(family, plain[name]) for name, family in families.items()}
    counts = {"norms": 0, "gates": 0, "rotations": 0}
    for module in model.modules():
        if hasattr(module, "casting_mode"):
            module.in_place = False  # type: ignore[assignment]
            counts["norms"] += 1
        elif str(getattr(vars(module).get("forward"), "__module__", "")).startswith(
            "liger_kernel."
        ):
            counts["gates"] += 1
        elif replaced := changed.get(type(module).__module__):
            forward = type(module).forward
            if {*forward.__code__.co_names} & replaced.keys():
                bound = types.MethodType(with_globals(forward, replaced), module)
                module.forward = bound  # type: ignore[method-assign]
                counts["rotations"] += 1
    return counts


def _undo(family: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """Restore a module's names to `plain`, and return those that differed with their values."""
    changed = {
        name: value
        for name, value in vars(family).items()
        if name not in plain or plain[name] is not value
    }
    for name in changed:
        if name in plain:
            setattr(family, name, plain[name])
        else:
            delattr(family, name)
    return changed
