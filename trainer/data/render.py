"""From an example to token ids, and to the exact set of those that are trained.

The chat template renders a conversation to one text. The spans of the answers in that text come
from the template's own `{% generation %}` markers. Without markers they come from rendering
prefixes: the text before an answer is the conversation up to it with a generation prompt. Either
way they are checked token by token: the prompt tokenised alone, as it will be when the model
answers, must give the first tokens of the whole. A row that fails this check is refused with the
reason; nothing ever falls back to training on everything.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from tasks.reading import DataError
from tasks.task import Conversation, Example, Labelled, Text
from trainer.config import limits
from trainer.models.tiny import CHATML

Span = tuple[int, int]
RENDERED_WITHIN = 10.0  # processor seconds for one row: a template may come from a stranger
TAILS = 1000  # ends of prompts whose tokens are cached; most templates have one


@dataclass
class Tokens:
    """A row: its ids, whether each is trained, and the index of its class (-1 if it has none)."""

    ids: list[int]
    trained: list[bool]
    label: int = -1


class Refused(ValueError):
    """A row cannot be rendered exactly. The message is the reason."""


class Renderer:
    """Turns examples into Tokens, for one tokenizer, template and `train_on`.

    Raises:
        DataError: there is no chat template, which conversations need, or it cannot be used.
    """

    def __init__(self, tokenizer: Any, task: Any):
        self.tokenizer, self.kind = tokenizer, task.kind
        self.train_on = getattr(task, "train_on", "everything")
        self.labels = (
            {label: index for index, label in enumerate(task.labels)}
            if task.kind == "label"
            else {}
        )
        self.template = (
            template(getattr(task, "chat_template", None), tokenizer)
            if task.kind == "conversation"
            else None
        )
        for source in (
            self.template.values() if isinstance(self.template, dict) else [self.template or ""]
        ):
            _refuse_powers(source)
        added = tokenizer.added_tokens_decoder
        self.ends = set(tokenizer.all_special_ids) | {
            index for index, token in added.items() if token.special
        }
        self.special = dict(tokenizer.special_tokens_map)
        # The tokenizer splits a text at these tokens first, so the texts before and after one are
        # tokenised independently. Without any of them, prompts are tokenised whole.
        self.anchors = {
            index: token.content
            for index, token in added.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        self._tails: dict[str, list[int]] = {}

    def __call__(self, example: Example) -> Tokens:
        """Return all tokens of an example, without a limit on their number.

        Raises:
            Refused: the row cannot be rendered, or the spans of its answers are not exact.
        """
        if isinstance(example, Labelled):
            ids = self.tokenizer(example.text)["input_ids"]
            return Tokens(ids, [False] * len(ids), self.labels[example.label])
        if isinstance(example, Text):
            ids = self.tokenizer(example.text)["input_ids"]
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            return Tokens(ids, [True] * len(ids))
        if self.template is None:
            return self._plain(example)
        text, spans = self._spans(example)
        ids, trained = self._aligned(text, spans)
        if self.train_on == "everything":
            trained = [True] * len(ids)
        return Tokens(ids, trained)

    def prompt(self, example: Conversation) -> list[int]:
        """Return the ids after which the last answer is generated."""
        before = example.messages[:-1]
        if self.template is None:
            return self.tokenizer("".join(m["content"] for m in before))["input_ids"]
        return self._encode(self._render(before, example.tools, prompt=True))[0]

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the ids of a conversation whose next message the model generates."""
        return self.prompt(Conversation([*messages, {"role": "assistant", "content": ""}], "chat"))

    def _plain(self, example: Conversation) -> Tokens:
        # Without a template a row is prompt + answer + end token. The prompt is tokenised alone, as
        # it will be when the model answers.
        if sum(m["role"] == "assistant" for m in example.messages) > 1:
            raise Refused(
                "chat_template=none joins one prompt and one answer, and it has several answers"
            )
        prompt = self.prompt(example)
        answer = self.tokenizer(example.messages[-1]["content"], add_special_tokens=False)[
            "input_ids"
        ]
        answer.append(self.tokenizer.eos_token_id)
        learns_prompt = self.train_on == "everything"
        return Tokens(prompt + answer, [learns_prompt] * len(prompt) + [True] * len(answer))

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        return self._jinja(messages, tools, prompt, False)[0]

    def _jinja(
        self, messages: list[dict[str, Any]], tools: Any, prompt: bool, markers: bool
    ) -> tuple[str, list[Span]]:
        try:
            with limits.limited(RENDERED_WITHIN, "rendering a row"):
                texts: Any = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self._template_for(tools),
                    return_assistant_tokens_mask=markers,
                    add_generation_prompt=prompt,
                    **self.special,
                )
        except limits.LimitExceeded as error:  # each further row would take as long
            raise DataError(f"the chat template cannot be used: {error}") from None
        except Exception as error:
            raise Refused(f"the chat template refuses it: {error}") from None
        return texts[0][0], [(start, end) for start, end in texts[1][0]] if markers else []

    def _template_for(self, tools: Any) -> str:
        if isinstance(self.template, dict):
            return (
                self.template["tool_use"]
                if tools and "tool_use" in self.template
                else self.template["default"]
            )
        assert isinstance(self.template, str)
        return self.template

    def _spans(self, example: Conversation) -> tuple[str, list[Span]]:
        """Return the rendered text, and the spans of the trained answers in it."""
        messages, tools = example.messages, example.tools
        source = self._template_for(tools)
        if tools and "tools" not in source:
            raise Refused("it has tools, which the chat template does not show to the model")
        if any(m.get("tool_calls") for m in messages) and "tool_calls" not in source:
            raise Refused("it has tool_calls, which the chat template does not write")
        if has_markers(source):
            text, spans = self._jinja(messages, tools, False, True)
            if not spans:
                raise Refused("the chat template's generation markers mark nothing in it")
        else:
            text = self._render(messages, tools)
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            # Only the last: a template may change earlier answers, as those with thoughts do.
            answers = answers[-1:] if self.train_on == "last" else answers
            spans = [self._prefix_span(messages, tools, i, text) for i in answers]
        return text, spans[-1:] if self.train_on == "last" else spans

    def _prefix_span(
        self, messages: list[dict[str, Any]], tools: Any, index: int, text: str
    ) -> Span:
        before = self._render(messages[:index], tools, prompt=True)
        upto = self._render(messages[: index + 1], tools) if index + 1 < len(messages) else text
        if not text.startswith(before):
            raise Refused(
                _differs(
                    f"rendered up to message {index + 1} with a generation prompt, it", before, text
                )
            )
        if not text.startswith(upto):
            raise Refused(_differs(f"rendered up to message {index + 1}, it", upto, text))
        return len(before), len(upto)

    def _encode(self, text: str) -> tuple[list[int], Callable[[int], Span]]:
        """Return the ids, and a function that gives the span of the i-th of them in the text. The
        spans of all ids would take half as long as tokenising."""
        encoded = self.tokenizer(
            [text],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return encoded["input_ids"][0], encoded.encodings[0].token_to_chars

    def _aligned(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """Return the ids of the text, and whether each is in a span. The start of every span is
        checked against its prompt, tokenised alone."""
        ids, span_of = self._encode(text)
        trained = [False] * len(ids)
        for start, end in spans:
            prompt = self._prompt_ids(text, start, ids, span_of)
            first = len(prompt)
            if ids[:first] != prompt:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b),
                    min(len(ids), first),
                )
                raise Refused(
                    f"the answer at character {start} cannot be separated from its prompt: the"
                    " prompt alone ends in the tokens"
                    f" {self.tokenizer.convert_ids_to_tokens(prompt[at:])}, before the answer in"
                    f" {self.tokenizer.convert_ids_to_tokens(ids[at : first + 1])}"
                )
            last = (
                bisect_right(range(len(ids)), end, lo=first, key=lambda i: span_of(i)[1])
                if end < len(text)
                else len(ids)
            )
            if last < len(ids) and span_of(last)[0] < end:
                raise Refused(f"a token reaches across the end of the answer at character {end}")
            stop = self._without_tail(ids, first, last, text, span_of)
            trained[first:stop] = [True] * (stop - first)
        return ids, trained

    def _prompt_ids(
        self, text: str, start: int, ids: list[int], span_of: Callable[[int], Span]
    ) -> list[int]:
        """Return the ids of text[:start] alone. Up to the last anchor in it they are those of the
        whole text; only the rest is tokenised again."""
        last = bisect_left(range(len(ids)), start, key=lambda i: span_of(i)[0]) - 1
        for i in range(last, -1, -1):
            if (anchor := self.anchors.get(ids[i])) is None:
                continue
            begin, end = span_of(i)
            # Some tokenizers give an unknown word the id of a special token.
            if end > start or text[begin:end] != anchor:
                continue
            rest = text[begin:start]
            if (tail := self._tails.get(rest)) is None:
                if len(self._tails) >= TAILS:
                    self._tails.clear()
                tail = self._tails[rest] = self._encode(rest)[0]
            if tail[0] == ids[i]:  # otherwise the tokenizer adds something before every text
                return ids[:i] + tail
            break
        return self._encode(text[:start])[0]

    def _without_tail(
        self, ids: list[int], first: int, last: int, text: str, span_of: Callable[[int], Span]
    ) -> int:
        # A template may write "\n" after the end token. The model stops at that token, so it need
        # not learn the rest.
        for i in range(last - 1, first - 1, -1):
            if ids[i] in self.ends:
                return i + 1
            begin, end = span_of(i)
            if text[begin:end].strip():
                break
        return last


def template(chosen: str | None, tokenizer: Any) -> str | dict[str, str] | None:
    """Return the Jinja text that `task.chat_template` names, None if prompt and answer are joined
    without one.

    Raises:
        DataError: there is no such file, or the tokenizer has no template.
    """
    if chosen == "none":
        return None
    if chosen == "chatml":
        return CHATML
    if chosen is not None:
        file = Path(chosen).expanduser()
        if not file.is_file():
            raise DataError(
                f"task.chat_template={chosen!r}: there is no such file. Give a Jinja file, chatml,"
                " or none"
            )
        return file.read_text("utf-8")
    if tokenizer.chat_template is None:
        raise DataError(
            "the base's tokenizer has no chat template. Set task.chat_template=chatml, or to a"
            " Jinja file, or to none (prompt and answer joined as they are)"
        )
    return tokenizer.chat_template


def _refuse_powers(source: str) -> None:
    # 9**9**9 is a single operation, which no time limit can interrupt, and it is computed when the
    # template is compiled. `round` computes powers of 10.
    before = ""
    try:
        for _, kind, word in Environment().lex(source):
            if (word == "**" and kind == "operator") or (
                word == "round" and kind == "name" and before == "|"
            ):
                raise DataError(
                    f"the chat template uses {word!r}, which could compute forever. Remove it"
                )
            before = before if kind == "whitespace" else word
    except TemplateSyntaxError:
        return  # reported when a row is rendered


def has_markers(source: str) -> bool:
    """Return whether a template marks the text that the model generates."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


def _differs(what: str, part: str, whole: str) -> str:
    """Return the reason for refusing a row whose prefix renders differently alone."""
    at = next(
        (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b),
        min(len(part), len(whole)),
    )
    return (
        f"the chat template is not additive: {what} reads {part[max(0, at - 10) : at + 20]!r} where"
        f" the whole has {whole[max(0, at - 10) : at + 20]!r}, so the answer's span is not known."
        " Use train_on=last, or a template with {% generation %} markers (task.chat_template)"
    )
