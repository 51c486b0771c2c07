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
from pathlib import Path

import torch

from trainer.assembly import quiet
from trainer.assembly.chosen_drafter import check_drafter, drafter_of, unknown_drafter
from trainer.assembly.trained import load_trained
from trainer.decoding import trees
from trainer.drafters import DrafterError
from trainer.evaluation.decode_ways import asked, decoded, prompts_of, shape_of, show, summary
from trainer.evaluation.tree_search import searched, show_searched
from trainer.storage import run_folder


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
        # A search has the bounds of a dynamic tree; its paths are written.
        shape_of(options | {"tree": "eagle2", "paths": None} if search else options)
        _, content, _ = run_folder.read(options["run"])
        if content["identity"]["labels"] is not None:
            return bad(
                "this run trained a classifier, which writes no text. Use: python -m"
                " trainer.evaluate"
            )
        check_drafter(content["config"], options)
        if options["prompts"]:
            prompts_of(options["prompts"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = load_trained(options["run"], device)
        drafter = drafter_of(found, options)
        if drafter is None:
            raise DrafterError(
                f"the drafter of run={options['run']} only shapes the adapter, and proposes no"
                " tokens"
            )
        prompts, stops = asked(options, found)
        if search:
            result = searched(found, drafter, prompts, stops, options)
            if options["paths"] and result["paths"]:
                Path(options["paths"]).expanduser().write_text(json.dumps(result["paths"]) + "\n")
        else:
            result = summary(decoded(found, drafter, prompts, stops, options), options)
    except Exception as error:
        return failures.report_and_exit_code(error)
    if search:
        show_searched(result, options["paths"])
    else:
        show(result)
    if options["json"]:
        Path(options["json"]).expanduser().write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
