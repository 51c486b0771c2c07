"""Decode with a run's drafter, and compare with decoding without it.

    graft speculate run=FOLDER[@last|best|STEP] prompt="..."|prompts=FILE.jsonl|heldout=N [OPTIONS]
    graft speculate run=FOLDER prompts=FILE.jsonl tree=search [paths=OUT.json] [OPTIONS]

prompts=FILE.jsonl has one {"prompt": "..."} or {"messages": [...]} a line; the last answer of
messages is left out. A drafter that makes trees of its own ignores tree=.

Each prompt is decoded three times: by transformers' generate, one at a time, by the decoder without
the drafter, and with it, both batch_size at a time. With temperature=0 all three write the same
text; the report counts the texts that differ. In bf16 some may, where two tokens are equally likely
up to rounding.

tree=search finds the static tree that gives the most tokens a second, of at most `size` nodes,
`top_k` children of each and `count` levels, and writes it to paths=OUT.json for tree=static
paths=OUT.json. It measures on the prompts how often the drafter's guess of each rank is right at
each depth, in greedy decoding of one sequence, and how long the passes of target and drafter take
on this machine. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.config import paths
from trainer.config.decoding_options import DrafterOptions, GrowthOptions, SamplingOptions
from trainer.config.options import exit_with, option, parse, values_of

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
Tree = Literal["chain", "static", "eagle2", "dyspec", "search"]
# what a search measures with
SEARCHED = {"temperature": 0.0, "batch_size": 1, "policy": "fixed", "siblings": "without"}


@dataclass(frozen=True)
class Options(GrowthOptions, DrafterOptions, SamplingOptions):
    """What the command line says."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.run_fault)
    prompt: str | None = option("one prompt", None, value="TEXT")
    prompts: str | None = option(
        "a file of prompts", None, value="FILE.jsonl", reads=paths.file_fault
    )
    heldout: int = option("the first N held-out conversations of the run's task", 0, at_least=0)
    max_new_tokens: int = option("of an answer", 128, at_least=1)
    batch_size: int = option("prompts at once", 1, at_least=1)
    # wider than the field that it overrides
    tree: Tree = option(  # type: ignore[assignment]
        "chain: one token after another. static: EAGLE-1's tree, or that of paths=FILE. eagle2:"
        " EAGLE-2's, which extends the top_k likeliest nodes of each level. dyspec: DySpec's, which"
        " extends the likeliest node. search: see above",
        "chain",
    )
    json: Path | None = option("write the result as JSON", None, value="FILE", writes=True)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        yield from super().faults()
        if sum((self.prompt is not None, self.prompts is not None, self.heldout != 0)) != 1:
            yield "give one of prompt, prompts and heldout"
        if self.tree != "search":
            return
        if self.paths and not Path(self.paths).expanduser().parent.is_dir():
            yield f"paths={self.paths}: there is no folder {Path(self.paths).expanduser().parent}"
        if self.drafter not in ("run", "small"):
            yield (
                f"drafter={self.drafter} makes trees of its own: tree=search is for drafter=run"
                " and drafter=small"
            )
        for name, only in SEARCHED.items():
            if getattr(self, name) != only:
                yield (
                    f"{name}={getattr(self, name)}: tree=search measures greedy decoding of one"
                    " sequence, without a policy"
                )


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft speculate")
    from rich import get_console

    from trainer.assembly import quiet
    from trainer.session import failures
    from trainer.storage import atomic

    quiet.quiet()
    try:
        result, report = _measure(options)
    except Exception as error:
        return failures.report_and_exit_code(error)
    for part in report:
        get_console().print(part, soft_wrap=options.tree == "search")
    if options.json:
        atomic.write_output(options.json, json.dumps(result, indent=2) + "\n")
    return 0


def _measure(options: Options) -> tuple[dict[str, Any], Any]:
    """(the result, its report for the console)."""
    from trainer.decoding.sampling import Sampling
    from trainer.evaluation import decode_ways, questions, speedup, tree_search
    from trainer.evaluation.run_drafter import load_run_and_drafter
    from trainer.evaluation.speedup_report import prompts_report
    from trainer.storage import atomic

    search = options.tree == "search"
    settings = values_of(options)
    drafts = decode_ways.DraftOptions(
        **{name: settings[name] for name in asdict(decode_ways.DraftOptions())}
    )
    # A search has the bounds of a dynamic tree; `paths` is where it writes the tree.
    strategy = (replace(drafts, tree="eagle2", paths=None) if search else drafts).strategy()
    file = questions.read_prompts(options.prompts) if options.prompts else None
    run, drafter = load_run_and_drafter(options.run, options)
    one = [[{"role": "user", "content": str(options.prompt)}]]
    prompts, stops = questions.prompt_ids(run, options.heldout, file or one)
    if search:
        limits = tree_search.SearchLimits(
            options.size, options.top_k, options.count, options.max_new_tokens
        )
        result = tree_search.search_tree(run, drafter, prompts, stops, limits)
        result |= {"drafter": options.drafter}
        if options.paths and result["paths"]:
            text = json.dumps(result["paths"]) + "\n"
            atomic.write_output(Path(options.paths).expanduser(), text)
        return result, tree_search.search_report(result, options.paths)
    sampling = Sampling(options.temperature, options.top_p, seed=options.seed)
    ways = decode_ways.Ways(run, drafter, stops, options.max_new_tokens, sampling, strategy)
    results = decode_ways.decode_in_batches(ways, prompts, options.batch_size)
    result = speedup.summary_of_prompts(results, {name: settings[name] for name in RECORDED})
    return result, prompts_report(result)


if __name__ == "__main__":
    exit_with(main)
