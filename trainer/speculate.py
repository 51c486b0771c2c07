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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.decoding_options import MeasureOptions
from trainer.config.options import exit_with, option, parse

Tree = Literal["chain", "static", "eagle2", "dyspec", "search"]
# what a search measures with
SEARCHED = {"temperature": 0.0, "batch_size": 1, "policy": "fixed", "siblings": "without"}


@dataclass(frozen=True)
class Options(MeasureOptions):
    """The options of the command line."""

    prompt: str | None = option("one prompt", None, value="TEXT")
    batch_size: int = option("prompts at once", 1, at_least=1)
    # wider than the field that it overrides
    tree: Tree = option(  # type: ignore[assignment]
        "chain: one token after another. static: EAGLE-1's tree, or that of paths=FILE. eagle2:"
        " EAGLE-2's, which extends the top_k likeliest nodes of each level. dyspec: DySpec's, which"
        " extends the likeliest node. search: see above",
        "chain",
    )

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
    from trainer.evaluation import drafter_measures
    from trainer.evaluation.speedup_report import prompts_report
    from trainer.evaluation.tree_search import search_report
    from trainer.session import failures
    from trainer.storage import atomic

    quiet.quiet()
    searches = options.tree == "search"
    try:
        if searches:
            result = drafter_measures.search(options, options.prompt)
        else:
            result = drafter_measures.by_prompt(options, options.prompt, options.batch_size)
    except Exception as error:
        return failures.report_and_exit_code(error)
    for part in search_report(result, options.paths) if searches else prompts_report(result):
        get_console().print(part, soft_wrap=searches)
    if options.json:
        atomic.write_output(options.json, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
