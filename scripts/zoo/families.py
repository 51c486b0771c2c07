"""All families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """The place where a family is checked: its model's folder, a file of rows, a folder for
    runs."""

    family: Family
    base: str
    rows: Path
    folder: Path


Check = Callable[[Place], str]  # returns a fact for the table, or raises


@dataclass(frozen=True)
class Family:
    """One family of models.

    `checks` are run in their order and by these names. `config` makes the tiny config, and `auto`
    is the class of transformers that makes the model. `group` is a heading of the table. `rows` are
    written as JSON lines. `tokenizer` is that of trainer.models.tiny unless one is made.
    """

    name: str
    group: str
    config: Callable[[], Any]
    auto: str
    checks: dict[str, Check]
    rows: Callable[[], list[dict[str, Any]]]
    tokenizer: Callable[[], Any] | None = None


def every() -> dict[str, Family]:
    """All families by name, in the order of the table."""
    from scripts.zoo import families_decoder, families_encoder

    families = [*families_decoder.families(), *families_encoder.families()]
    return {family.name: family for family in families}
