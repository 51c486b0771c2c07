"""A chat template: what it can show, and conversations in the form that it reads.

Templates disagree on the form of the same fact: arguments of calls as an object or as JSON text,
content as text or as a list of parts. Rendering a probe once shows what a template takes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from tasks.messages import THOUGHTS, parsed
from tasks.reading import DataError
from trainer.config import limits
from trainer.data.lost import LINKS
from trainer.models.tiny import CHATML
from trainer.storage.run_folder import MORE_TEMPLATES, TEMPLATE

Span = tuple[int, int]
RENDERED_WITHIN = 10.0  # processor seconds for one row: a template may come from a stranger
# Variables that the renderer sets, so that a row's chat_template_kwargs must not.
_OWN = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}


# of a template that prints a list of parts as Python or JSON writes it
_PRINTED = re.compile(r"""["']type["']:""", re.IGNORECASE)
_DATE = re.compile(r"""strftime_now\(\s*(?:"([^"\\\n]*)"|'([^'\\\n]*)')\s*\)""")


class Refused(ValueError):
    """A row cannot be rendered exactly. The message is the reason."""


class ChatTemplate:
    """One Jinja source. `special` are the texts of special tokens, which templates name,
    `variables` are given to every row, and `ends` are the texts that may end an answer. `day` is
    what `strftime_now` writes, by default today.

    Raises:
        DataError: the template could compute forever.
    """

    def __init__(
        self,
        source: str,
        special: dict[str, Any],
        variables: dict[str, Any],
        ends: Iterable[str] = (),
        day: date | None = None,
    ):
        refuse_powers(source)
        self.ends = tuple(end for end in ends if end)
        self.source, self.special, self.variables = source, special, variables
        self.marks = has_markers(source)
        self.words = set(re.findall(r"\w+", source))
        # A template that writes calls and takes roles as they are knows the results of calls, too.
        roles = ("tool", "ipython", "observation")
        self.knows_tool = "tool_calls" in self.words or any(
            f"{quote}{role}{quote}" in source for role in roles for quote in "'\""
        )
        # of a template that writes the date, as Llama 3.2's
        self.day = (day or date.today()) if "strftime_now" in self.words else None
        if self.day is not None and day is not None:
            self.source = _DATE.sub(partial(_written, day), source)
        bos = special.get("bos_token")
        self.bos = bos if isinstance(bos, str) and bos else None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        variables: dict[str, Any],
        prompt: bool = False,
        markers: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and with `markers` the spans that the template marks.
        `prompt` adds what the template writes before an answer.

        Raises:
            Refused: the template raises an error.
            DataError: it computes for too long.
        """
        return self._jinja(self.adapted(messages), tools, variables, prompt, markers)

    def _jinja(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        variables: dict[str, Any],
        prompt: bool = False,
        markers: bool = False,
    ) -> tuple[str, list[Span]]:
        if taken := _OWN & (self.variables.keys() | variables.keys()):
            raise Refused(f"chat_template_kwargs sets {', '.join(sorted(taken))}: leave it out")
        try:
            with limits.limited(RENDERED_WITHIN, "rendering a row"):
                texts: Any = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=markers,
                    add_generation_prompt=prompt,
                    **(self.special | self.variables | variables),
                )
        except limits.LimitExceeded as error:  # each further row would take as long
            raise DataError(f"the chat template cannot be used: {error}") from None
        except Exception as error:
            what = (
                "write the system text into the first user message"
                if "ystem" in str(error)
                else ("change the row")
            )
            raise Refused(
                f"the chat template refuses it: {error}. Fix: {what}, or choose another template"
                " (task.chat_template)"
            ) from None
        text = texts[0][0]
        spans = [(start, end) for start, end in texts[1][0]] if markers else []
        # A text of the row may bring the first token that the template writes, too.
        if self.bos is not None and text.startswith(2 * self.bos):
            cut = len(self.bos)
            return text[cut:], [(max(0, start - cut), end - cut) for start, end in spans]
        return text, spans

    def adapted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in the form that the template reads."""
        return [self._adapted(message) for message in messages]

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        result = dict(message)
        if message["role"] == "developer" and "developer" not in self.words:
            result["role"] = "system"
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [self._call(call) for call in calls]
        parts = []
        if (thought := message.get("reasoning_content")) is not None:
            if self.takes_thoughts_in_parts:
                parts = [{"type": "thinking", "thinking": thought}]
            else:
                result |= {name: thought for name in THOUGHTS if name in self.words}
        if (parts or self.takes_parts) and isinstance(message.get("content"), str):
            result["content"] = [*parts, {"type": "text", "text": message["content"]}]
        return result

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        arguments = function["arguments"]
        if self.takes_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.takes_text:
            arguments = parsed(arguments, "arguments")
        return call | {"function": function | {"arguments": arguments}}

    def unread(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[str]:
        """Return the keys of messages, and the variables, that the template does not name."""
        keys = {key for message in messages for key in message} - LINKS - self.words
        unknown = variables.keys() - self.words
        return sorted(
            [f"message key {key!r}" for key in keys]
            + [f"chat_template_kwargs {name!r}" for name in unknown]
        )

    @cached_property
    def takes_text(self) -> bool:
        """Return whether the template takes the arguments of calls as JSON text."""
        text = '{"probe_key": "probe value"}'
        as_object = self._probe(_called(json.loads(text)))
        as_text = self._probe(_called(text))
        if as_object is None:
            return as_text is not None
        # Python's way of writing a mapping: the template prints what it gets.
        printed = str(json.loads(text)) in as_object
        return printed and as_text is not None and text in as_text

    @cached_property
    def takes_parts(self) -> bool:
        """Return whether the template shows content only as a list of parts."""
        words = ["zq1", "zq2"]
        if _all_in(words, self._probe(_chat(*words))):
            return False
        parts = [[{"type": "text", "text": word}] for word in words]
        shown = self._probe(_chat(*parts))
        return _all_in(words, shown) and not _PRINTED.search(shown or "")

    @cached_property
    def takes_thoughts_in_parts(self) -> bool:
        """Return whether the template shows reasoning only as a part of the content."""
        if "thinking" not in self.words:
            return False
        question, answer = _chat("zq1", "zq2")
        if _all_in(["zq3"], self._probe([question, answer | dict.fromkeys(THOUGHTS, "zq3")])):
            return False
        thought = {"type": "thinking", "thinking": "zq3"}
        answer["content"] = [thought, {"type": "text", "text": "zq2"}]
        shown = self._probe([question, answer])
        return _all_in(["zq2", "zq3"], shown) and not _PRINTED.search(shown or "")

    @cached_property
    def rewrites(self) -> bool:
        """Return whether an answer reads differently once other turns follow it, does not begin as
        the generation prompt does, or is marked together with what that prompt supplies."""
        chat = [
            *_chat("zq1", "<think>\nzq2\n</think>\n\nzq3"),
            *_chat("zq4", "<think>\nzq5\n</think>\n\nzq6"),
            *_chat("zq7", "zq8"),
            *_chat("zq9", "zq0"),
        ]
        whole = self._probe(self.adapted(chat))
        for index in range(1, len(chat), 2):
            before = self._probe(self.adapted(chat[:index]), True)
            upto = self._probe(self.adapted(chat[: index + 1]))
            if whole is None or before is None or upto is None:
                return True
            if not (whole.startswith(before) and whole.startswith(upto)):
                return True
            if self.marks and self._marked_from(chat[: index + 1]) < len(before):
                return True
        return False

    def _marked_from(self, chat: list[dict[str, Any]]) -> int:
        """Return where the last span that the template marks begins."""
        spans = self._jinja(self.adapted(chat), None, {}, markers=True)[1]
        return spans[-1][0] if spans else 0

    def _probe(self, messages: list[dict[str, Any]], prompt: bool = False) -> str | None:
        try:
            return self._jinja(messages, None, {}, prompt)[0]
        except Refused:
            return None


def _written(day: date, call: re.Match[str]) -> str:
    """Return a template's call of strftime_now as the text that it writes on a day."""
    return repr(day.strftime(call[1] or call[2] or ""))


def use_day(content: dict[str, Any], task: Any) -> None:
    """Let a task's chat template write the day of the run's first start as today's, where it writes
    the date: the rows are then the same on every day. `content` is that of run.yaml."""
    starts = content.get("starts") or [{}]
    with contextlib.suppress(ValueError):
        task.day = date.fromisoformat(str(starts[0].get("time"))[:10])


def template(chosen: str | None, tokenizer: Any) -> str | dict[str, str] | None:
    """Return the Jinja text that `task.chat_template` names, None if prompt and answer are joined
    without one. Next to a chat_template.jinja there may be others by name, as transformers and runs
    write them.

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
        more = sorted((file.parent / MORE_TEMPLATES).glob("*.jinja"))
        if file.name != TEMPLATE or not more:
            return file.read_text("utf-8")
        return {"default": file.read_text("utf-8")} | {
            other.stem: other.read_text("utf-8") for other in more
        }
    if tokenizer.chat_template is None:
        raise DataError(
            "the base's tokenizer has no chat template. Set task.chat_template=chatml, or to a"
            " Jinja file, or to none (prompt and answer joined as they are)"
        )
    return tokenizer.chat_template


def _chat(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _called(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "probe", "arguments": arguments}
    call = {"id": "probe0000", "type": "function", "function": function}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [{"role": "user", "content": "probe"}, answer]


def _all_in(words: list[str], text: str | None) -> bool:
    return text is not None and all(word in text for word in words)


def with_defaults(source: str | dict[str, str], variables: dict[str, Any]) -> str | dict[str, str]:
    """Return a template, or several, in which `variables` hold where a caller does not set them: a
    model that was trained with them is then served with them."""
    if isinstance(source, dict):
        return {name: str(with_defaults(text, variables)) for name, text in source.items()}
    lines = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in variables.items()
    )
    return "".join(lines) + source


def has_markers(source: str) -> bool:
    """Return whether a template marks the text that the model generates."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


def refuse_powers(source: str) -> None:
    """Raise DataError for a template with a power or a `round`.

    9**9**9 is a single operation, which no time limit can interrupt, and it is computed when the
    template is compiled. `round` computes powers of 10.
    """
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
