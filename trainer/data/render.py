"""From an example to token ids, and to the exact set of those that are trained.

The chat template renders a conversation to one text, or to several where it writes earlier answers
differently from those at inference (trainer.data.turns). The spans of the answers in a text are
checked token by token: the prompt tokenised alone, as it will be when the model answers, must give
the first tokens of the whole. A row that fails this check is refused with the reason; nothing ever
falls back to training on everything. A field of a row that its text lacks is an error, or counted
(trainer.data.lost).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from tasks.reading import Bad, DataError
from tasks.task import Conversation, Example, Labelled, Text
from trainer.data.chat_template import ChatTemplate, Refused, Span, template
from trainer.data.encoding import Encoder, embedded, pair_ids, plain_ids
from trainer.data.lost import explained, lost
from trainer.data.tokens import Rendered, Tokens
from trainer.data.turns import Turn, turns
from trainer.models.base import BaseError

TAILS = 1000  # ends of prompts whose tokens are cached; most templates have one


class Renderer:
    """Turns examples into Tokens, for one tokenizer, template and `train_on`.

    With `decoder_start` (Base.decoder_start) a conversation becomes a pair: what the encoder reads,
    which is not trained, and then what the decoder writes, which is.

    Raises:
        DataError: there is no chat template, which conversations need, or it cannot be used.
        BaseError: the tokenizer has no end token, and the model would write text; or it does not
            say where in a text its tokens are, which a chat template needs.
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
        self.on_lost = getattr(task, "on_lost", "error")
        self.may_lose = hasattr(task, "on_lost")
        self.variables = dict(getattr(task, "chat_template_kwargs", None) or {})
        self.day = getattr(task, "day", None)  # that of the run, where it has started
        labels = task.labels if task.kind == "label" else []
        self.labels = {label: index for index, label in enumerate(labels)}
        self.special = dict(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder
        self.ends = set(tokenizer.all_special_ids) | {
            index for index, token in added.items() if token.special
        }
        # The tokenizer splits a text at these tokens first, so the texts before and after one are
        # tokenised independently. Without any of them, prompts are tokenised whole.
        self.anchors = {
            index: token.content
            for index, token in added.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        self._tails: dict[str, list[int]] = {}
        self._encode = Encoder(tokenizer)
        # by identity: an example, and its texts or the reason why it has none
        self._prepared: dict[int, tuple[Example, list[Turn] | Refused]] = {}
        self.use(
            template(_template_name(task, tokenizer, decoder_start), tokenizer)
            if task.kind == "conversation"
            else None
        )

    def use(self, chosen: str | dict[str, str] | None) -> None:
        """Take another chat template: its Jinja text, several by name, or None to join prompt and
        answer as they are.

        Raises:
            BaseError: there is one, and the tokenizer does not say where in a text its tokens are.
        """
        if chosen is not None and not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise BaseError(
                f"the tokenizer of {self.tokenizer.name_or_path} is {kind}, which does not say"
                " where in a text its tokens are, so a chat template's answers cannot be found. Set"
                " task.chat_template=none, or give a base with a tokenizer.json"
            )
        self.template = chosen
        sources = chosen if isinstance(chosen, dict) else {"default": chosen}
        added = self.tokenizer.added_tokens_decoder
        ends = [token.content for index, token in added.items() if index in self.ends]
        self.templates = {
            name: ChatTemplate(source, self.special, self.variables, ends, self.day)
            for name, source in sources.items()
            if source is not None
        }

    def __call__(self, example: Example) -> Tokens:
        """Return the last sequence of `render`: the one that ends in the last trained answer."""
        return self.render(example).sequences[-1]

    def prepare(self, examples: Iterable[Example | Bad]) -> None:
        """Tokenise the texts of the conversations that will be rendered next in one call."""
        self._prepared.clear()
        texts: list[str] = []
        for example in examples:
            if not isinstance(example, Conversation):
                continue
            if (chosen := self._template_for(example.tools)) is None:
                continue
            try:
                rendered = turns(chosen, example, self.train_on)
            except (Refused, RecursionError) as refusal:
                self._prepared[id(example)] = example, Refused(str(refusal))
                continue
            texts += [turn.text for turn in rendered]
            self._prepared[id(example)] = example, rendered
        self._encode.ahead(texts)

    def render(self, example: Example) -> Rendered:
        """Return all tokens of an example, without a limit on their number.

        Raises:
            Refused: the row cannot be rendered, the spans of its answers are not exact, or, with
                on_lost=error, the template leaves something out.
        """
        if isinstance(example, Labelled):
            label, values = self._target(example.label)
            if example.second is not None:
                texts = (example.text, example.second)
                ids, types = pair_ids(self.tokenizer, texts)
            else:
                texts, types = None, None
                ids = plain_ids(self.tokenizer, example.text)
            nothing = [False] * len(ids)
            return Rendered([Tokens(ids, nothing, label, example.weight, values, types, texts)])
        if isinstance(example, Text):
            ids = plain_ids(self.tokenizer, example.text)
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            return Rendered([Tokens(ids, [True] * len(ids), weight=example.weight)])
        chosen = self._template_for(example.tools)
        if self.decoder_start is not None:
            self._check_pair(example)
        if chosen is None:
            text = "".join(m["content"] for m in example.messages)
            answers = {i for i, m in enumerate(example.messages) if m["role"] == "assistant"}
            missing = self._lost(example, [Turn(text, [], len(example.messages), answers)], None)
            return Rendered([self._plain(example)], missing, [*example.unread])
        _, parts = self._prepared.pop(id(example), (example, None))
        if isinstance(parts, Refused):
            raise parts
        parts = turns(chosen, example, self.train_on) if parts is None else parts
        missing = self._lost(example, parts, chosen)
        rows = []
        for part in parts:
            ids, trained = self._aligned(part.text, part.spans)
            if self.train_on == "everything":
                trained = [True] * len(ids)
            if self.decoder_start is not None and any(trained):  # it writes nothing after that
                end = len(ids) - trained[::-1].index(True)
                ids, trained = ids[:end], trained[:end]
            rows.append(Tokens(ids, trained, weight=example.weight))
        unread = [*example.unread, *chosen.unread(example.messages, example.variables)]
        return Rendered(rows, missing, unread)

    def _lost(
        self, example: Conversation, parts: list[Turn], chosen: ChatTemplate | None
    ) -> list[str]:
        """Return the kinds of fields that are not in the texts of a row.

        Raises:
            Refused: there are some, and on_lost=error.
        """
        fields: dict[str, str] = {}
        for part in parts:
            messages = example.messages[: part.end]
            # Of the last one only: the others have fewer messages, and the same tools.
            tools = example.tools if part is parts[-1] else None
            fields |= lost(messages, tools, part.text, part.trained, part.places)
        if chosen is not None and not chosen.knows_tool:
            fields |= {
                f"message {i} (tool), since it knows no such role": "role tool"
                for i, message in enumerate(example.messages, 1)
                if message["role"] == "tool"
            }
        if fields and self.on_lost == "error":
            raise Refused(explained(fields, chosen is None, self.may_lose))
        return sorted(set(fields.values()))

    def prompt(self, example: Conversation) -> list[int]:
        """Return the ids after which the last answer is generated."""
        before = example.messages[:-1]
        chosen = self._template_for(example.tools)
        if chosen is None:
            return plain_ids(self.tokenizer, "".join(m["content"] for m in before))
        text, _ = chosen.render(before, example.tools, example.variables, prompt=True)
        return self._encode(text)[0]

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
        answer = self._answer(example.messages[-1]["content"])
        learns_prompt = self.train_on == "everything"
        learns_answer = learns_prompt or len(example.messages) - 1 not in example.untrained
        return Tokens(
            prompt + answer,
            [learns_prompt] * len(prompt) + [learns_answer] * len(answer),
            weight=example.weight,
        )

    def _target(self, label: str | float | list[str]) -> tuple[int, list[float] | None]:
        """Return (the index of a class, None), or -1 and one number for each output: a number
        itself, or 1 for each class of a list and 0 for the others."""
        if isinstance(label, str):
            return self.labels[label], None
        if isinstance(label, list):
            return -1, [float(name in label) for name in self.labels]
        return -1, [label]

    def _answer(self, text: str) -> list[int]:
        """Return the ids of an answer that follows no template, with the end token."""
        end = self.tokenizer.eos_token_id
        if self.decoder_start is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return [*embedded(self.tokenizer, ids), end]
        ids = embedded(self.tokenizer, self.tokenizer(text_target=text)["input_ids"])
        if ids[:1] == [self.decoder_start]:  # the batch puts it before every answer
            ids = ids[1:]
        return ids if ids[-1:] == [end] else [*ids, end]

    def _check_pair(self, example: Conversation) -> None:
        answers = sum(message["role"] == "assistant" for message in example.messages)
        if answers > 1 and (self.train_on != "last" or self.template is None):
            raise Refused(
                f"it has {answers} answers, and an encoder-decoder writes one. Use train_on=last"
                " with a chat template, which puts the earlier ones into the prompt"
            )

    def cut(self, row: Tokens, length: int) -> Tokens:
        """Return a longer row cut to `length` tokens. A text that is written loses its end. A pair
        loses the end of its prompt, and a labelled text its own end; the special tokens that close
        them stay. Of a pair of texts the longer one loses its end, as the tokenizer does it by
        truncation=longest_first. Nothing is left of a pair whose prompt came from a template, or
        would be gone.

        Raises:
            DataError: `length` leaves no room for two texts.
        """
        if row.texts is not None:
            ids, types = pair_ids(self.tokenizer, row.texts, length)
            return replace(row, ids=ids, trained=[False] * len(ids), types=types)
        if self.kind != "label" and self.decoder_start is None:
            return replace(row, ids=row.ids[:length], trained=row.trained[:length])
        end = row.trained.index(True) if any(row.trained) else len(row.ids)
        close = end
        while close > 1 and row.ids[close - 1] in self.ends:
            close -= 1
        keep = max(0, close - (len(row.ids) - length))
        if self.kind != "label" and (self.template is not None or keep == 0):
            return Tokens([], [])
        ids = row.ids[:keep] + row.ids[close:]
        trained = row.trained[:keep] + row.trained[close:]
        return replace(row, ids=ids[:length], trained=trained[:length])

    def _template_for(self, tools: Any) -> ChatTemplate | None:
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        return self.templates.get("default")

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
