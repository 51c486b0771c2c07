"""The layers that a method of PEFT adapts."""

from __future__ import annotations

import contextlib
import logging
import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters import io
from adapters.delta import AdapterError, ends_with
from adapters.linear import output_layer
from adapters.targets import targets

log = logging.getLogger("trainer")


def all_linear(model: nn.Module, kind: str) -> str | list[str]:
    """Return target_modules for `all-linear`: the word itself, unless PEFT takes other layers
    than `targets` does. It takes routers that return a tuple, a vision tower, and the experts
    of mixtures (see io.lora_fields), onto which it puts LoRA alone."""
    names = [name for name, _ in targets(model, "all-linear")]
    head = output_layer(model)
    of_peft = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    rewritten = [n for n in names if kind == "LORA" and io.is_rewritten(model, n)]
    rewrites = kind == "LORA" and io.rewrites(model)
    if of_peft == set(names) and not rewrites:
        return "all-linear"
    others = [name for name in names if name not in set(rewritten)]
    if rewritten:
        log.warning(
            "%d linear layers, such as %s, get no adapter: PEFT takes their names for those of"
            " experts (peft #3711). adapter=lora trains them too",
            len(rewritten),
            rewritten[0],
        )
    if not others:
        raise AdapterError(
            f"PEFT can adapt none of this model's linear layers, such as {names[0]}, whose names"
            " it takes for those of experts (peft #3711): set adapter=lora"
        )
    return io.shortened(others, model)


def refuse_unknown(model: nn.Module, entries: str | list[str]) -> None:
    """Refuse target modules that match nothing. PEFT ignores them if another entry matches, and its
    message lists no choices."""
    names = [name for name, _ in model.named_modules()]
    if entries == "all-linear":
        return
    if isinstance(entries, str):
        with contextlib.suppress(re.error):  # `targets` reports it
            if any(re.fullmatch(entries, name) for name in names):
                return
        targets(model, entries)
    elif unknown := [
        entry for entry in entries if not any(ends_with(name, entry) for name in names)
    ]:
        targets(model, unknown)
