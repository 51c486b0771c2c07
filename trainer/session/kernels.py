"""The threads of a run, the kernels of its attention and of its elementwise parts, as the run and
this machine allow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from trainer.assembly.recipe import Recipe
from trainer.models.layer_config import of_layer
from trainer.session.start_point import StartPoint
from trainer.speed import attention_choice, cpu_load, elementwise_choice, malloc, threads
from trainer.speed.cpu_load import Seconds

log = logging.getLogger("trainer")


class Choice(Protocol):
    """The kernels that compute a part of a step."""

    def describe(self) -> str: ...

    def record(self) -> dict[str, Any]: ...


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
    """Return the choice of attention kernels that run.yaml records. None is attention by blocks."""

    def measured(setting: str, layer: Any, dtype: torch.dtype) -> attention_choice.Choice | None:
        shape = attention_choice.shape_of(layer, dtype)
        return attention_choice.choose(setting, shape, _longest(recipe)) if shape else None

    return _record_of(recipe, earlier, "attention", attention_choice.recorded, measured)


def elementwise_of(recipe: Recipe, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the choice of elementwise parts that run.yaml records. None is torch."""

    def measured(setting: str, layer: Any, dtype: torch.dtype) -> elementwise_choice.Choice | None:
        shape = elementwise_choice.shape_of(layer, dtype)
        return elementwise_choice.choose(setting, shape) if shape else None

    if recipe.config["compile"]:
        return None
    return _record_of(recipe, earlier, "elementwise", elementwise_choice.recorded, measured)


def _record_of(
    recipe: Recipe,
    earlier: dict[str, Any] | None,
    kind: str,
    recorded: Callable[[Any], Choice | None],
    measured: Callable[[str, Any, torch.dtype], Choice | None],
) -> dict[str, Any] | None:
    """Return the choice of kernels of a kind, as run.yaml records it. `recorded` reads a record;
    `measured` chooses for the setting cpu_KIND, a layer's config and a dtype.

    A run that continues `earlier`, the content of a run.yaml, keeps its choice on the same machine,
    and has none where that had none: runs of versions before the record. None is the plain way."""
    config = recipe.config
    setting = config[f"cpu_{kind}"]
    if config["fused"] is not True or recipe.device.type != "cpu":
        return None
    choice: Choice | None = None
    if setting == "auto" and earlier is not None:
        content = earlier.get(kind)
        choice = recorded(content)
        if choice is None and content is None:
            return None
    if choice is None and not (setting == "auto" and config["deterministic"]):
        dtype = torch.bfloat16 if recipe.precision == "bf16-mixed" else recipe.dtype
        choice = measured(setting, of_layer(recipe.base.config.get_text_config(), 0), dtype)
    if choice is None:
        return None
    log.info("%s: %s (cpu_%s=%s)", kind, choice.describe(), kind, setting)
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
