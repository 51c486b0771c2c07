"""Prompts decoded in several ways: by transformers, by our decoder without a drafter, and with
it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

from tasks.reading import DataError
from trainer.assembly.chosen_drafter import generation_config
from trainer.assembly.trained import Trained
from trainer.config.decoding_options import GrowthOptions
from trainer.data.stops import Stops
from trainer.decoding import positions, speculative, trees
from trainer.decoding.clock import now
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Result, Strategy
from trainer.drafters import Drafter, Target
from trainer.evaluation.questions import Prompts, Question
from trainer.storage.progress import Progress

WAYS = {
    "transformers": "transformers' generate",
    "plain": "without the drafter",
    "drafter": "with the drafter",
}
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class DraftOptions:
    """A command's options for drafts, as trees.named reads them; `paths` is a file."""

    tree: str = "chain"
    count: int | None = None
    size: int = 59
    top_k: int = 10
    paths: str | None = None
    policy: str = "fixed"
    siblings: str = "without"
    rule: str = "traversal"

    @classmethod
    def of(cls, options: GrowthOptions, **changes: Any) -> Self:
        """Return the options of a command, with some changed."""
        values = {field.name: getattr(options, field.name) for field in fields(cls)}
        return cls(**(values | changes))

    def strategy(self) -> Strategy:
        """Return how drafts are built and verified.

        Raises:
            DrafterError, DataError: an option is out of its range, or paths cannot be read.
        """
        paths = None if self.paths is None else _read_paths(self.paths)
        shape = trees.named(
            self.tree, self.count, self.top_k, self.size, self.policy, self.siblings, paths
        )
        return Strategy(shape, "spectr" if self.siblings == "spectr" else self.rule)


def _read_paths(file: str) -> list[list[int]]:
    try:
        paths = json.loads(Path(file).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"paths={file} cannot be read: {error}") from None
    if not isinstance(paths, list) or not all(
        isinstance(path, list) and all(type(rank) is int for rank in path) for path in paths
    ):
        raise DataError(
            f"paths={file}: expected the paths of a tree's nodes, as [[0], [1], [0, 0]]"
        )
    return paths


class Ways:
    """Decodes prompts with a run's model by each of WAYS.

    Raises:
        DrafterError: the drafter cannot draft for the model.
    """

    def __init__(
        self,
        run: Trained,
        drafter: Drafter,
        stops: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        strategy: Strategy,
    ):
        self.model, self.pad = run.model, run.base.tokenizer.pad_token_id
        self.target = Target(run.model, drafted=drafter is not None)
        self.drafter, self.stops = drafter, stops
        self.max_new_tokens, self.sampling, self.strategy = max_new_tokens, sampling, strategy
        self.device = next(run.model.parameters()).device
        self.warm = False

    def decode(
        self, prompts: Sequence[Sequence[int]], turn: int = 0, compared: bool = True
    ) -> dict[str, list[Result]]:
        """Decode prompts together by each way, or by the drafter alone. `turn` rotates the order of
        the ways: the first one runs with a cold cache."""
        ids = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        ways = list(reversed(WAYS))  # first the drafter: one that cannot draft fails at once
        if not self.warm:
            for way in ways:
                self._decode(way, ids, min(WARM_UP_TOKENS, self.max_new_tokens))
            self.warm = True
        if not compared:
            return {"drafter": self._decode("drafter", ids, self.max_new_tokens)}
        turn %= len(ways)
        results = {
            way: self._decode(way, ids, self.max_new_tokens) for way in ways[turn:] + ways[:turn]
        }
        return {way: results[way] for way in WAYS}

    def _decode(self, way: str, ids: list[torch.Tensor], max_new_tokens: int) -> list[Result]:
        if way == "transformers":
            return [
                by_transformers(
                    self.model, prompt, self.stops, self.pad, max_new_tokens, self.sampling
                )
                for prompt in ids
            ]
        return speculative.generate_batch(
            self.target,
            self.drafter if way == "drafter" else None,
            ids,
            max_new_tokens,
            self.stops,
            self.sampling,
            self.strategy,
        )


@torch.no_grad()
def by_transformers(
    model: Any,
    ids: torch.Tensor,
    stops: list[int],
    pad: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> Result:
    """Continue one prompt with transformers' own loop."""
    torch.manual_seed(sampling.seed or 0)
    count = positions.new_tokens(model, len(ids), max_new_tokens)
    # A base's own settings may have a penalty, which verification of drafts does not know.
    settings = generation_config(
        sampling.temperature, sampling.top_p, count, stops, pad, repetition_penalty=1.0
    )
    positions.reset_tables(model)
    started = now(ids.device)
    out = model.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids[None]),
        generation_config=settings,
        **Stops.of(stops).arguments(),
    )
    tokens = out[0, len(ids) :].tolist()
    return Result(tokens, [(0, 0)] * (len(tokens) - 1), now(ids.device) - started, 0.0)


def decode_in_batches(
    ways: Ways, prompts: Sequence[Sequence[int]], batch_size: int
) -> dict[str, list[Result]]:
    """Return each prompt's result by each way."""
    results: dict[str, list[Result]] = {way: [] for way in WAYS}
    with Progress("decoding", len(prompts), "prompts") as progress:
        for start in range(0, len(prompts), batch_size):
            chosen = prompts[start : start + batch_size]
            for way, batch in ways.decode(chosen).items():
                results[way] += batch
            progress.advance(len(chosen))
    return results


@dataclass(frozen=True)
class Answer:
    """One turn, decoded by each of WAYS, or by the drafter alone."""

    question: int
    turn: int  # from 0
    category: str
    results: dict[str, Result]


def answer_questions(
    ways: Ways,
    prompts: Prompts,
    questions: Sequence[Question],
    longest: int,
    report: Callable[[str], None],
    compared: int = 0,
) -> tuple[list[Answer], int]:
    """Return (each turn's answer by each way, the number of turns left out because they do not fit
    into the model's `longest` tokens).

    A later turn follows the target's own answers to those before. All ways decode `compared`
    questions, spread evenly, and the drafter the others; 0 compares all.

    Raises:
        DataError: this run cannot answer a question.
        DrafterError: the drafter cannot draft for the target.
    """
    answers: list[Answer] = []
    left_out = 0
    with Progress("decoding", len(questions), "questions") as progress:
        for number, question in enumerate(progress.each(questions)):
            if prompts.renderer is None and question.further:
                raise DataError(
                    "this run continues plain text, and a question of several turns needs a chat"
                )
            together = not compared or _is_spread(number, compared, len(questions))
            left_out += _answer_turns(ways, prompts, question, number, longest, answers, together)
            report(f"{number + 1} of {len(questions)} questions")
    if not answers:
        raise DataError(
            f"no prompt fits the model: it takes {longest} tokens, {ways.max_new_tokens} of them"
            " new"
        )
    return answers, left_out


def _is_spread(number: int, chosen: int, total: int) -> bool:
    """Return whether number is one of `chosen` of 0 .. total - 1, spread evenly from 0 on."""
    return number * chosen // total != (number - 1) * chosen // total


def _answer_turns(
    ways: Ways,
    prompts: Prompts,
    question: Question,
    number: int,
    longest: int,
    answers: list[Answer],
    compared: bool,
) -> int:
    """Add the answers to a question's turns. Return the number of turns that do not fit."""
    messages = list(question.messages)
    for turn, text in enumerate((None, *question.further)):
        messages += [] if text is None else [{"role": "user", "content": text}]
        ids = prompts.ids(question, messages)
        if len(ids) + ways.max_new_tokens > longest:
            return len(question.further) + 1 - turn
        by_way = ways.decode([ids], turn=len(answers), compared=compared)
        results = {way: result for way, (result,) in by_way.items()}
        answers.append(Answer(number, turn, question.category, results))
        # the drafter's text has the target's law, and is its greedy text at temperature 0
        tokens = results.get("transformers", results["drafter"]).tokens
        content = prompts.tokenizer.decode(tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": content})
    return 0
