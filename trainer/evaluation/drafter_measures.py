"""Measurements of decoding with a run's drafter: on prompts, by the category of questions, and the
search for a tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config.decoding_options import MeasureOptions
from trainer.decoding.merged import merged
from trainer.decoding.sampling import Sampling
from trainer.evaluation import decode_ways, questions, speedup, tree_search
from trainer.evaluation.decode_ways import DraftOptions, Ways
from trainer.evaluation.questions import Question
from trainer.evaluation.run_drafter import load_run_and_drafter
from trainer.storage import atomic


def by_category(
    options: MeasureOptions, each: int, report: Callable[[str], None], compared: int = 0
) -> dict[str, Any]:
    """Decode questions by each way; return the summary by category. `each` is the number of
    questions of a category, 0 for all; `compared` the number that all ways decode, 0 for all.

    Raises:
        DataError, DrafterError, and those of load_trained.
    """
    drafts = DraftOptions.of(options)
    strategy = drafts.strategy()
    chosen = questions.read_questions(options.prompts, each or None) if options.prompts else None
    run, drafter = load_run_and_drafter(options.run, options)
    prompts = questions.Prompts(run)
    ways = Ways(run, drafter, prompts.stops, options.max_new_tokens, _sampling(options), strategy)
    if chosen is None:
        chosen = questions.held_out_questions(run, options.heldout)
    with merged(run.model):
        answers, left_out = decode_ways.answer_questions(
            ways, prompts, chosen, run.base.longest, report, compared
        )
    summary = speedup.summary_by_category(answers, left_out, options.temperature)
    return options.recorded("drafter") | asdict(drafts) | summary


def by_prompt(options: MeasureOptions, prompt: str | None, batch_size: int) -> dict[str, Any]:
    """Decode prompts in batches by each way; return the summary.

    Raises:
        DataError, DrafterError, and those of load_trained.
    """
    strategy = DraftOptions.of(options).strategy()
    file = questions.read_prompts(options.prompts) if options.prompts else None
    run, drafter = load_run_and_drafter(options.run, options)
    prompts, stops = questions.prompt_ids(run, options.heldout, file or _one(prompt))
    ways = Ways(run, drafter, stops, options.max_new_tokens, _sampling(options), strategy)
    with merged(run.model):
        results = decode_ways.decode_in_batches(ways, prompts, batch_size)
    summary = speedup.summary_of_prompts(results, batch_size, options.temperature)
    return options.recorded("count", "tree", "policy") | summary


def search(options: MeasureOptions, prompt: str | None) -> dict[str, Any]:
    """Search for the best static tree, and write it to `options.paths`.

    Raises:
        DataError, DrafterError, and those of load_trained.
    """
    # A search has the bounds of a dynamic tree; `paths` is where it writes the tree.
    DraftOptions.of(options, tree="eagle2", paths=None).strategy()
    file = questions.read_prompts(options.prompts) if options.prompts else None
    run, drafter = load_run_and_drafter(options.run, options)
    prompts, stops = questions.prompt_ids(run, options.heldout, file or _one(prompt))
    limits = tree_search.SearchLimits(
        options.size, options.top_k, options.count, options.max_new_tokens
    )
    with merged(run.model):
        result = tree_search.search_tree(run, drafter, prompts, stops, limits)
    if options.paths and result["paths"]:
        text = json.dumps(result["paths"]) + "\n"
        atomic.write_output(Path(options.paths).expanduser(), text)
    return result | {"drafter": options.drafter}


def _one(prompt: str | None) -> list[Question]:
    return [Question("all", [{"role": "user", "content": str(prompt)}])]


def _sampling(options: MeasureOptions) -> Sampling:
    return Sampling(options.temperature, options.top_p, seed=options.seed)
