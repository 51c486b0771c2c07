"""The ends of answers: the tokens that trained answers end in, and every verb's stop set.

The end tokens are measured on the rendered rows: a special token counts if the stretch of trained
tokens ends in it. Some special tokens also stand within an answer, as gpt-oss's <|end|> between
thought and answer. So the answer may continue after an end token in at most one of 100 places. One
set may have several end tokens, such as Llama 3's <|eot_id|> and <|eom_id|>.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from tasks.reading import Bad
from tasks.task import Conversation
from trainer.data.chat_template import Refused
from trainer.data.render import Renderer, Tokens
from trainer.data.rows import Rows
from trainer.data.stops import Stops

SAMPLE = 500  # rows that are rendered where no table of all rows exists
CONTINUED = 0.01  # the largest share of an end token's places after which the answer continues
ANSWER = "yes"  # of a made-up conversation


class _Counts:
    """Counts by special token: how often a stretch of trained tokens ends in it, and how often one
    continues after it."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self.special = np.array(sorted(renderer.ends), np.int64)
        self.ending, self.continued = (np.zeros(len(self.special), np.int64) for _ in range(2))

    def add(self, ids: np.ndarray, trained: np.ndarray, last: np.ndarray, cut: np.ndarray) -> None:
        """Count tokens (m,), of which `last` are those at the end of a row, and `cut` those at the
        end of a row that was cut to max_length."""
        trained = trained.astype(bool)
        follows = np.append(trained[1:], False) & ~last
        for counts, where in (
            (self.ending, trained & ~follows & ~cut),
            (self.continued, trained & follows),
        ):
            tokens = ids[where]
            places = np.searchsorted(self.special, tokens[np.isin(tokens, self.special)])
            counts += np.bincount(places, minlength=len(self.special))

    def chosen(self) -> list[int]:
        """Return the end tokens, the most frequent one first."""
        continued = np.zeros_like(self.continued) if self._whole_texts else self.continued
        ends = (self.ending > 0) & (continued <= CONTINUED * (self.ending + continued))
        order = np.argsort(-self.ending, kind="stable")
        return [int(self.special[i]) for i in order if ends[i]]

    @property
    def _whole_texts(self) -> bool:
        # a text may hold the end token of another document
        return self.renderer.kind == "text"


def of_rows(rows: Rows, renderer: Renderer) -> list[int] | None:
    """Return the end tokens of a table of rows, the most frequent one first. None where the rows do
    not show where answers end: with train_on=everything the prompts between them are trained
    too."""
    if renderer.kind == "label":
        return []
    if renderer.kind == "conversation" and renderer.train_on == "everything":
        return None
    counts, longest = _Counts(renderer), rows.report.longest
    for ids, trained, starts in rows.tokens():
        last = np.zeros(len(ids), bool)
        filled = starts[1:][np.diff(starts) > 0] - 1
        last[filled] = True
        cut = np.zeros(len(ids), bool)
        if rows.report.truncated:
            cut[starts[1:][np.diff(starts) == longest] - 1] = True
        counts.add(ids, trained, last, cut)
    return counts.chosen()


def of_examples(examples: Iterable[Any], renderer: Renderer) -> list[int]:
    """Return the end tokens of up to SAMPLE examples, the most frequent one first."""
    if renderer.kind == "label":
        return []
    answers = copy.copy(renderer)
    if answers.train_on == "everything":
        answers.train_on = "all"
    counts = _Counts(renderer)
    for example in itertools.islice(examples, SAMPLE):
        if isinstance(example, Bad):
            continue
        try:
            row = answers.render(example)
        except Refused:
            continue
        for sequence in row.sequences:
            _add(counts, sequence)
    return counts.chosen()


def of_template(renderer: Renderer) -> list[int]:
    """Return the end tokens that a template writes after the answer of a made-up conversation; none
    if it refuses that."""
    if renderer.kind != "conversation":
        return []
    return of_examples([made_up_row()], renderer)


def made_up_row() -> Conversation:
    """Return a conversation of one question and ANSWER."""
    question = {"role": "user", "content": "1"}
    return Conversation([question, {"role": "assistant", "content": ANSWER}], "")


def _add(counts: _Counts, row: Tokens) -> None:
    last, cut = (np.zeros(len(row.ids), bool) for _ in range(2))
    last[-1:] = True
    counts.add(np.array(row.ids), np.array(row.trained), last, cut)


def of_pieces(renderer: Renderer) -> list[str]:
    """Return the texts that a template writes after an answer where none of their tokens is
    special, so that no id alone ends an answer; none if it refuses a made-up conversation."""
    if renderer.kind != "conversation" or renderer.template is None:
        return []
    try:
        row = renderer(made_up_row())
    except Refused:
        return []
    trained = [token for token, is_trained in zip(row.ids, row.trained, strict=True) if is_trained]
    if renderer.ends & set(trained):
        return []
    text = renderer.tokenizer.decode(trained).partition(ANSWER)[2].strip()
    return [text] if text else []


def stop_set(tokenizer: Any, model: Any, ends: Iterable[int], renderer: Renderer) -> Stops:
    """Return the ids of `stop_ids`, and the texts of `of_pieces`."""
    return Stops(stop_ids(tokenizer, model, ends), of_pieces(renderer), tokenizer)


def stop_ids(tokenizer: Any, model: Any, ends: Iterable[int]) -> list[int]:
    """Return the ids that end an answer, in ascending order: the trained end tokens, the
    tokenizer's, and those of the model's own generation settings.

    Everything that decodes takes its stop set from here, or from `stop_set`.
    """
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *ends}
    ids |= set(own) if isinstance(own, list | tuple) else {own}
    return sorted(int(token) for token in ids if token is not None)


def record(ends: Iterable[int], tokenizer: Any) -> dict[str, int]:
    """Return the end tokens as run.yaml records them: {text: id}."""
    return {tokenizer.convert_ids_to_tokens(token): token for token in ends}


def recorded(content: dict[str, Any], tokenizer: Any) -> list[int] | None:
    """Return the end tokens that a run.yaml records. None if it has none, as those of older
    versions, or if they are not this tokenizer's."""
    record = content.get("answer_ends")
    if not isinstance(record, dict):
        return None
    known = all(
        isinstance(text, str)
        and isinstance(token, int)
        and tokenizer.convert_tokens_to_ids(text) == token
        and tokenizer.convert_ids_to_tokens(token) == text
        for text, token in record.items()
    )
    return list(record.values()) if known else None
