"""Measure speculative decoding on a set of prompts, against the target alone, in one run.

    python -m trainer.evaluate run=FOLDER[@last|best|STEP] task=speculation [prompts=FILE.jsonl]
                               [heldout=16] [each=0] [max_new_tokens=128] [temperature=0] [top_p=1]
                               [seed=0] [drafter=run] [small=null] [tree=chain] [count=null]
                               [size=59] [top_k=10] [paths=FILE.json] [policy=fixed]
                               [siblings=without] [json=FILE] [plot=FILE.svg]

prompts=FILE.jsonl has Spec-Bench's layout, {"question_id": 81, "category": "writing", "turns":
["...", "..."]} a line, or that of python -m trainer.speculate; each=N takes the first N of each
category, 0 all. Without it the first `heldout` conversations that the run holds out are asked. A
later turn follows the target's own answers to those before. drafter and small are as in python -m
trainer.generate. The options of drafts, from tree to siblings, are as in python -m
trainer.speculate.

Each prompt is decoded three times, one sequence at a time: by transformers' generate, by the
decoder without the drafter, and with it. The table shows tau (tokens of a target pass, including
the target's own), the acceptance of each draft position (conditional, and over all passes that
verified a draft), and the speed-up (new tokens per second over another way's, including the
prompt's pass). Intervals are 95 % of bootstraps over the questions, with all turns of a question
together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import get_console

from trainer.assembly import quiet
from trainer.assembly.chosen_drafter import check_drafter, drafter_of, unknown_drafter
from trainer.assembly.trained import load_trained
from trainer.decoding.sampling import Sampling
from trainer.drafters import DrafterError
from trainer.evaluation.decode_ways import DraftOptions, Ways, answer_questions
from trainer.evaluation.questions import Prompts, held_out_questions, read_questions
from trainer.evaluation.speedup import summary_by_category
from trainer.evaluation.speedup_report import categories_report, plot
from trainer.storage import run_folder

KNOWN = {
    "run": ...,
    "prompts": None,
    "heldout": 16,
    "each": 0,
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "drafter": "run",
    "small": None,
    **asdict(DraftOptions()),
    "json": None,
    "plot": None,
}
# options that a summary records, besides those of drafts
RECORDED = ("drafter", "max_new_tokens", "temperature", "top_p", "seed")


def _faults(options: dict[str, Any]) -> Iterable[str]:
    for name, valid, expected in (
        ("heldout", options["heldout"] >= 1, "at least 1"),
        ("each", options["each"] >= 0, "at least 1, or 0 for all"),
        ("max_new_tokens", options["max_new_tokens"] >= 2, "at least 2"),
        ("temperature", options["temperature"] >= 0, "at least 0"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0, at most 1"),
    ):
        if not valid:
            yield f"{name}={options[name]}: {expected}"
    if options["count"] not in (None, "null") and not (
        str(options["count"]).isdecimal() and int(options["count"]) >= 1
    ):
        yield f"count={options['count']}: a number of at least 1, or null"
    for name in ("json", "plot"):
        if options[name] and not Path(options[name]).parent.is_dir():
            yield f"{name}={options[name]}: there is no such folder"
    if fault := unknown_drafter(options):
        yield fault


def main(argv: list[str]) -> int:
    """Run python -m trainer.evaluate with task=speculation; see the module's text."""
    from trainer.config.errors import bad
    from trainer.config.options import arguments

    options = arguments(argv, KNOWN, __doc__ or "")
    for fault in _faults(options):
        return bad(fault)
    options["count"] = None if options["count"] in (None, "null") else int(options["count"])
    quiet.quiet()
    drafts = DraftOptions(**{name: options[name] for name in asdict(DraftOptions())})
    strategy = drafts.strategy()
    _, content, _ = run_folder.read(options["run"])
    if content["identity"]["labels"] is not None:
        return bad(
            "this run trained a classifier, which writes no text. Use: python -m trainer.evaluate"
            " without task"
        )
    check_drafter(content["config"], options)
    questions = (
        read_questions(options["prompts"], options["each"] or None) if options["prompts"] else None
    )
    run = load_trained(options["run"], "cuda" if torch.cuda.is_available() else "cpu")
    drafter = drafter_of(run, options)
    if drafter is None:
        raise DrafterError(
            f"the drafter of run={options['run']} only shapes the adapter, and proposes no tokens"
        )
    prompts = Prompts(run)
    sampling = Sampling(options["temperature"], options["top_p"], seed=options["seed"])
    ways = Ways(run, drafter, prompts.stops, options["max_new_tokens"], sampling, strategy)
    answers, left_out = answer_questions(
        ways,
        prompts,
        held_out_questions(run, options["heldout"]) if questions is None else questions,
        run.base.longest,
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    record = {name: options[name] for name in RECORDED} | asdict(drafts)
    summary = summary_by_category(answers, left_out, record)
    for part in categories_report(summary):
        get_console().print(part)
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(summary, indent=2) + "\n")
    if options["plot"]:
        plot(summary, Path(options["plot"]))
    return 0
