"""Objects from config nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from torch import nn

from trainer.config.errors import ConfigError
from trainer.data.batches import BatchOrder
from trainer.models.heads import fresh_modules


def instantiate(node: dict[str, Any], **arguments: Any) -> Any:
    """Make an object from a plain config node. Its `_target_` was checked when the config was
    composed. `from` is no argument of an adapter, but where its weights start
    (trainer.assembly.continued)."""
    node = {key: value for key, value in node.items() if key != "from"}
    try:
        return hydra.utils.instantiate(OmegaConf.create(node), _convert_="all", **arguments)
    except InstantiationException as error:
        if error.__cause__ is None:
            raise
        # the part's own error, which trainer.session.failures can explain
        raise error.__cause__ from None


def schedule(config: dict[str, Any], order: BatchOrder | None) -> Callable[..., float]:
    """Make the schedule, `step, steps -> factor`. A cooldown in tokens is converted to steps.

    Raises:
        ConfigError: the tokens of each step are not known beforehand.
    """
    node = config["schedule"]
    tokens = node.get("cooldown_tokens")
    if tokens is None:
        return instantiate(node)
    if order is None:
        raise ConfigError(
            f"schedule.cooldown_tokens={tokens}: a stream's tokens are not known beforehand. Give"
            " schedule.cooldown in steps"
        )
    in_steps = instantiate(node | {"cooldown_tokens": None})
    cooldown = functools.cache(partial(order.last_steps, tokens))
    return lambda step, steps: in_steps(step, steps=steps, cooldown=cooldown(steps))


def set_problem(model: Any, task: Any) -> None:
    """Record in a classifier's config what it learns. Its loss reads it, and transformers'
    pipelines do in a merged export."""
    if task.kind == "label":
        model.config.problem_type = task.problem


def new_tokens(model: nn.Module) -> tuple[int, ...]:
    """The ids of the tokens that the base got by base.add_tokens."""
    return getattr(model, "added_tokens", ())


def new_modules(model: nn.Module, labels: list[str] | None) -> tuple[str, ...]:
    """Name the modules that are trained as a whole: those that the base has no weights for, such as
    the head of a classifier."""
    if labels is None:
        return ()
    return getattr(model, "fresh_modules", None) or fresh_modules(model)[0]
