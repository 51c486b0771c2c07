"""Sequences of token ids, made from rows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tokens:
    """A sequence: its ids, whether each is trained, the index of its class (-1 if it has none), its
    weight in the loss, and the numbers that a classifier's outputs are trained on where there is no
    single class. A pair of texts has the tokenizer's token_type_ids as `types`, empty if it makes
    none, and the `texts` themselves, by which it is cut."""

    ids: list[int]
    trained: list[bool]
    label: int = -1
    weight: float = 1.0
    values: list[float] | None = None
    types: list[int] | None = None
    texts: tuple[str, str] | None = None


@dataclass
class Rendered:
    """The result of a row: its sequences, the kinds of fields that the template left out, and what
    nothing reads."""

    sequences: list[Tokens]
    lost: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
