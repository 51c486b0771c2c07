"""Liger-Kernel's Triton kernels in place of transformers' modules, on a GPU (Hsu et al. 2024, arXiv
2410.10989).

Which of them a model gets, Liger's own function for its family decides: RMSNorm, SwiGLU or GeGLU,
rotary embeddings. Its losses stay out, since trainer.models.losses makes logits only where a token
is trained.

That function also changes the family's module in transformers, for every model that this process
builds or calls from then on. Here that is taken back, and holds for the one model: a drafter, or
the next run of a sweep, has what its own config says. Norms give their gradient a tensor of its
own, where Liger writes it over the one that came, which somebody else may still read.

More waits for the backward pass than with trainer.speed.fused: a LoRA behind Liger's SwiGLU keeps
its own input, and does not make it again from gate and up. Quantised linear layers stay as they
are, since only what is between them changes.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

from torch import nn

INSTALL = "pip install 'liger-kernel>=0.8.5,<0.9' triton"
OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def fault(kind: str, cuda: bool = True, asked: str = "auto") -> str | None:
    """Why a model of transformers' type `kind` cannot have them here, if so; `cuda` is whether the
    run computes on such a device, and `asked` the accelerator that its config names."""
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
            f"fused=liger is for a GPU with CUDA, and with lightning.accelerator={asked} this run"
            " computes elsewhere: set fused=true"
        )
    if kind not in known():
        return (
            f"fused=liger has no kernels for models of the type {kind}, it knows"
            f" {', '.join(sorted(known()))}: set fused=true"
        )
    return None


def known() -> frozenset[str]:
    """The types of models, as their configs name them, that the installed Liger-Kernel has kernels
    for."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return frozenset(MODEL_TYPE_TO_APPLY_LIGER_FN)


def put_in(model: nn.Module) -> dict[str, int]:
    """Put them into `model`, in place; how many modules of each kind have them now. Called before
    an adapter is attached."""
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
        changed = {name: _taken_back(family, plain[name]) for name, family in families.items()}
    counts = {"norms": 0, "gates": 0, "rotations": 0}
    for module in model.modules():
        if hasattr(module, "casting_mode"):
            module.in_place = False  # type: ignore[assignment]
            counts["norms"] += 1
        elif str(getattr(vars(module).get("forward"), "__module__", "")).startswith(
            "liger_kernel."
        ):
            counts["gates"] += 1
        elif news := changed.get(type(module).__module__):
            forward = type(module).forward
            if {*forward.__code__.co_names} & news.keys():
                module.forward = types.MethodType(_with(forward, news), module)  # type: ignore[method-assign]
                counts["rotations"] += 1
    return counts


def _taken_back(family: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """Give a module its own names back; those that differed, with what they were."""
    found = {
        name: value
        for name, value in vars(family).items()
        if name not in plain or plain[name] is not value
    }
    for name in found:
        if name in plain:
            setattr(family, name, plain[name])
        else:
            delattr(family, name)
    return found


def _with(function: Any, names: dict[str, Any]) -> Any:
    """A function that finds other things under some of its global names."""
    made = types.FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
