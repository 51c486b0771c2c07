"""Everything about a run that is known before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adapters.delta import Adapter
from adapters.full import Full, Nothing
from trainer.assembly.build import instantiate
from trainer.assembly.early_checks import refuse_early
from trainer.assembly.rows import Data, batch_order, load_data, resolve_length
from trainer.assembly.trained import Tuned, load_tuned
from trainer.config.errors import ConfigError
from trainer.data.batches import BatchOrder
from trainer.models.base import Base
from trainer.models.precision import compute
from trainer.speed import compile as compile_module
from trainer.speed import liger


@dataclass(frozen=True)
class Recipe:
    """A run before its weights are loaded: parts, tokenised rows, their order and its length."""

    config: dict[str, Any]
    base: Base
    task: Any
    adapter: Adapter
    target: Tuned | None  # the run whose adapter belongs to the frozen target
    data: Data
    order: BatchOrder | None  # None where the rows stream
    steps: int  # 0 where nothing is trained
    dtype: torch.dtype  # of the frozen weights
    precision: str
    device: torch.device
    ranks: int

    @classmethod
    def of(
        cls,
        config: dict[str, Any],
        adapter: Adapter,
        device: torch.device | None = None,
        ranks: int = 1,
        check_task: Callable[[dict[str, Any], Any], None] = lambda config, task: None,
        recorded_target: dict[str, Any] | None = None,
    ) -> Recipe:
        """Make the parts of a run and tokenise its rows. `config` gets its max_length if it has
        none. Without `device` this is only a check, perhaps on another machine: the device is not
        checked and the target is not loaded. `check_task` is called before rows are tokenised.
        `recorded_target` is the target's checkpoint in the run that this one continues.

        Raises:
            BaseError, AdapterError: a setting does not fit the base; no row was read.
            ConfigError: a setting does not fit the device. Others: see trainer.data.rows.tokenise.
        """
        base: Base = instantiate(config["base"])
        resolve_length(config, base)
        refuse_early(config, base, adapter)
        task = instantiate(config["task"])
        check_task(config, task)
        target = None
        if device is not None:
            if config["target"]["run"] is not None:
                target = load_tuned(config["target"]["run"], recorded=recorded_target)
            _check_speed(config, base, adapter, device)
        else:
            device = local_device(config)
        dtype, _, precision = compute(
            config["precision"],
            config["base"]["dtype"],
            isinstance(adapter, Full),
            device.type == "cuda",
        )
        data = load_data(config, base, task)
        order = batch_order(config, data, ranks) if data.train is not None else None
        steps = _steps(config, adapter, order, ranks) if _trains(config, adapter) else 0
        return cls(
            config,
            base,
            task,
            adapter,
            target,
            data,
            order,
            steps,
            dtype,
            precision,
            device,
            ranks,
        )

    @property
    def labels(self) -> list[str] | None:
        """The classes of a classification task."""
        return self.task.labels if self.task.kind == "label" else None

    @property
    def trains(self) -> bool:
        """Return whether anything is trained: an adapter, a drafter or both."""
        return _trains(self.config, self.adapter)

    @property
    def trains_base(self) -> bool:
        """Return whether the base's own weights are trained."""
        return isinstance(self.adapter, Full)

    @property
    def sharded(self) -> bool:
        """Return whether FSDP2 shards the model among the ranks."""
        return self.trains and self.config["lightning"]["strategy"] == "fsdp2"

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: those of the rows, and those of the frozen target."""
        target = self.target.ends(self.base.tokenizer) if self.target is not None else []
        return list(dict.fromkeys([*self.data.ends, *target]))

    def identity(self, choices: dict[str, Any]) -> dict[str, Any]:
        """Return what run.yaml records, and what must be the same when a run is resumed."""
        return {
            "choices": choices,
            "base": self.base.fingerprint,
            "data": self.data.identity,
            "precision": self.precision,
            "trains_base": self.trains_base,
            "labels": self.labels,
            "steps": self.steps,
            "ranks": self.ranks,
            "target": self.target.record if self.target is not None else None,
        }


def _steps(config: dict[str, Any], adapter: Adapter, order: BatchOrder | None, ranks: int) -> int:
    """Return the optimiser steps of a run: those that its settings ask for, after those that the
    adapter needs before."""
    limits = config["max_steps"], config["max_tokens"]
    rows = config["batch_size"] * config["accumulate"] * ranks
    steps = order.steps(*limits) if order is not None else config["max_steps"]
    before = adapter.plan(steps, rows)
    config["adapter"] |= adapter.planned_settings()  # in place, so that run.yaml records numbers
    if config["branch"]:  # its max_steps count from the start of the run that it branches off
        return steps  # type: ignore[no-any-return]
    if before and order is not None:
        order.extend(before)
        steps = order.steps(*limits, after=before)
    return before + steps  # type: ignore[no-any-return]


def _trains(config: dict[str, Any], adapter: Adapter) -> bool:
    return not isinstance(adapter, Nothing) or bool(config["drafter"])


def local_device(config: dict[str, Any]) -> torch.device:
    """Return the device that the run would have on this machine."""
    cuda = torch.cuda.is_available() and config["lightning"]["accelerator"] != "cpu"
    return torch.device("cuda" if cuda else "cpu")


def _check_speed(
    config: dict[str, Any], base: Base, adapter: Adapter, device: torch.device
) -> None:
    """Refuse kernels and compilation that the device or the adapter does not allow."""
    if config["fused"] == "liger":
        fault = liger.fault(
            base.config.model_type, device.type == "cuda", config["lightning"]["accelerator"]
        )
        if fault is not None:
            raise ConfigError(fault)
    if config["compile"]:
        compile_module.refuse(adapter, device)
