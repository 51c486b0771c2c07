"""A request's settings, with the names and limits of OpenAI's API.

What would change the answer and is not supported is refused; settings that only name or trace a
request are read and ignored.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config.shown import shown
from trainer.serving.errors import ApiError

MOST_STOPS = 16
MOST_TOP = 20  # likeliest tokens, as OpenAI's limit
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=500)]


class StreamOptions(BaseModel):
    """The end of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored


class Settings(BaseModel):
    """Settings of both endpoints."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 only with echo
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None  # 0 keeps all tokens; vLLM has it, too
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    graft_tokens: bool = False  # each token's text, and whether it was drafted
    # ignored
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else [*(self.stop or [])]

    @property
    def top(self) -> int | None:
        """Return how many likeliest tokens to report; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        """Return whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Format(BaseModel):
    """The form of the answer: only text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatSettings(Settings):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: list[dict[str, Any]] | None = None  # for the template; calls of them are read
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None  # ignored
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: Format | None = None

    @property
    def called(self) -> list[dict[str, Any]]:
        """The tools that an answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = list[Annotated[int, Field(ge=0)]]


class TextSettings(Settings):
    """A request of /v1/completions."""

    prompt: str | Ids | list[str] | list[Ids]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs


Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w./@+:-]+$")]


class LoadSettings(BaseModel):
    """A request of /v1/load_lora_adapter, with vLLM's names. The path is a run, as FOLDER@STEP."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False  # replace the model of this name


class UnloadSettings(BaseModel):
    """A request of /v1/unload_lora_adapter, with vLLM's names."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: Annotated[str, Field(max_length=200)]
    lora_int_id: int | None = None  # ignored


AnySettings = TypeVar("AnySettings", bound=Settings)
AnyModel = TypeVar("AnyModel", bound=BaseModel)


def parse(kind: type[AnySettings], body: bytes) -> AnySettings:
    """Read a request.

    Raises:
        ApiError: it is no JSON, or a setting is unknown or has a wrong value.
    """
    settings = parse_plain(kind, body)
    if isinstance(settings, ChatSettings):
        if settings.top_logprobs is not None and not settings.logprobs:
            raise ApiError(
                400,
                f"top_logprobs={settings.top_logprobs} has no effect without logprobs=true",
                "top_logprobs",
            )
        if settings.max_completion_tokens is not None:
            settings.max_tokens = settings.max_completion_tokens
    if settings.max_tokens == 0 and not (isinstance(settings, TextSettings) and settings.echo):
        raise ApiError(
            400,
            "max_tokens=0: expected at least 1, or /v1/completions with echo=true",
            "max_tokens",
        )
    if settings.stream_options is not None and not settings.stream:
        raise ApiError(400, "stream_options has no effect without stream=true", "stream_options")
    return settings


def parse_plain(kind: type[AnyModel], body: bytes) -> AnyModel:
    """Read JSON as a class's fields.

    Raises:
        ApiError: it is no JSON, or a field is unknown or has a wrong value.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(kind, error) from None


def _explained(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """Return the first fault as a message: the setting, its value, and what was expected."""
    faults = _of_the_nearest_form(error.errors(include_url=False))
    fault = faults[0]
    name = _place(fault)
    if fault["type"] == "json_invalid":
        what = str(fault["msg"]).removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is no JSON: {what}", code="invalid_json")
    if fault["type"] == "model_type":
        return ApiError(400, "the body must be a JSON object")
    if fault["type"] == "missing":
        return ApiError(400, f"{name}: missing", name)
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.6)
        hint = f"Did you mean {close[0]}?" if close else "This server does not support it."
        return ApiError(400, f"{shown(name[:60])}: there is no such setting. {hint}", name[:60])
    value = shown(repr(fault["input"])[:60])
    more = [str(each["msg"]).removeprefix("Input should be ") for each in faults[1:]]
    expected = " or ".join(dict.fromkeys([str(fault["msg"]), *more]))
    expected = expected.replace("Input should be", "expected")
    return ApiError(400, f"{name}={value}: {expected[0].lower()}{expected[1:]}", name)


def _place(fault: Any) -> str:
    """Return the setting of a fault, with the numbers of entries, as prompt.1."""
    # of a union pydantic names the member after the field
    kinds = {"str", "int", "constrained"}
    place = [part for part in fault["loc"] if isinstance(part, int) or part.isidentifier()]
    return ".".join(str(part) for part in place if part not in kinds)


def _of_the_nearest_form(faults: list[Any]) -> list[Any]:
    """Return the faults of the first setting in the form that its value comes nearest to.

    A setting may have several forms, as a text or a list of texts, and pydantic lists the faults of
    each. The nearest form has a value of the right type, or the most entries before the first
    fault. Equally near forms give a fault each.
    """
    forms: dict[str, Any] = {}
    for fault in faults:
        if fault["loc"][:1] == faults[0]["loc"][:1]:
            forms.setdefault(str(fault["loc"][1:2]), fault)

    def nearness(fault: Any) -> tuple[bool, list[int]]:
        entries = [part for part in fault["loc"] if isinstance(part, int)]
        return not fault["type"].endswith("_type"), entries

    nearest = max(map(nearness, forms.values()))
    return [fault for fault in forms.values() if nearness(fault) == nearest]
