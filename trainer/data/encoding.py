"""Texts as token ids, several at a time.

Of chats of 245 tokens this made 770 to 840 rows a processor second, with their masks, and 530 to
570 with a call for each text. transformers' template and a call for 256 texts, without masks, made
950.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.reading import DataError
from trainer.data.chat_template import Refused

Span = tuple[int, int]


class Encoder:
    """Tokenises texts without special tokens of the tokenizer's own. Texts that are known `ahead`
    are tokenised in one call, by all cores."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: dict[str, tuple[list[int], Any]] = {}

    def ahead(self, texts: list[str]) -> None:
        """Tokenise texts that will be asked for, each once. Earlier ones are dropped."""
        texts = list(dict.fromkeys(texts))
        self._known = dict(zip(texts, self._all(texts), strict=True)) if texts else {}

    def __call__(self, text: str) -> tuple[list[int], Callable[[int], Span]]:
        """Return the ids, and a function that gives the span of the i-th of them in the text. The
        spans of all ids would take half as long as tokenising."""
        known = self._known.get(text)
        ids, encoding = known if known is not None else self._all([text])[0]
        return embedded(self.tokenizer, ids), encoding.token_to_chars

    def _all(self, texts: list[str]) -> list[tuple[list[int], Any]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return list(zip(encoded["input_ids"], encoded.encodings, strict=True))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text alone. A text that brings the token that the tokenizer puts before
    every text has it once.

    Raises:
        Refused: the model has no embedding for one of them.
    """
    ids = embedded(tokenizer, tokenizer(text)["input_ids"])
    return ids[1:] if _begins_twice(tokenizer, text, ids) else ids


def continued_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that the model continues: without the end token that some tokenizers
    put after every text, which the text itself does not have."""
    ids = plain_ids(tokenizer, text)
    ended = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ended else ids


def embedded(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ids that the model has embeddings for; see Base.tokenizer.

    Raises:
        Refused: it has none for one of them.
    """
    without: dict[int, str] = getattr(tokenizer, "without_embedding", {})
    if without and (lacking := without.keys() & set(ids)):
        index = min(lacking)
        raise Refused(
            f"it has the token {without[index]!r} ({index}), for which the model has no embedding:"
            " leave it out of the text, or give a base whose embeddings were resized for its"
            " tokenizer"
        )
    return ids


def pair_ids(
    tokenizer: Any, texts: tuple[str, str], length: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids of two texts, joined as the tokenizer joins them, and their token_type_ids,
    which are empty if it makes none. With `length` the longer text loses its end, as the tokenizer
    does it by truncation=longest_first.

    Raises:
        DataError: `length` leaves no room for two texts.
        Refused: the model has no embedding for a token.
    """
    options: dict[str, Any] = {}
    if length is not None:
        own = tokenizer.num_special_tokens_to_add(pair=True)
        if length < own + 2:
            raise DataError(
                f"max_length={length} has no room for two texts and the {own} special tokens"
                " around them: set a larger max_length"
            )
        options = {"truncation": "longest_first", "max_length": length}
    encoded = tokenizer(*texts, **options)
    ids, types = encoded["input_ids"], list(encoded.get("token_type_ids") or [])
    embedded(tokenizer, ids)
    first = int(_begins_twice(tokenizer, texts[0], ids))
    return ids[first:], types[first:]


def _begins_twice(tokenizer: Any, text: str, ids: list[int]) -> bool:
    first, name = tokenizer.bos_token_id, tokenizer.bos_token
    return first is not None and ids[:2] == [first, first] and text.startswith(name)
