"""The threads of a run, the kernels of its attention and of its elementwise parts, as the run and
this machine allow."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from trainer.assembly.recipe import Recipe
from trainer.models.layer_config import of_layer
from trainer.session.start_point import StartPoint
from trainer.speed import attention_choice, cpu_load, elementwise_choice, malloc, threads
from trainer.speed.attention_choice import Choice
from trainer.speed.cpu_load import Seconds

log = logging.getLogger("trainer")


def set_up_process(config: dict[str, Any]) -> Seconds:
    """Set threads and memory of this process. Return the processor time used so far."""
    cpu_before = cpu_load.seconds()
    if isinstance(config["threads"], int):
        torch.set_num_threads(config["threads"])
    if config["fused"]:
        malloc.keep_freed()
        malloc.expand_segments()
    return cpu_before


def set_threads(recipe: Recipe, earlier: dict[str, Any] | None, before: Seconds) -> None:
    """Take as many threads as cores are free, on a CPU. A run that continues `earlier`, the content
    of a run.yaml, takes as many as that had, since sums of other parts have other bits."""
    if recipe.device.type != "cpu":
        return
    count = torch.get_num_threads()
    if earlier is None:
        count, reason = threads.choose(before, count)
    else:
        recorded = earlier.get("threads")
        if isinstance(recorded, int) and 0 < recorded <= cpu_load.available():
            count = recorded
        reason = "as in the run that this one continues"
    torch.set_num_threads(count)
    log.info("threads: %d (%s)", count, reason)


def attention_of(recipe: Recipe, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the choice of kernels that run.yaml records. A run that continues `earlier`, the
    content of a run.yaml, keeps its choice on the same machine. None is attention by blocks, as
    runs without a record had it."""
    config = recipe.config
    setting = config["cpu_attention"]
    if config["fused"] is not True or recipe.device.type != "cpu":
        return None
    choice: Choice | None = None
    if setting == "auto" and earlier is not None:
        content = earlier.get("attention")
        choice = attention_choice.recorded(content)
        if choice is None and content is None:
            return None
    if choice is None and not (setting == "auto" and config["deterministic"]):
        dtype = torch.bfloat16 if recipe.precision == "bf16-mixed" else recipe.dtype
        layer = of_layer(recipe.base.config.get_text_config(), 0)
        shape = attention_choice.shape_of(layer, dtype)
        choice = attention_choice.choose(setting, shape, _longest(recipe)) if shape else None
    if choice is None:
        return None
    log.info("attention: %s (cpu_attention=%s)", choice.describe(), setting)
    return choice.record()


def elementwise_of(recipe: Recipe, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the choice of elementwise parts that run.yaml records. A run that continues `earlier`,
    the content of a run.yaml, keeps its choice on the same machine. None is torch, as runs without
    a record had it."""
    config = recipe.config
    setting = config["cpu_elementwise"]
    if config["fused"] is not True or config["compile"] or recipe.device.type != "cpu":
        return None
    choice: elementwise_choice.Choice | None = None
    if setting == "auto" and earlier is not None:
        content = earlier.get("elementwise")
        choice = elementwise_choice.recorded(content)
        if choice is None and content is None:
            return None
    if choice is None and not (setting == "auto" and config["deterministic"]):
        dtype = torch.bfloat16 if recipe.precision == "bf16-mixed" else recipe.dtype
        layer = of_layer(recipe.base.config.get_text_config(), 0)
        shape = elementwise_choice.shape_of(layer, dtype)
        choice = elementwise_choice.choose(setting, shape) if shape else None
    if choice is None:
        return None
    log.info("elementwise: %s (cpu_elementwise=%s)", choice.describe(), setting)
    return choice.record()


def choose(start: StartPoint, recipe: Recipe, earlier: dict[str, Any] | None) -> StartPoint:
    """Return the start point with the records of all kernels."""
    return replace(
        start,
        attention=attention_of(recipe, earlier),
        elementwise=elementwise_of(recipe, earlier),
    )


def _longest(recipe: Recipe) -> int:
    """Return the tokens of the longest sequence, as far as it is known."""
    limit = int(recipe.config["max_length"])
    if recipe.config["packing"] or recipe.data.train is None:
        return limit
    return min(limit, int(recipe.data.train.rows.lengths.max(initial=0)))
