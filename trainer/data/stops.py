"""The stop set of a model: the tokens, and the texts, that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Stops(list[int]):
    """The ids that end an answer. `texts` end one too: those that a chat template writes after an
    answer where the tokenizer has no special token for them."""

    def __init__(self, ids: Iterable[int] = (), texts: Iterable[str] = (), tokenizer: Any = None):
        super().__init__(ids)
        self.texts, self.tokenizer = tuple(texts), tokenizer
        # a token has at least one byte, and the first and the last one may reach beyond the text
        self._width = max((len(text.encode()) for text in self.texts), default=0) + 1

    @classmethod
    def of(cls, stops: Iterable[int]) -> Stops:
        """Return a stop set, or that of plain ids."""
        return stops if isinstance(stops, cls) else cls(stops)

    def end(self, tokens: Sequence[int], start: int = 0) -> int | None:
        """Return the number of an answer's tokens up to its end, None if it has none from `start`
        on."""
        ids = set(self)
        for count in range(start + 1, len(tokens) + 1):
            if tokens[count - 1] in ids:
                return count
            if self.texts:
                tail = self.tokenizer.decode(tokens[max(0, count - self._width) : count])
                if any(text in tail for text in self.texts):
                    return count
        return None

    def arguments(self) -> dict[str, Any]:
        """Return the further arguments of transformers' `generate`."""
        return {"stop_strings": [*self.texts], "tokenizer": self.tokenizer} if self.texts else {}

    def without_end(self, text: str) -> str:
        """Return an answer's text up to the first of the texts that end one."""
        return text[: min((at for end in self.texts if (at := text.find(end)) >= 0), default=None)]
