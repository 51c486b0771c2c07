"""Events of a request, from the worker to the routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.decoding.streaming import Token
from trainer.serving.errors import ApiError


@dataclass(frozen=True)
class Placed:
    """A token of an answer, and where its text begins in the answer's."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Usage:
    """The cost of an answer so far."""

    prompt_tokens: int
    tokens: int = 0  # of the answer, including its end token
    passes: int = 0  # of the target, including the prompt's
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0  # since the prompt was read


@dataclass(frozen=True)
class Piece:
    """The next text of an answer, and the tokens that begin in it. `echo` marks a prompt's."""

    text: str
    tokens: list[Placed]
    usage: Usage
    echo: bool = False


@dataclass(frozen=True)
class End:
    """The end of an answer: `stop` at an end token or a stop string, or `length`."""

    reason: str
    usage: Usage


@dataclass(frozen=True)
class Done:
    """The end of a task that decodes nothing, and what it returned."""

    result: Any


Event = Piece | End | Done | ApiError
