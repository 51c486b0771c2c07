"""A target's own answers to conversations, turn by turn: the target with its prompt format, the
drawing of tokens, and the rows that answers become."""

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
from trainer.config.answer_options import AnswerOptions, DrawingOptions
from trainer.data.chat_template import Refused
from trainer.data.ends import of_template, stop_set
from trainer.data.prompts import PromptRow
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.evaluation.answers import continuations
from trainer.models.base import Base
from trainer.models.precision import compute
from trainer.storage.progress import Progress


@dataclass(frozen=True)
class Responder:
    """A target with everything that its answers depend on."""

    model: Any
    base: Base
    renderer: Renderer
    stops: Stops
    device: torch.device
    described: dict[str, Any]  # its weights, for the provenance


def make_responder(options: AnswerOptions, config: dict[str, Any], task: Any) -> Responder:
    """Load the target. A run uses its own task's chat template, unless the options name one: then
    it uses the template of `task`.

    Raises:
        as load_trained and Base.load; DataError for a model that writes no text, or a template
        option without effect.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.run is not None:
        run = load_trained(options.run, device)
        if run.task.kind == "label":
            raise DataError(
                f"{run.folder} trained a classifier, which writes no text: give another run="
            )
        model, base, trained_ends = run.model, run.base, run.ends
        adapted = run.adapted or {}
        weights = {
            "run": adapted.get("id"),
            "step": adapted.get("step"),
            "adapter": adapted.get("sha256"),
        }
        if run.task.kind == "conversation" and not options.names_template:
            task.chat_template = run.task.chat_template
    else:
        base, trained_ends = instantiate(config["base"]), []
        computed, _, _ = compute(
            config["precision"], config["base"]["dtype"], False, device.type == "cuda"
        )
        weights = {"run": None, "step": None, "adapter": None}
        with Progress(f"loading {base.path}"):
            model = base.load(computed, None, device).eval()
    if base.decoder_start is not None:
        raise DataError(
            f"{base.path} is an encoder-decoder. This command writes answers for draft heads, which"
            " it cannot have"
        )
    renderer = Renderer(base.tokenizer, task)
    renderer.use(template_with(renderer.template, options.template_variables))
    renderer.train_on = "last"
    # a template may end answers with another token than the run's
    stops = stop_set(base.tokenizer, model, [*trained_ends, *of_template(renderer)], renderer)
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
    return Responder(model, base, renderer, stops, device, weights)


def template_with(
    source: str | dict[str, str] | None, variables: dict[str, Any]
) -> str | dict[str, str] | None:
    """Return the chat template with some variables set at its start.

    Raises:
        DataError: there is no template, or it never reads one of them.
    """
    if not variables:
        return source
    if source is None:
        raise DataError(f"template.{next(iter(variables))}: there is no chat template")
    whole = source if isinstance(source, str) else "".join(source.values())
    if unread := [name for name in variables if name not in whole]:
        raise DataError(f"template.{unread[0]}: the chat template never reads {unread[0]!r}")
    # Jinja's constants have Python's syntax.
    head = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in variables.items())
    return (
        head + source
        if isinstance(source, str)
        else {name: head + text for name, text in source.items()}
    )


class Drawn(LogitsProcessor):
    """Keep, of each row's scores, only the token that the row's random number selects: `u` (B, n)
    in [0, 1), one for each new token.

    The token is the first in the order of ids whose cumulative probability exceeds u. So it is the
    same on every device, unless rounding moves that boundary across u.
    """

    def __init__(self, u: Float[np.ndarray, "B n"], prompt: int):
        self.u, self.prompt = u, prompt

    def __call__(
        self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        uniform = torch.as_tensor(
            self.u[:, input_ids.shape[1] - self.prompt], device=scores.device
        ).unsqueeze(-1)
        # Rounding may leave the sum below 1, and a token of probability 0 must not be selected at
        # either end.
        total = cumulative[:, -1:].contiguous()
        token = torch.minimum(
            torch.searchsorted(cumulative, uniform * total, right=True),
            torch.searchsorted(cumulative, total),
        )
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def drawing(
    options: DrawingOptions, seeds: list[tuple[int, int]], prompt: int
) -> LogitsProcessorList:
    """Return the processors of scores: none if greedy, otherwise temperature, top_k and top_p in
    transformers' order, and one draw for each (row, turn)."""
    if options.temperature == 0:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    u = np.stack(
        [
            np.random.default_rng([options.seed, row, turn]).random(options.max_new_tokens)
            for row, turn in seeds
        ]
    )
    return LogitsProcessorList([*processors, Drawn(u, prompt)])


@torch.no_grad()
def answers(
    responder: Responder,
    prompts: list[list[int]],
    seeds: list[tuple[int, int]],
    options: DrawingOptions,
) -> list[list[int]]:
    """Return the ids of an answer to each prompt, including the stop token, which an answer that
    was cut lacks."""
    choose = drawing(options, seeds, max(map(len, prompts)))
    pad = responder.base.tokenizer.pad_token_id
    rows = continuations(
        responder.model,
        prompts,
        pad,
        responder.stops,
        options.max_new_tokens,
        responder.device,
        choose,
    )
    return [ids[: responder.stops.end(ids)] for ids in rows]


@dataclass
class _Dialogue:
    """A conversation in progress: its messages so far, those before the next answer, and the
    rest."""

    prompt_row: PromptRow
    rest: list[dict[str, Any]]
    # up to the target's last answer
    written: list[dict[str, Any]] = field(default_factory=list)
    unanswered: list[dict[str, Any]] = field(default_factory=list)
    # the end of each in `written`, and its marks
    answers: list[tuple[int, dict[str, bool]]] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)

    def advance(self) -> bool:
        """Advance to the next answer. Return False if there is none."""
        self.unanswered = list(
            itertools.takewhile(lambda message: message["content"] is not None, self.rest)
        )
        self.rest = self.rest[len(self.unanswered) :]
        return bool(self.rest)

    def example(self, text: str) -> Conversation:
        """Return the conversation with this text as its last answer."""
        messages = [*self.written, *self.unanswered, {"role": "assistant", "content": text}]
        row = self.prompt_row
        return Conversation(messages, row.where, row.tools, variables=row.variables)

    def lines(self, each: bool) -> list[dict[str, Any]]:
        """Return the lines for rows.jsonl, one per answer or one for all; or the line for
        left_out.jsonl, with a `why`, if the target wrote nothing."""
        row = self.prompt_row
        tools: dict[str, Any] = {"tools": row.tools} if row.tools else {}
        if row.variables:
            tools["chat_template_kwargs"] = row.variables
        if not self.answers:
            return [
                {"row": self.prompt_row.row, **self.ended, "messages": self.unanswered, **tools}
            ]
        if not each:
            marks = {name: True for _, names in self.answers for name in names}
            return [{"messages": self.written, **tools, "row": self.prompt_row.row, **marks}]
        return [
            {
                "messages": self.written[:end],
                **tools,
                "row": self.prompt_row.row,
                "answer": number,
                "of": len(self.answers),
                **marks,
            }
            for number, (end, marks) in enumerate(self.answers, 1)
        ]


def respond(
    responder: Responder, batch: list[PromptRow], options: DrawingOptions
) -> list[dict[str, Any]]:
    """Answer some conversations. Return the lines of rows.jsonl and those of left_out.jsonl, which
    have a `why`.

    A conversation ends if an answer is empty, cut, has no room or is refused. Earlier answers are
    kept.
    """
    dialogues = [_Dialogue(row, list(row.messages)) for row in batch]
    active = dialogues
    for turn in itertools.count():
        active = [dialogue for dialogue in active if not dialogue.ended and dialogue.advance()]
        prompts = [_prompt(responder, dialogue, options.max_new_tokens) for dialogue in active]
        active, prompts = (
            [dialogue for dialogue in active if not dialogue.ended],
            [prompt for prompt in prompts if prompt],
        )
        if not active:
            return [
                line for dialogue in dialogues for line in dialogue.lines(options.per == "answer")
            ]
        answered = answers(
            responder, prompts, [(dialogue.prompt_row.row, turn) for dialogue in active], options
        )
        for dialogue, prompt, ids in zip(active, prompts, answered, strict=True):
            _take(responder, dialogue, prompt, ids, options.cut == "drop")
    raise AssertionError


def _prompt(responder: Responder, dialogue: _Dialogue, more: int) -> list[int]:
    try:
        prompt = responder.renderer.prompt(dialogue.example(""))
    except Refused as refusal:
        dialogue.ended = {"why": "refused", "reason": str(refusal)}
        return []
    if not prompt:
        dialogue.ended = {"why": "refused", "reason": "the prompt is empty"}
    elif len(prompt) + more > responder.base.longest:
        dialogue.ended = {"why": "long"}
        return []
    return prompt


def _take(
    responder: Responder, dialogue: _Dialogue, prompt: list[int], ids: list[int], drops: bool
) -> None:
    """Add an answer to its conversation."""
    text = responder.base.tokenizer.decode(ids, skip_special_tokens=True)
    text = responder.stops.without_end(text)
    cut = responder.stops.end(ids) is None
    if not text.strip() or (cut and drops):
        dialogue.ended = {"why": "cut" if text.strip() else "empty"}
        return
    example = dialogue.example(text)
    exact = _same(responder, example, prompt + ids)
    dialogue.written, dialogue.unanswered, dialogue.rest = example.messages, [], dialogue.rest[1:]
    dialogue.answers.append(
        (
            len(dialogue.written),
            {**({} if exact else {"inexact": True}), **({"cut": True} if cut else {})},
        )
    )
    if cut:
        dialogue.ended = {"why": "cut"}


def _same(responder: Responder, example: Conversation, ids: list[int]) -> bool:
    """Return whether the text, tokenised again, gives the tokens that were generated."""
    try:
        return responder.renderer(example).ids[: len(ids)] == ids
    except Refused:
        return False
