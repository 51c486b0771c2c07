"""Evaluation of speculation: what a drafter gives on a set of prompts, against the target alone, in
one run.

    python -m trainer.evaluate run=FOLDER[@last|best|STEP] task=speculation [prompts=FILE.jsonl]
    [heldout=16] [each=0]
                               [max_new_tokens=128] [temperature=0] [top_p=1] [seed=0] [drafter=run]
                               [small=null] [tree=chain] [count=null] [size=59] [top_k=10]
                               [paths=FILE.json] [policy=fixed] [siblings=without] [json=FILE]
                               [plot=FILE.svg]

prompts=FILE.jsonl has Spec-Bench's layout, {"question_id": 81, "category": "writing", "turns":
["...", "..."]} a line, or that of python -m trainer.speculate; each=N takes the first N of each
category, 0 all. Without it the first `heldout` conversations that the run holds out are asked. A
later turn follows the target's own answers to those before. drafter and small are as in python -m
trainer.generate, and what says how a draft grows, from tree to siblings, as in python -m
trainer.speculate.

Each prompt is decoded three times, one sequence at a time: by transformers' generate, by the
decoder without the drafter, and with it.

    tau            tokens of a target pass, the target's own among them: new tokens after each answer's first / target passes after
                   the prompt's
    conditional    how often a k-th drafted token was taken where one was proposed and those before it were taken; of trees, any of
                   the k-th level
    survival       how often a k-th drafted token was taken, of all passes that verified a draft: unconditional, as vLLM counts it
    speed-up       new tokens a second over another way's, with the prompt's pass

Intervals are 95 % of bootstraps over the prompts, all turns of a question together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tasks.reading import DataError
from trainer.assembly import quiet
from trainer.assembly.chosen_drafter import check_drafter, drafter_of, unknown_drafter
from trainer.assembly.rows import add_prompts, load_data
from trainer.assembly.trained import Trained, load_trained
from trainer.data.render import Renderer, stop_ids
from trainer.decoding import speculative
from trainer.decoding.speculative import Result
from trainer.drafters import Drafter, DrafterError, Target
from trainer.evaluation.decode_ways import WAYS, by_transformers, prompts_of, shape_of
from trainer.evaluation.speedup import Answer, plot, show, summary
from trainer.storage import run_folder

# How a draft grows, as speculate.shape_of reads it.
GROWTH: dict[str, Any] = {
    "tree": "chain",
    "count": None,
    "size": 59,
    "top_k": 10,
    "paths": None,
    "policy": "fixed",
    "siblings": "without",
}


@dataclass(frozen=True)
class Question:
    """A prompt, and what is asked after its answer."""

    category: str
    messages: list[dict[str, Any]]
    further: list[str] = field(default_factory=list)


def questions(path: str, each: int | None = None) -> list[Question]:
    """The questions of a file, the first `each` of each category.

    Raises:
        DataError: the file cannot be read, or a line is of no known form.
    """
    try:
        lines = [
            line for line in Path(path).expanduser().read_text("utf-8").splitlines() if line.strip()
        ]
        first = json.loads(lines[0]) if lines else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:1 is no JSON: {error}") from None
    if not (isinstance(first, dict) and "turns" in first):
        return _first([Question("all", messages) for messages in prompts_of(path)], each)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is no JSON: {error}") from None
        turns = row.get("turns") if isinstance(row, dict) else None
        if not (
            isinstance(turns, list)
            and turns
            and all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise DataError(
                f'{path}:{number}: a line is {{"question_id": ..., "category": "...", "turns":'
                ' ["...", ...]} with at least one turn'
            )
        found.append(
            Question(
                str(row.get("category", "all")), [{"role": "user", "content": turns[0]}], turns[1:]
            )
        )
    return _first(found, each)


def _first(found: list[Question], each: int | None) -> list[Question]:
    kept: dict[str, list[Question]] = {}
    for question in found:
        kept.setdefault(question.category, []).append(question)
    return [question for of_one in kept.values() for question in of_one[:each]]


def held_out(found: Trained, count: int) -> list[Question]:
    """The first conversations that a run holds out, up to the last answer.

    Raises:
        DataError: the run has none.
    """
    if found.task.kind != "conversation":
        raise DataError(
            "this run continues plain text and holds out no conversations: give prompts=FILE.jsonl"
        )
    data = load_data(found.config, found.base, found.task, train=False)
    if data.held_out is None:
        raise DataError(
            "this run's task has no held-out rows: it had task.eval_fraction=0 and no"
            " task.eval_path. Give prompts=FILE.jsonl"
        )
    add_prompts(data, count, found.model)
    return [Question("held out", example.messages[:-1]) for example, _ in data.held_out.prompts]


def asked(
    found: Trained,
    drafter: Drafter,
    chosen: Sequence[Question],
    options: dict[str, Any],
    tell: Callable[[str], None],
) -> tuple[list[Answer], int]:
    """(each turn's answer by each way, how many turns were left out because they do not fit the
    model).

    Raises:
        DataError: a question cannot be asked of this run.
        DrafterError: the drafter cannot draft for the target.
    """
    model, tokenizer = found.model, found.base.tokenizer
    target, shape, device = Target(model), shape_of(options), next(model.parameters()).device
    stops = stop_ids(tokenizer, model.generation_config.eos_token_id, [])  # type: ignore[union-attr]
    renderer = Renderer(tokenizer, found.task) if found.task.kind == "conversation" else None

    def one(way: str, ids: torch.Tensor, limit: int) -> Result:
        if way == "transformers":
            return by_transformers(
                model, ids, stops, tokenizer.pad_token_id, options | {"max_new_tokens": limit}
            )
        return speculative.generate(
            target,
            drafter if way == "drafter" else None,
            ids,
            limit,
            stops,
            options["temperature"],
            options["top_p"],
            torch.Generator(device).manual_seed(options["seed"]),
            shape=shape,
            rule="spectr" if options["siblings"] == "spectr" else "recursive",
        )

    answers: list[Answer] = []
    left_out = 0
    for number, question in enumerate(chosen):
        if renderer is None and question.further:
            raise DataError(
                "this run continues plain text, and a question of several turns asks for a chat"
            )
        messages = list(question.messages)
        for turn, text in enumerate((None, *question.further)):
            messages += [] if text is None else [{"role": "user", "content": text}]
            prompt = (
                tokenizer(messages[-1]["content"])["input_ids"]
                if renderer is None
                else renderer.chat(messages)
            )
            if not prompt:
                raise DataError("a prompt is empty, and this model starts from at least one token")
            if len(prompt) + options["max_new_tokens"] > found.base.longest:
                left_out += len(question.further) + 1 - turn
                break
            # a drafter that cannot draft says so first
            ids, ways = torch.tensor(prompt, device=device), list(reversed(WAYS))
            for way in ways if not answers else ():
                # what happens once only is not measured
                one(way, ids, min(8, options["max_new_tokens"]))
            # who comes first finds the processor as others have left it
            turned = len(answers) % len(ways)
            results = {
                way: one(way, ids, options["max_new_tokens"])
                for way in ways[turned:] + ways[:turned]
            }
            answers.append(Answer(number, turn, question.category, results))
            said = tokenizer.decode(results["transformers"].tokens, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})
        tell(f"{number + 1} of {len(chosen)} questions")
    if not answers:
        raise DataError(
            f"no prompt fits the model: it takes {found.base.longest} tokens,"
            f" {options['max_new_tokens']} of them new"
        )
    return answers, left_out


def _faults(options: dict[str, Any]) -> Iterable[str]:
    for name, fits, said in (
        ("heldout", options["heldout"] >= 1, "at least 1"),
        ("each", options["each"] >= 0, "at least 1, or 0 for all"),
        ("max_new_tokens", options["max_new_tokens"] >= 2, "at least 2"),
        ("temperature", options["temperature"] >= 0, "at least 0"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0, at most 1"),
    ):
        if not fits:
            yield f"{name}={options[name]}: {said}"
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
    """python -m trainer.evaluate with task=speculation; see the module's text."""
    from trainer.config.errors import bad
    from trainer.config.options import arguments

    known = {
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
        **GROWTH,
        "json": None,
        "plot": None,
    }
    options = arguments(argv, known, __doc__ or "")
    for fault in _faults(options):
        return bad(fault)
    options["count"] = None if options["count"] in (None, "null") else int(options["count"])
    quiet.quiet()
    shape_of(options)
    _, content, _ = run_folder.read(options["run"])
    if content["identity"]["labels"] is not None:
        return bad(
            "this run trained a classifier, which writes no text. Use: python -m trainer.evaluate"
            " without task"
        )
    check_drafter(content["config"], options)
    chosen = questions(options["prompts"], options["each"] or None) if options["prompts"] else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = load_trained(options["run"], device)
    drafter = drafter_of(found, options)
    if drafter is None:
        raise DrafterError(
            f"the drafter of run={options['run']} only shapes the adapter, and proposes no tokens"
        )
    chosen = held_out(found, options["heldout"]) if chosen is None else chosen
    answers, left_out = asked(
        found, drafter, chosen, options, lambda text: print(text, file=sys.stderr, flush=True)
    )
    had = {
        key: options[key]
        for key in ("drafter", "max_new_tokens", "temperature", "top_p", "seed", *GROWTH)
    }
    result = summary(answers, left_out, had)
    show(result)
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(result, indent=2) + "\n")
    if options["plot"]:
        plot(result, Path(options["plot"]))
    return 0
