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
from trainer.models.base import BaseError
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

    With `decoder_start` (Base.decoder_start) a conversation becomes a pair: what the encoder reads,
    which is not trained, and then what the decoder writes, which is.

    Raises:
        DataError: there is no chat template, which conversations need, or it cannot be used.
        BaseError: the tokenizer has no end token, and the model would write text.
    """

    def __init__(self, tokenizer: Any, task: Any, decoder_start: int | None = None):
        self.tokenizer, self.kind = tokenizer, task.kind
        if task.kind != "label" and tokenizer.eos_token_id is None:
            raise BaseError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, so a"
                " model trained with it would never stop. Set eos_token in its"
                " tokenizer_config.json."
            )
        self.train_on = getattr(task, "train_on", "everything")
        self.decoder_start = decoder_start
        if decoder_start is not None:
            _refuse_one_sided(task)
        self.labels = (
            {label: index for index, label in enumerate(task.labels)}
            if task.kind == "label"
            else {}
        )
        self.template = (
            template(_template_name(task, tokenizer, decoder_start), tokenizer)
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
        if self.decoder_start is not None:
            return self._pair(example)
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

    def _pair(self, example: Conversation) -> Tokens:
        """Return the ids that the encoder reads, then those that the decoder writes."""
        answers = sum(message["role"] == "assistant" for message in example.messages)
        if answers > 1 and (self.train_on != "last" or self.template is None):
            raise Refused(
                f"it has {answers} answers, and an encoder-decoder writes one. Use train_on=last"
                " with a chat template, which puts the earlier ones into the prompt"
            )
        if self.template is not None:
            text, spans = self._spans(example)
            ids, trained = self._aligned(text, spans)
            end = len(ids) - trained[::-1].index(True) if any(trained) else 0
            return Tokens(ids[:end], trained[:end])
        prompt = self.prompt(example)
        answer = self.tokenizer(text_target=example.messages[-1]["content"])["input_ids"]
        if answer[:1] == [self.decoder_start]:  # the batch puts it before every answer
            answer = answer[1:]
        if answer[-1:] != [self.tokenizer.eos_token_id]:
            answer.append(self.tokenizer.eos_token_id)
        return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    def cut(self, row: Tokens, length: int) -> Tokens:
        """Return a longer row cut to `length` tokens. A text that is written loses its end. A pair
        loses the end of its prompt, and a labelled text its own end; the special tokens that close
        them stay. Nothing is left of a pair whose prompt came from a template, or would be gone."""
        if self.kind != "label" and self.decoder_start is None:
            return Tokens(row.ids[:length], row.trained[:length], row.label)
        end = row.trained.index(True) if any(row.trained) else len(row.ids)
        close = end
        while close > 1 and row.ids[close - 1] in self.ends:
            close -= 1
        kept = max(0, close - (len(row.ids) - length))
        if self.kind != "label" and (self.template is not None or kept == 0):
            return Tokens([], [])
        ids, trained = (values[:kept] + values[close:] for values in (row.ids, row.trained))
        return Tokens(ids[:length], trained[:length], row.label)

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


def _refuse_one_sided(task: Any) -> None:
    """Refuse what an encoder-decoder cannot learn: text without a prompt, and its own prompts.

    Raises:
        DataError: the task asks for it.
    """
    if task.kind == "text":
        raise DataError(
            "task=completion trains a text from its first token on, and this base is an"
            " encoder-decoder, which answers a prompt. Use task=sft with prompt and completion"
        )
    if task.kind == "conversation" and getattr(task, "train_on", "all") == "everything":
        raise DataError(
            "task.train_on=everything trains the prompts too, which the encoder of an"
            " encoder-decoder reads and never writes. Set task.train_on=all"
        )


def _template_name(task: Any, tokenizer: Any, decoder_start: int | None) -> str | None:
    """Return task.chat_template. Encoder-decoders such as T5 have none and need none."""
    chosen = getattr(task, "chat_template", None)
    plain = chosen is None and decoder_start is not None and tokenizer.chat_template is None
    return "none" if plain else chosen


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
