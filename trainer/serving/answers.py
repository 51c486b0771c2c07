"""Responses of the two endpoints, whole or as the pieces of a stream.

Next to OpenAI's fields a response has `graft`: passes of the model, seconds, and drafted tokens;
with graft_tokens=true the answer's tokens, each with `drafted`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import Any

from trainer.decoding.streaming import Token
from trainer.serving import tool_calls
from trainer.serving.events import End, Piece, Placed, Usage
from trainer.serving.models import Served
from trainer.serving.requests import ChatSettings, Settings


class Answer:
    """Builds the response to one request."""

    def __init__(self, model: Served, settings: Settings):
        self.model, self.settings = model, settings
        self.chat = isinstance(settings, ChatSettings)
        # With tools the text of a stream waits for its end: a call is known as a whole only.
        self.tools = settings.called if isinstance(settings, ChatSettings) else []
        self.held = ""
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": "base" if model.step is None else f"{model.name}-{model.step}",
        }

    def whole(self, answers: Sequence[tuple[Sequence[Piece], End]]) -> dict[str, Any]:
        """Return the response of a request that does not stream: a choice for each prompt."""
        kind = "chat.completion" if self.chat else "text_completion"
        cost = total([end.usage for _, end in answers])
        written = [
            placed
            for pieces, _ in answers
            for piece in pieces
            if not piece.echo
            for placed in piece.tokens
        ]
        return {
            **self.head,
            "object": kind,
            "choices": [self._choice(i, *answer) for i, answer in enumerate(answers)],
            "usage": usage(cost),
            "graft": self._facts(cost, written),
        }

    def _choice(self, index: int, pieces: Sequence[Piece], end: End) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [placed for piece in pieces for placed in piece.tokens]
        choice: dict[str, Any] = {"index": index, "finish_reason": end.reason}
        if self.chat:
            content, written = self._calls(text)
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
            if written:
                choice["message"]["tool_calls"] = written
                choice["finish_reason"] = "tool_calls"
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(tokens)
        return choice

    def first(self) -> Iterator[dict[str, Any]]:
        """Yield what a stream begins with."""
        if self.chat:
            yield self._chunk({"role": "assistant", "content": ""}, None, None)

    def piece(self, piece: Piece, index: int = 0) -> dict[str, Any]:
        """Return a piece of the stream, of the choice `index`."""
        text = piece.text
        if self.tools:
            self.held, text = self.held + text, ""
        delta = {"content": text} if self.chat else text
        chunk = self._chunk(delta, self._logprobs(piece.tokens), None, index)
        if self.settings.graft_tokens:
            chunk["graft"] = self._facts(piece.usage, [] if piece.echo else piece.tokens)
        return chunk

    def last(self, end: End, index: int = 0) -> Iterator[dict[str, Any]]:
        """Yield what a choice of a stream ends with."""
        reason = end.reason
        if self.tools:
            content, written = self._calls(self.held)
            if content:
                yield self._chunk({"content": content}, None, None)
            if written:
                numbered = [{"index": index, **call} for index, call in enumerate(written)]
                yield self._chunk({"tool_calls": numbered}, None, None)
                reason = "tool_calls"
        yield self._chunk({} if self.chat else "", None, reason, index) | {
            "graft": self._facts(end.usage, [])
        }

    def cost(self, ends: Sequence[End]) -> Iterator[dict[str, Any]]:
        """Yield the usage of a stream, after all choices, if it was asked for."""
        if self.settings.with_usage:
            chunk = self._chunk("", None, None)
            yield chunk | {"choices": [], "usage": usage(total([end.usage for end in ends]))}

    def _calls(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Return the content of an answer, None for nothing but calls, and its calls."""
        if not self.tools:
            return text, []
        content, read = tool_calls.calls(text, self.tools)
        written = [
            {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call}
            for call in read
        ]
        return content if content or not written else None, written

    def _chunk(
        self, delta: Any, logprobs: Any, reason: str | None, index: int = 0
    ) -> dict[str, Any]:
        choice = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        choice["delta" if self.chat else "text"] = delta
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = {**self.head, "object": kind, "choices": [choice]}
        return chunk | {"usage": None} if self.settings.with_usage else chunk

    def _facts(self, cost: Usage, tokens: Sequence[Placed]) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "tokens": cost.tokens,
            "passes": cost.passes,
            "drafted": cost.drafted,
            "accepted": cost.accepted,
            "seconds": round(cost.seconds, 4),
        }
        if self.settings.graft_tokens:
            facts["answer"] = [
                {
                    "id": placed.token.id,
                    "text": self.model.texts(placed.token.id)[0],
                    "offset": placed.offset,
                    "drafted": placed.token.drafted,
                }
                for placed in tokens
            ]
        return facts

    def _logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any] | None:
        if self.settings.top is None:
            return None
        return self._chat_logprobs(tokens) if self.chat else self._text_logprobs(tokens)

    def _chat_logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        def one(token: int, logprob: float | None) -> dict[str, Any]:
            text, codes = self.model.texts(token)
            return {"token": text, "logprob": logprob, "bytes": codes}

        content = [
            one(placed.token.id, placed.token.logprob)
            | {"top_logprobs": [one(*pair) for pair in placed.token.top]}
            for placed in tokens
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        def name(token: int) -> str:
            text, codes = self.model.texts(token)
            if "�" not in text:
                return text
            return "bytes:" + "".join(f"\\x{code:02x}" for code in codes)

        def top(token: Token) -> dict[str, float] | None:
            if token.logprob is None:  # the first token of a prompt follows nothing
                return None
            likeliest: dict[str, float] = {}
            # the token itself is always there, as in OpenAI's API; of equal names the likelier one
            for id_, logprob in (*token.top, (token.id, token.logprob)):
                likeliest.setdefault(name(id_), logprob)
            return likeliest

        return {
            "tokens": [name(placed.token.id) for placed in tokens],
            "token_logprobs": [placed.token.logprob for placed in tokens],
            "top_logprobs": [top(placed.token) for placed in tokens],
            "text_offset": [placed.offset for placed in tokens],
        }


def total(costs: Sequence[Usage]) -> Usage:
    """Return the cost of several answers together."""
    return Usage(*(sum(parts) for parts in zip(*map(astuple, costs), strict=True)))


def usage(cost: Usage) -> dict[str, Any]:
    """Return the usage as OpenAI counts it. Drafted tokens are its predicted ones."""
    return {
        "prompt_tokens": cost.prompt_tokens,
        "completion_tokens": cost.tokens,
        "total_tokens": cost.prompt_tokens + cost.tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": cost.accepted,
            "rejected_prediction_tokens": cost.drafted - cost.accepted,
        },
    }


def event(content: dict[str, Any] | str) -> bytes:
    """Return one server-sent event. JSON escapes line breaks, so a text cannot begin another."""
    text = content if isinstance(content, str) else json.dumps(content)
    return f"data: {text}\n\n".encode()


def listed(models: dict[str, Served], created: int) -> list[dict[str, Any]]:
    """Return the entries of /v1/models."""
    return [
        {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "graft",
            "root": model.of,
            "parent": None if model.step is None else "base",
            "max_model_len": model.longest,
            "graft": {"kind": model.kind, "step": model.step, "drafts": model.drafts},
        }
        for model in models.values()
    ]
