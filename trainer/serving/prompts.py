"""A request's token ids, and how its answer is decoded."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks import messages as chats
from tasks.reading import DataError
from tasks.task import Conversation
from trainer.config.errors import PANIC, panicked
from trainer.data.chat_template import Refused
from trainer.data.encoding import continued_ids
from trainer.decoding.sampling import Sampling
from trainer.serving.errors import ApiError
from trainer.serving.models import Served
from trainer.serving.requests import ChatSettings, Settings, TextSettings


@dataclass(frozen=True)
class Prompt:
    """The input that the worker decodes."""

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    repeats: bool  # whether the same request has to give the same text
    ends: tuple[str, ...]  # texts that end the answer
    top: int | None  # likeliest tokens to report; None for no log-probabilities
    continues: bool = False  # whether the answer continues the text of `ids`
    echo: bool = False  # whether the response begins with the prompt
    text: str | None = None  # the prompt as the client wrote it, if that is a text


def find(models: dict[str, Served], name: str) -> Served:
    """Return a model by its name.

    Raises:
        ApiError: there is none.
    """
    if name not in models:
        raise ApiError(
            404,
            f"model={name[:100]!r}: there is no such model. Known: {', '.join(models)}",
            "model",
            "model_not_found",
        )
    return models[name]


def prompts(model: Served, settings: Settings, default_tokens: int) -> list[Prompt]:
    """Return a request as the worker decodes it: one prompt for each choice of the response.

    Raises:
        ApiError: the chat or a prompt cannot be used, or does not fit into the model.
    """
    # drawn here, so that one request's draws do not depend on those before
    seed = settings.seed if settings.seed is not None else secrets.randbits(63)
    if isinstance(settings, ChatSettings):
        return [_prompt(model, settings, default_tokens, seed, None)]
    assert isinstance(settings, TextSettings)
    prompt = settings.prompt
    one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
    several: Sequence[Any] = [prompt] if one else prompt
    return [_prompt(model, settings, default_tokens, seed, text) for text in several]


def _prompt(
    model: Served,
    settings: Settings,
    default_tokens: int,
    seed: int,
    text: str | Sequence[object] | None,
) -> Prompt:
    setting = "messages" if isinstance(settings, ChatSettings) else "prompt"
    try:
        ids = _chat_ids(model, settings) if text is None else _text_ids(model, text)
    except Refused as error:
        raise ApiError(400, str(error), setting) from None
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise ApiError(400, panicked(error), setting) from None
    if not ids:
        raise ApiError(
            400, "the prompt is empty, and this model starts from at least one token", setting
        )
    temperature = 1.0 if settings.temperature is None else settings.temperature
    sampling = Sampling(temperature, settings.top_p or 1.0, settings.top_k or 0, seed)
    return Prompt(
        ids,
        _room(model, len(ids), settings.max_tokens, default_tokens, setting),
        sampling,
        settings.seed is not None and temperature > 0,
        (*model.stops.texts, *settings.stops),
        settings.top,
        text is not None,
        isinstance(settings, TextSettings) and bool(settings.echo),
        text if isinstance(text, str) else None,
    )


def _text_ids(model: Served, text: str | Sequence[object]) -> list[int]:
    if isinstance(text, str):
        return continued_ids(model.tokenizer, text)
    ids = [item for item in text if isinstance(item, int)]
    if largest := max((i for i in ids if i >= model.target.config.vocab_size), default=0):
        raise ApiError(
            400,
            f"prompt has the token {largest}, expected ids below {model.target.config.vocab_size}",
            "prompt",
        )
    return ids


def _chat_ids(model: Served, settings: Settings) -> list[int]:
    assert isinstance(settings, ChatSettings)
    if model.kind != "chat":
        raise ApiError(
            400,
            f"model={model.name} was trained on plain text: use /v1/completions",
            "model",
        )
    try:
        messages = [chats.message(item, number) for number, item in enumerate(settings.messages, 1)]
        tools = None if settings.tool_choice == "none" else chats.tools(settings.tools)
        variables = settings.chat_template_kwargs or {}
        answer = {"role": "assistant", "content": ""}
        chat = Conversation([*messages, answer], "chat", tools, variables=variables)
        return model.renderer.prompt(chat)
    except (DataError, Refused) as error:
        raise ApiError(400, str(error), "messages") from None


def _room(model: Served, length: int, limit: int | None, default: int, setting: str) -> int:
    """Return how many tokens the answer may have. `setting` holds the prompt.

    Raises:
        ApiError: the model has no room for that many.
    """
    room = model.longest - length
    if room < (1 if limit is None else limit):
        answer = f" and max_tokens={limit}" if limit else ""
        raise ApiError(
            400,
            f"the prompt has {length} tokens{answer}, and {model.name} takes {model.longest}"
            " tokens of prompt and answer together: shorten the prompt"
            + (" or lower max_tokens" if room > 0 else ""),
            setting,
            "context_length_exceeded",
        )
    return min(default, room) if limit is None else limit
