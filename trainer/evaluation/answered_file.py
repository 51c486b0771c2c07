"""The answers of a run's model to a file of prompts, several at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tasks.reading import DataError
from trainer.assembly.chosen_drafter import drafter_of
from trainer.assembly.trained import Trained
from trainer.config.decoding_options import DrafterOptions, SamplingOptions
from trainer.config.shown import shown_json
from trainer.decoding.merged import merged
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import generate_batch
from trainer.decoding.target_cache import allow_trees
from trainer.drafters import DrafterError, Target
from trainer.evaluation import questions
from trainer.models.cache_argument import rolls_back
from trainer.storage.progress import Progress

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Batches:
    """The number of prompts that are answered at once, and the longest answer."""

    size: int
    max_new_tokens: int


def answer_file(
    run: Trained,
    file: str,
    sampling: SamplingOptions,
    drafter: DrafterOptions | None,
    batches: Batches,
    write: Callable[[str], None],
) -> None:
    """Answer the prompts of a file, and call `write` with a line of JSON for each, in their order.

    Raises:
        DataError: the run writes no text, or the file cannot be read.
        DrafterError: the drafter cannot draft for the model.
    """
    model: Any = run.model
    if run.task.kind == "label" or model.config.is_encoder_decoder:
        raise DataError("prompts=FILE is for causal models that write text: give prompt=TEXT")
    rows = questions.read_prompts(file)
    prompts, stops = questions.prompt_ids(run, 0, rows)
    drafts = None if drafter is None else drafter_of(run, drafter)
    target = Target(run.model, drafted=drafts is not None)
    size, device = _size(target, batches.size), next(run.model.parameters()).device
    with merged(run.model), Progress("answers", len(prompts), "prompts") as progress:
        for start in range(0, len(prompts), size):
            ids = [torch.tensor(prompt, device=device) for prompt in prompts[start : start + size]]
            results = generate_batch(
                target,
                drafts,
                ids,
                batches.max_new_tokens,
                stops,
                # other draws for each batch
                Sampling(sampling.temperature, sampling.top_p, seed=sampling.seed + start),
            )
            for question, result in zip(rows[start : start + size], results, strict=True):
                text = run.base.tokenizer.decode(result.tokens, skip_special_tokens=True)
                answer = {"role": "assistant", "content": stops.without_end(text)}
                row = {"messages": [*question.messages, answer]}
                write(shown_json(json.dumps(row, ensure_ascii=False)))
            progress.advance(len(ids))


def _size(target: Target, size: int) -> int:
    if size == 1:
        return 1
    try:
        if not rolls_back(target.model):
            raise DrafterError(f"{type(target.model).__name__} has a state of its own kind")
        allow_trees(target)
    except DrafterError as error:
        log.warning("batch_size=%d: one prompt at a time, since %s", size, error)
        return 1
    return size
