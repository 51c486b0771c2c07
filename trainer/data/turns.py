"""The texts of a conversation: one in which all answers are trained, or several.

Where a template writes an answer differently once other turns follow it, as those do that cut
earlier thoughts, the whole conversation shows the model what it never sees at inference. Each
answer is then trained after its own prompt: the conversation up to it with a generation prompt.
Answers whose prompts agree with a text share it, so most templates give one text for all.

A template that cuts the thoughts out of the last answer, too, as DeepSeek-R1's does, shows nowhere
what its model writes. There the answer is its prompt, the thoughts, </think>, and the rest as the
template writes it.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field

from tasks.messages import thought_of
from tasks.task import Conversation
from trainer.data.chat_template import ChatTemplate, Refused, Span
from trainer.data.lost import written

_OPENS = re.compile(r"<think>\s*\Z")
_EMPTY = re.compile(r"\s*(?:<think>\s*)?</think>\s*")


@dataclass
class Turn:
    """A text, the spans of its trained answers, how many of the messages it has, and the indices of
    the answers that are trained in it. `places` are the spans by answer, where it is known which
    span is whose."""

    text: str
    spans: list[Span]
    end: int
    trained: set[int] = field(default_factory=set)
    places: dict[int, Span] = field(default_factory=dict)


def turns(template: ChatTemplate, example: Conversation, train_on: str) -> list[Turn]:
    """Return the texts that a conversation is trained as, in the order of their answers.

    Raises:
        Refused: the template refuses the conversation, or the place of an answer is not known.
    """
    row = _Row(template, example)
    answers = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
    if train_on == "everything":
        return [Turn(row.whole, [], len(example.messages), set(answers))]
    # Only the last: a template may change earlier answers, as those with thoughts do.
    answers = answers[-1:] if train_on == "last" else answers
    answers = [i for i in answers if i not in example.untrained]
    if not answers:
        raise Refused("it has no trained token: its answers have weight 0")
    if not template.marks:
        return row.texts(answers)
    if template.rewrites:
        with contextlib.suppress(Refused):  # then the marks are what is left
            parts = row.texts(answers)
            if all(start < end for part in parts for start, end in part.spans):
                return parts
    return [row.marked(answers, train_on)]


class _Row:
    """The renderings of one conversation, each made once."""

    def __init__(self, template: ChatTemplate, example: Conversation):
        self.template, self.example = template, example
        self._texts: dict[tuple[int, bool], str] = {}

    @property
    def whole(self) -> str:
        return self.upto(len(self.example.messages))

    def upto(self, end: int, prompt: bool = False) -> str:
        """Return the text of the first `end` messages."""
        if (end, prompt) not in self._texts:
            messages, variables = self.example.messages[:end], self.example.variables
            self._texts[end, prompt] = self.template.render(
                messages, self.example.tools, variables, prompt
            )[0]
        return self._texts[end, prompt]

    def marked(self, answers: list[int], train_on: str) -> Turn:
        """Return the whole text with the spans that the template marks."""
        messages, variables = self.example.messages, self.example.variables
        text, spans = self.template.render(messages, self.example.tools, variables, markers=True)
        if not spans:
            raise Refused("the chat template's generation markers mark nothing in it")
        if train_on == "last":
            spans = spans[-1:]
        elif self.example.untrained:
            every = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            if len(spans) != len(every):
                raise Refused(
                    f"the chat template marks {len(spans)} spans for {len(every)} answers, so it is"
                    " not known which of them has weight 0. Use a template without markers"
                )
            spans = [span for i, span in zip(every, spans, strict=True) if i in answers]
        return Turn(text, spans, len(messages), set(answers))

    def texts(self, answers: list[int]) -> list[Turn]:
        """Return texts in which each of the answers follows its own prompt, as few as possible."""
        result: list[Turn] = []
        end, pending = len(self.example.messages), answers
        while pending:
            own, text = pending[-1], self.upto(end)
            spans = {i: span for i in pending if (span := self._span(i, text)) is not None}
            if own not in spans and end != own + 1:
                end = own + 1  # what follows it changes it
                continue
            if own not in spans:
                text, spans[own] = self._spliced(own)
            result.append(Turn(text, [spans[i] for i in sorted(spans)], end, set(spans), spans))
            pending = [i for i in pending if i not in spans]
            end = pending[-1] + 1 if pending else 0
        return result[::-1]

    def _span(self, index: int, text: str) -> Span | None:
        """Return where an answer is in a text, None if the text differs from its own prompt or from
        what the template writes up to it, or if the template cuts its thoughts out."""
        before, upto = self.upto(index, True), self.upto(index + 1)
        # Some templates end the whole text in a further end token, after that of the last answer.
        shorter = upto.removesuffix(self.template.special.get("eos_token") or "")
        if not text.startswith(upto) and shorter.rstrip().endswith(self.template.ends):
            upto = shorter
        if not (text.startswith(before) and text.startswith(upto)):
            return None
        return None if self._cut(index, upto[len(before) :]) else (len(before), len(upto))

    def _cut(self, index: int, written_answer: str) -> bool:
        """Return whether the template cuts thoughts out of an answer that it could write."""
        thought, _ = thought_of(self.example.messages[index])
        if not thought or "</think>" not in self.template.source:
            return False
        return not written(thought, written_answer)

    def _spliced(self, index: int) -> tuple[str, Span]:
        """Return the text of an answer after its prompt, with the thoughts that the template leaves
        out, and where the answer is."""
        before, upto = self.upto(index, True), self.upto(index + 1)
        opening = _OPENS.search(before)
        head = before[: opening.start()] if opening else before
        thought, _ = thought_of(self.example.messages[index])
        known = "</think>" in self.template.source and (opening or thought is not None)
        if not upto.startswith(head) or not known:
            raise Refused(_differs(index, before, upto))
        if before.rstrip().endswith("</think>"):
            raise Refused(
                f"the chat template closes the thought before message {index + 1}, which has one:"
                " let it think by task.chat_template_kwargs, as {enable_thinking: true} or"
                " {thinking: true}, or leave reasoning_content out"
            )
        if thought is None:
            raise Refused(
                f"the chat template opens a thought before message {index + 1}, which has none:"
                " give it as reasoning_content, an empty text for an empty thought, or choose"
                " another template (task.chat_template)"
            )
        empty = _EMPTY.match(upto, len(head))
        rest = upto[len(head) if empty is None else empty.end() :]
        opened = "" if opening else "<think>\n"
        inner = thought.strip("\n")
        text = f"{before}{opened}{inner}\n</think>\n\n{rest.lstrip()}"
        return text, (len(before), len(text))


def _differs(index: int, before: str, upto: str) -> str:
    """Return the reason for refusing a row whose answer does not begin as its prompt ends."""
    at = next(
        (i for i, (a, b) in enumerate(zip(before, upto, strict=False)) if a != b),
        min(len(before), len(upto)),
    )
    return (
        f"the chat template is not additive: rendered up to message {index + 1}, it reads"
        f" {upto[max(0, at - 10) : at + 20]!r} where the generation prompt has"
        f" {before[max(0, at - 10) : at + 20]!r}, so the place of the answer is not known. Use a"
        " template with {% generation %} markers (task.chat_template)"
    )
