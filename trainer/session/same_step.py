"""Whether a run may be resumed with another batch_size and accumulate: a step then has the same
rows, and its gradient is the same sum, up to rounding."""

from __future__ import annotations

from typing import Any

from trainer.assembly.recipe import Recipe

KEYS = ("batch_size", "accumulate")


def split_otherwise(recorded: dict[str, Any], recipe: Recipe) -> tuple[bool, str | None]:
    """Return whether a step has the same number of rows in other micro-batches, and why this does
    not give the same step; None if it does."""
    config = recipe.config
    if all(recorded[key] == config[key] for key in KEYS):
        return False, None
    if _rows(recorded) != _rows(config):
        return False, None
    return True, _reason(config, recipe)


def _rows(config: dict[str, Any]) -> int:
    return config["batch_size"] * config["accumulate"]


def _reason(config: dict[str, Any], recipe: Recipe) -> str | None:
    if config["group_by_length"]:
        return "group_by_length=true orders rows by micro-batches"
    if config["task"].get("streaming"):
        return "task.streaming=true reads rows by micro-batches"
    return parts_differ(config, recipe)


def parts_differ(config: dict[str, Any], recipe: Recipe) -> str | None:
    """Return why the rows of a micro-batch, run in several parts, do not give the same gradient;
    None if they do, up to rounding."""
    if config["penalty"]:
        return "a penalty is a mean over a micro-batch"
    if config["drafter"]:
        return "a drafter draws numbers for each micro-batch"
    if recipe.adapter.reads_micro_batches:
        return f"{type(recipe.adapter).__name__} selects entries by the gradients of micro-batches"
    dropped = [
        f"{where}{key}={value:g}"
        for where, node in (
            ("adapter.", config["adapter"]),
            ("the base's ", recipe.base.config.get_text_config().to_dict()),
        )
        for key, value in node.items()
        if "drop" in key and isinstance(value, int | float) and value > 0
    ]
    return f"{dropped[0]} draws numbers for each micro-batch" if dropped else None
