"""Decode with a run's drafter, and measure it against decoding without.

    python -m trainer.speculate run=FOLDER[@last|best|STEP]
    prompt="..."|prompts=FILE.jsonl|heldout=N [max_new_tokens=128]
                                [temperature=0] [top_p=1] [seed=0] [batch_size=1] [json=FILE]
                                [tree=chain|static|eagle2|dyspec|search] [count=null] [size=59]
                                [top_k=10] [paths=FILE.json]
                                [policy=fixed|confidence:0.6|refusal:0.7]
                                [siblings=without|with|spectr|best]
                                [drafter=run|lookup|recycling|small] [small=PATH]
    python -m trainer.speculate run=FOLDER prompts=FILE.jsonl tree=search [paths=OUT.json] [size=59]
    [top_k=10] [count=null] ...

prompts=FILE.jsonl has one {"prompt": "..."} or {"messages": [...]} a line; of messages the last
answer is left out. heldout=N takes the first N held-out conversations of the run's task.

What is drafted at a time: a chain of tokens, or a tree of `size` of them. static is EAGLE-1's tree,
or that of paths=FILE.json, a list of its nodes' paths as [[0], [1], [0, 0]]; eagle2 is EAGLE-2's,
which goes on below the top_k likeliest nodes of each level; dyspec is DySpec's, which goes on
wherever the next node is likeliest. count=N drafts N tokens after one another, instead of as many
as the drafter can. A policy stops early: confidence:P where the drafter gives no next token the
probability P, refusal:P where it expects a refusal with more than P. When sampling, siblings of
static trees are drawn without or with replacement (spectr: verified by SpecTr's rule), or are the
best tokens; eagle2 and dyspec take the best. A drafter that makes trees of its own is not asked for
another: lookup, n-grams of the text so far, and recycling, Token Recycling, which need no training;
small is a small model of the same tokenizer.

Each prompt is decoded three times: by transformers' generate, one at a time, by the decoder without
the drafter, and with it, both batch_size at a time. temperature=0 is greedy, where all three write
the same text: how many differ is told. In bf16 some may, where two tokens are equally likely up to
rounding.

tree=search finds the static tree of the most tokens a second, of at most `size` nodes, `top_k`
children of each and `count` levels, and writes it to paths=OUT.json for tree=static paths=OUT.json.
It measures on the prompts how often the drafter's guess of each rank is right at each depth, in
greedy decoding of one sequence, and on this machine, best left alone meanwhile, what the passes of
target and drafter take.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import get_console

from trainer.assembly import quiet
from trainer.assembly.chosen_drafter import check_drafter, drafter_of, unknown_drafter
from trainer.assembly.trained import Trained, load_trained
from trainer.decoding import trees
from trainer.decoding.sampling import Sampling
from trainer.drafters import DrafterError
from trainer.evaluation.decode_ways import DraftOptions, Ways, decode_in_batches
from trainer.evaluation.questions import Prompts, held_out_prompts, read_prompts
from trainer.evaluation.speedup import summary_of_prompts
from trainer.evaluation.speedup_report import prompts_report
from trainer.evaluation.tree_search import SearchLimits, search_report, search_tree
from trainer.storage import run_folder

# options that a summary records
RECORDED = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "count",
    "tree",
    "policy",
    "batch_size",
)


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config.errors import bad
    from trainer.config.options import arguments
    from trainer.session import failures

    known = {
        "run": ...,
        "prompt": None,
        "prompts": None,
        "heldout": 0,
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "batch_size": 1,
        "tree": "chain",
        "count": None,
        "size": 59,
        "top_k": 10,
        "paths": None,
        "policy": "fixed",
        "siblings": "without",
        "drafter": "run",
        "small": None,
        "json": None,
    }
    options = arguments(argv, known, __doc__ or "")
    if (
        sum(
            (options["prompt"] is not None, options["prompts"] is not None, options["heldout"] != 0)
        )
        != 1
    ):
        return bad("give one of prompt, prompts and heldout")
    if options["count"] in (None, "null"):
        options["count"] = None
    elif not options["count"].isdecimal() or int(options["count"]) < 1:
        return bad(f"count={options['count']}: a number of at least 1, or null")
    else:
        options["count"] = int(options["count"])
    for name, fits, said in (
        ("heldout", options["heldout"] >= 0, "at least 1"),
        ("batch_size", options["batch_size"] >= 1, "at least 1"),
        ("max_new_tokens", options["max_new_tokens"] >= 1, "at least 1"),
        ("temperature", options["temperature"] >= 0, "at least 0"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0, at most 1"),
    ):
        if not fits:
            return bad(f"{name}={options[name]}: {said}")
    search = options["tree"] == "search"
    for name in ("json", "paths") if search else ("json",):
        if options[name] and not Path(options[name]).expanduser().parent.is_dir():
            return bad(f"{name}={options[name]}: there is no such folder")
    if search:
        if options["drafter"] in ("lookup", "recycling"):
            return bad(
                f"drafter={options['drafter']} makes trees of its own: tree=search is for"
                " drafter=run and drafter=small"
            )
        for name, only in (
            ("temperature", 0.0),
            ("batch_size", 1),
            ("policy", "fixed"),
            ("siblings", "without"),
        ):
            if options[name] != only:
                return bad(
                    f"{name}={options[name]}: tree=search measures greedy decoding of one sequence,"
                    " without a policy"
                )
    if fault := unknown_drafter(options):
        return bad(fault)
    if options["tree"] not in (*trees.TREES, "search"):
        return bad(f"tree={options['tree']}: one of {', '.join(trees.TREES)}, search")
    quiet.quiet()
    try:
        drafts = DraftOptions(**{name: options[name] for name in asdict(DraftOptions())})
        # A search has the bounds of a dynamic tree; `paths` is where it writes the tree.
        strategy = (replace(drafts, tree="eagle2", paths=None) if search else drafts).strategy()
        _, content, _ = run_folder.read(options["run"])
        if content["identity"]["labels"] is not None:
            return bad(
                "this run trained a classifier, which writes no text. Use: python -m"
                " trainer.evaluate"
            )
        check_drafter(content["config"], options)
        if options["prompts"]:
            read_prompts(options["prompts"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run = load_trained(options["run"], device)
        drafter = drafter_of(run, options)
        if drafter is None:
            raise DrafterError(
                f"the drafter of run={options['run']} only shapes the adapter, and proposes no"
                " tokens"
            )
        prompts, stops = _prompts(options, run)
        if search:
            limits = SearchLimits(
                options["size"], options["top_k"], options["count"], options["max_new_tokens"]
            )
            result = search_tree(run, drafter, prompts, stops, limits)
            result |= {"drafter": options["drafter"]}
            if options["paths"] and result["paths"]:
                Path(options["paths"]).expanduser().write_text(json.dumps(result["paths"]) + "\n")
            report = search_report(result, options["paths"])
        else:
            sampling = Sampling(options["temperature"], options["top_p"], seed=options["seed"])
            ways = Ways(run, drafter, stops, options["max_new_tokens"], sampling, strategy)
            results = decode_in_batches(ways, prompts, options["batch_size"])
            result = summary_of_prompts(results, {name: options[name] for name in RECORDED})
            report = prompts_report(result)
    except Exception as error:
        return failures.report_and_exit_code(error)
    for part in report:
        get_console().print(part, soft_wrap=search)
    if options["json"]:
        Path(options["json"]).expanduser().write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _prompts(options: dict[str, Any], run: Trained) -> tuple[list[list[int]], list[int]]:
    """Return (prompts as token ids, stop tokens).

    Raises:
        DataError: the task has no such prompts.
    """
    if options["heldout"]:
        return held_out_prompts(run, options["heldout"])
    prompts = Prompts(run)
    conversations = (
        read_prompts(options["prompts"])
        if options["prompts"]
        else [[{"role": "user", "content": str(options["prompt"])}]]
    )
    return [prompts.ids(messages) for messages in conversations], prompts.stops


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
