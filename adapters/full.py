"""The two baselines for all methods: train everything, or nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from adapters.delta import Adapter, AdapterError, Start, freeze, train_modules


class Full(Adapter):
    """Full fine-tuning: every parameter of the base is trained. Its checkpoints hold the whole
    model."""

    exportable = False

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    def disabled(self, model: nn.Module) -> Any:
        raise AdapterError(
            "adapter=full changes the base itself, so there is no base to switch back to"
        )

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        raise AdapterError(
            "the run has trained the whole model, which is no adapter. Export it with to=merged"
        )


class Nothing(Adapter):
    """No adapter: the base is evaluated as it is."""

    exportable = False

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        freeze(model)
        train_modules(model, start.new_modules)
        return model

    def disabled(self, model: nn.Module) -> Any:
        return contextlib.nullcontext()

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        raise AdapterError("adapter=none trains nothing, so there is nothing to export")
