"""The prompt of /v1/completions as part of the answer: its text, and the place of each token."""

from __future__ import annotations

from typing import Any

from trainer.serving.prompts import Prompt
from trainer.serving.text import Text


def text_and_offsets(tokenizer: Any, prompt: Prompt) -> tuple[str, list[int]]:
    """Return (the prompt's text, the character at which each token begins).

    A prompt that came as text is returned as it came. A token that the tokenizer put before or
    after it has no character of its own, and special tokens that the client wrote have theirs.
    """
    own = _own(tokenizer, prompt)
    text, offsets = Text(tokenizer, (), special=True), []
    for place, token in enumerate(prompt.ids):
        offsets.append(len(text.text))
        if place in own:
            text.add(token)
    text.close()
    if prompt.text is None or text.text == prompt.text:
        return text.text, offsets
    # the tokenizer has normalised it, so that places are approximate
    return prompt.text, [min(offset, len(prompt.text)) for offset in offsets]


def _own(tokenizer: Any, prompt: Prompt) -> range:
    """Return the places of the tokens that the client wrote."""
    if prompt.text is not None:
        written = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        for start in range(len(prompt.ids) - len(written) + 1):
            if prompt.ids[start : start + len(written)] == written:
                return range(start, start + len(written))
    return range(len(prompt.ids))
