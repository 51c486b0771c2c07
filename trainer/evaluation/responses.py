"""A target's own answers to conversations, turn by turn: the target as it is asked, how a token is
drawn, and what an answer becomes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tasks.reading import DataError
from tasks.task import Conversation
from trainer.assembly.build import instantiate
from trainer.assembly.trained import load_trained
from trainer.data.prompts import Ask
from trainer.data.render import Refused, Renderer, stop_ids
from trainer.evaluation.answers import continuations
from trainer.models.base import Base
from trainer.models.precision import compute


@dataclass(frozen=True)
class Speaker:
    """A target with all that its answers depend on."""

    model: Any
    base: Base
    renderer: Renderer
    stops: list[int]
    device: torch.device
    described: dict[str, Any]  # of its weights, for the provenance


def speaker_of(
    options: dict[str, Any],
    plain: dict[str, Any],
    task: Any,
    keeps_template: bool,
    jinja: dict[str, Any],
) -> Speaker:
    """The target. A run is asked with its own task's chat template, unless `keeps_template` says
    that it is with `task`'s.

    Raises:
        as assembly.trained and Base.load; DataError, for a model that writes no text or a template
        option that does nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options["run"] is not None:
        found = load_trained(options["run"], device)
        if found.task.kind == "label":
            raise DataError(f"{found.folder} trained a classifier, which writes no text")
        model, base = found.model, found.base
        about = found.adapted or {}
        weights = {
            "run": about.get("id"),
            "step": about.get("step"),
            "adapter": about.get("sha256"),
        }
        if found.task.kind == "conversation" and not keeps_template:
            task.chat_template = found.task.chat_template
    else:
        base = instantiate(plain["base"])
        computed, _, _ = compute(
            plain["precision"], plain["base"]["dtype"], False, device.type == "cuda"
        )
        model, weights = (
            base.load(computed, None, device).eval(),
            {"run": None, "step": None, "adapter": None},
        )
    renderer = Renderer(base.tokenizer, task)
    renderer.template, renderer.train_on = template_with(renderer.template, jinja), "last"
    example = Conversation(
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}], ""
    )
    try:
        rows = [renderer(example)]  # a template may end answers in a token of its own
    except Refused:
        rows = []
    stops = stop_ids(base.tokenizer, model.generation_config.eos_token_id, rows)  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(getattr(module, "generation_config", None), GenerationConfig):
            module.generation_config = GenerationConfig()  # type: ignore[assignment]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {
        "base": base.fingerprint,
        "quantization": base.quantization,
        "dtype": dtype,
        **weights,
    }
    return Speaker(model, base, renderer, stops, device, weights)


def template_with(
    source: str | dict[str, str] | None, options: dict[str, Any]
) -> str | dict[str, str] | None:
    """The chat template with its options set at its head.

    Raises:
        DataError: there is no template, or it never reads one of them.
    """
    if not options:
        return source
    if source is None:
        raise DataError(f"template.{next(iter(options))}: there is no chat template to give it to")
    whole = source if isinstance(source, str) else "".join(source.values())
    if unread := [name for name in options if name not in whole]:
        raise DataError(f"template.{unread[0]}: the chat template never reads {unread[0]!r}")
    # repr, since Jinja writes its constants as Python does.
    head = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in options.items())
    return (
        head + source
        if isinstance(source, str)
        else {name: head + text for name, text in source.items()}
    )


class Drawn(LogitsProcessor):
    """Leaves of each row's scores the one token that the row's own random number falls on: `u` (B,
    n) in [0, 1), one for each new token.

    The token is the first in order of ids whose cumulative probability exceeds u, so that it is the
    same on every device but where rounding moves that boundary over u.
    """

    def __init__(self, u: Float[np.ndarray, "B n"], prompt: int):
        self.u, self.prompt = u, prompt

    def __call__(
        self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        upto = scores.double().softmax(-1).cumsum(-1)
        at = torch.as_tensor(
            self.u[:, input_ids.shape[1] - self.prompt], device=scores.device
        ).unsqueeze(-1)
        # The sum may end a rounding below 1, and a token without a chance must not be hit at either
        # end.
        whole = upto[:, -1:].contiguous()
        token = torch.minimum(
            torch.searchsorted(upto, at * whole, right=True), torch.searchsorted(upto, whole)
        )
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def drawing(
    options: dict[str, Any], seeds: list[tuple[int, int]], prompt: int
) -> LogitsProcessorList:
    """What turns scores into a choice: nothing where greedy, else temperature, top_k and top_p in
    transformers' order and one draw for each (row, turn)."""
    if options["temperature"] == 0:
        return LogitsProcessorList()
    made: list[LogitsProcessor] = [TemperatureLogitsWarper(options["temperature"])]
    if options["top_k"]:
        made.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        made.append(TopPLogitsWarper(options["top_p"]))
    u = np.stack(
        [
            np.random.default_rng([options["seed"], row, turn]).random(options["max_new_tokens"])
            for row, turn in seeds
        ]
    )
    return LogitsProcessorList([*made, Drawn(u, prompt)])


@torch.no_grad()
def answers(
    speaker: Speaker,
    prompts: list[list[int]],
    seeds: list[tuple[int, int]],
    options: dict[str, Any],
) -> list[list[int]]:
    """The ids of an answer to each prompt, with the token that ended it, which one that was cut
    lacks."""
    choose = drawing(options, seeds, max(map(len, prompts)))
    pad = speaker.base.tokenizer.pad_token_id
    found = continuations(
        speaker.model,
        prompts,
        pad,
        speaker.stops,
        options["max_new_tokens"],
        speaker.device,
        choose,
    )
    ends = ([i for i, token in enumerate(ids) if token in speaker.stops] for ids in found)
    return [ids[: end[0] + 1] if end else ids for ids, end in zip(found, ends, strict=True)]


@dataclass
class _Talk:
    """A conversation on its way: what is written, what stands before the next answer, and what
    comes after it."""

    ask: Ask
    rest: list[dict[str, Any]]
    # up to the last answer of the target's
    written: list[dict[str, Any]] = field(default_factory=list)
    given: list[dict[str, Any]] = field(default_factory=list)
    # where in `written` each ends, and its marks
    answers: list[tuple[int, dict[str, bool]]] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)

    def advance(self) -> bool:
        """Go to the next answer; False where there is none."""
        self.given = list(
            itertools.takewhile(lambda message: message["content"] is not None, self.rest)
        )
        self.rest = self.rest[len(self.given) :]
        return bool(self.rest)

    def example(self, text: str) -> Conversation:
        """The conversation with this as its last answer."""
        messages = [*self.written, *self.given, {"role": "assistant", "content": text}]
        return Conversation(messages, self.ask.where, self.ask.tools)

    def lines(self, each: bool) -> list[dict[str, Any]]:
        """Of rows.jsonl, for each answer or for all together; or of left_out.jsonl, with a `why`,
        where the target wrote nothing."""
        tools = {"tools": self.ask.tools} if self.ask.tools else {}
        if not self.answers:
            return [{"row": self.ask.row, **self.ended, "messages": self.given, **tools}]
        if not each:
            marks = {name: True for _, found in self.answers for name in found}
            return [{"messages": self.written, **tools, "row": self.ask.row, **marks}]
        return [
            {
                "messages": self.written[:end],
                **tools,
                "row": self.ask.row,
                "answer": number,
                "of": len(self.answers),
                **marks,
            }
            for number, (end, marks) in enumerate(self.answers, 1)
        ]


def respond(speaker: Speaker, batch: list[Ask], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of rows.jsonl, and those of left_out.jsonl, which have a `why`, of some
    conversations.

    A conversation ends where an answer is empty, cut, has no room or is refused: what was answered
    before stays.
    """
    talks = [_Talk(ask, list(ask.messages)) for ask in batch]
    open_ = talks
    for turn in itertools.count():
        open_ = [talk for talk in open_ if not talk.ended and talk.advance()]
        prompts = [_prompt(speaker, talk, options["max_new_tokens"]) for talk in open_]
        open_, prompts = (
            [talk for talk in open_ if not talk.ended],
            [prompt for prompt in prompts if prompt],
        )
        if not open_:
            return [line for talk in talks for line in talk.lines(options["per"] == "answer")]
        said = answers(speaker, prompts, [(talk.ask.row, turn) for talk in open_], options)
        for talk, prompt, ids in zip(open_, prompts, said, strict=True):
            _take(speaker, talk, prompt, ids, options["cut"] == "drop")
    raise AssertionError


def _prompt(speaker: Speaker, talk: _Talk, more: int) -> list[int]:
    try:
        prompt = speaker.renderer.prompt(talk.example(""))
    except Refused as refusal:
        talk.ended = {"why": "refused", "reason": str(refusal)}
        return []
    if not prompt:
        talk.ended = {"why": "refused", "reason": "the prompt is empty"}
    elif len(prompt) + more > speaker.base.longest:
        talk.ended = {"why": "long"}
        return []
    return prompt


def _take(speaker: Speaker, talk: _Talk, prompt: list[int], ids: list[int], drops: bool) -> None:
    """Put an answer into its conversation."""
    text = speaker.base.tokenizer.decode(ids, skip_special_tokens=True)
    cut = ids[-1] not in speaker.stops
    if not text.strip() or (cut and drops):
        talk.ended = {"why": "cut" if text.strip() else "empty"}
        return
    example = talk.example(text)
    exact = _same(speaker, example, prompt + ids)
    talk.written, talk.given, talk.rest = example.messages, [], talk.rest[1:]
    talk.answers.append(
        (
            len(talk.written),
            {**({} if exact else {"inexact": True}), **({"cut": True} if cut else {})},
        )
    )
    if cut:
        talk.ended = {"why": "cut"}


def _same(speaker: Speaker, example: Conversation, ids: list[int]) -> bool:
    """Whether training on the text is training on the tokens that were generated."""
    try:
        return speaker.renderer(example).ids[: len(ids)] == ids
    except Refused:
        return False
