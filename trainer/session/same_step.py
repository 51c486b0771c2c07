"""Checks whether a run may be resumed with another batch_size, accumulate or number of ranks: a
step must have the same rows, and its gradient the same sum, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters.delta import Adapter
from trainer.assembly.recipe import Recipe

KEYS = ("batch_size", "accumulate")
# what another number of ranks changes too
LAUNCH = ("lightning.devices", "lightning.num_nodes", "lightning.strategy")


@dataclass(frozen=True)
class Split:
    """The split of steps in an earlier run and in this one."""

    recorded: dict[str, Any]  # the earlier run's config
    recorded_ranks: int
    recipe: Recipe

    @property
    def other_ranks(self) -> bool:
        """Return whether the number of ranks differs."""
        return self.recorded_ranks != self.recipe.ranks

    @property
    def same_rows(self) -> bool:
        """Return whether a step has as many rows as before. They are the same then."""
        return _rows(self.recorded, self.recorded_ranks) == _rows(
            self.recipe.config, self.recipe.ranks
        )

    @property
    def same_parts(self) -> bool:
        """Return whether micro-batches have the same rows, whichever rank they are on."""
        return self.recorded["batch_size"] == self.recipe.config["batch_size"]

    def fault(self) -> str | None:
        """Return why a step that is split otherwise is not the same step; None if it is the same,
        or not split otherwise."""
        config = self.recipe.config
        changed = self.other_ranks or any(self.recorded[key] != config[key] for key in KEYS)
        if not changed:
            return None
        if not self.same_rows:
            rows = _rows(self.recorded, self.recorded_ranks)
            return (
                f"a step had {rows} rows, and would have {_rows(config, self.recipe.ranks)}: keep"
                " batch_size x accumulate x processes the same"
            )
        reason = self._reason()
        return f"batch_size x accumulate x processes is the same, but {reason}" if reason else None

    def _reason(self) -> str | None:
        config, adapter = self.recipe.config, self.recipe.adapter
        if self.other_ranks and adapter.selects_by_rank:
            return f"{type(adapter).__name__} selects entries by the gradients of the first process"
        if not self.same_parts:
            if config["group_by_length"]:
                return "group_by_length=true orders rows by micro-batches"
            if config["task"].get("streaming"):
                return "task.streaming=true reads rows by micro-batches"
        if not self.other_ranks:
            return parts_differ(config, self.recipe)
        return _means(config) or (None if self.same_parts else _selects(adapter))

    def explanation(self) -> str | None:
        """Say what is the same with another number of ranks, and what is not; None with the same
        number."""
        if not self.other_ranks:
            return None
        text = (
            f"{self.recipe.ranks} processes instead of {self.recorded_ranks}: weights, optimiser"
            " state, rates and the rows of each step are the same. Sums are in another order, so"
            " numbers agree up to rounding"
        )
        draws = _draws(self.recipe)
        return f"{text}, and {draws} draws other numbers" if draws else text


def parts_differ(config: dict[str, Any], recipe: Recipe) -> str | None:
    """Return why the rows of a micro-batch, run in several parts, do not give the same gradient;
    None if they do, up to rounding."""
    if (reason := _means(config) or _selects(recipe.adapter)) is not None:
        return reason
    draws = _draws(recipe)
    return f"{draws} draws numbers for each micro-batch" if draws is not None else None


def _means(config: dict[str, Any]) -> str | None:
    if config["penalty"]:
        return "a penalty is a mean over a micro-batch"
    return "a drafter draws numbers for each micro-batch" if config["drafter"] else None


def _selects(adapter: Adapter) -> str | None:
    if not adapter.reads_micro_batches:
        return None
    return f"{type(adapter).__name__} selects entries by the gradients of micro-batches"


def _draws(recipe: Recipe) -> str | None:
    """Return a setting by which the model draws numbers in training."""
    nodes = (
        ("adapter.", recipe.config["adapter"]),
        ("the base's ", recipe.base.config.get_text_config().to_dict()),
    )
    return next(
        (
            f"{where}{key}={value:g}"
            for where, node in nodes
            for key, value in node.items()
            if "drop" in key and isinstance(value, int | float) and value > 0
        ),
        None,
    )


def _rows(config: dict[str, Any], ranks: int) -> int:
    return config["batch_size"] * config["accumulate"] * ranks
