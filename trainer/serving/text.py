"""From tokens to text, token by token, up to a stop string."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

BROKEN = "�"  # stands for bytes that are no character, or not yet
CONTEXT = 6  # tokens of a prompt that a text is decoded after
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies of SentencePiece write a byte


class Text:
    """The text of an answer so far. Special tokens are left out, unless `special`.

    `text` ends before the first of `ends`, once one of them occurs; `ended` says so. The end of
    `text` may be the beginning of a stop string: `sure` is the length that cannot be. The text
    continues the tokens `before` it, which are no part of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[str],
        special: bool = False,
        before: Sequence[int] = (),
    ):
        self.tokenizer, self.ends, self.special = tokenizer, tuple(ends), special
        self.text, self.ended = "", False
        self._ids: list[int] = [*before[-CONTEXT:]]
        if self._decode(self._ids).endswith(BROKEN):  # half a character, which no text continues
            self._ids = []
        self._first, self._read = 0, len(self._ids)  # of the tokens that are decoded together
        self._longest = max(map(len, self.ends), default=0)

    def add(self, token: int) -> None:
        """Add a token. The text grows once its bytes are whole characters."""
        self._ids.append(token)
        self._grow(whole=False)

    def close(self) -> None:
        """Add the bytes that are no whole character, at the end of the answer."""
        if not self.ended:
            self._grow(whole=True)

    @property
    def sure(self) -> int:
        """The length of the text that no stop string can still take back."""
        heads = (end[:length] for end in self.ends for length in range(1, len(end)))
        held = max((len(head) for head in heads if self.text.endswith(head)), default=0)
        return len(self.text) if self.ended else len(self.text) - held

    def _grow(self, whole: bool) -> None:
        # decoded with the tokens before: a token alone may lose or gain a space
        before = self._decode(self._ids[self._first : self._read])
        after = self._decode(self._ids[self._first :])
        if len(after) <= len(before) or (after.endswith(BROKEN) and not whole):
            return
        self._first, self._read = self._read, len(self._ids)
        start = max(0, len(self.text) - self._longest + 1)
        self.text += after[len(before) :]
        places = [place for end in self.ends if (place := self.text.find(end, start)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(  # type: ignore[no-any-return]
            ids, skip_special_tokens=not self.special
        )


class TokenTexts:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        before: Any = getattr(tokenizer, "backend_tokenizer", None)
        decoder = str(getattr(before, "decoder", ""))
        self.letters = _letters() if "ByteLevel" in decoder else {}
        self._known: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """Return (text, bytes). The text of a part of a character is U+FFFD; the bytes are its
        own."""
        if token not in self._known:
            text = self.tokenizer.decode([token])
            self._known[token] = text, [*self._bytes(token, text)]
        return self._known[token]

    def _bytes(self, token: int, text: str) -> bytes:
        if BROKEN in text:
            name = self.tokenizer.convert_ids_to_tokens(token) or ""
            if match := _BYTE.fullmatch(name):
                return bytes([int(match[1], 16)])
            if name and all(letter in self.letters for letter in name):
                return bytes(self.letters[letter] for letter in name)
        return text.encode("utf-8", "replace")


@functools.cache
def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    assert {*letters} == {*pre_tokenizers.ByteLevel.alphabet()}
    return letters
