"""Merge the adapters of several runs of one base into one adapter.

    graft merge runs=[RUN,RUN,...] to=FOLDER [method=METHOD] [weights=[W,W,...]] [OPTIONS]

The output is an adapter that stock PEFT loads, with the tokenizer and the chat template of the
runs. It is complete only after it was loaded back and gave the logits of the update that was meant.
merge.json next to it has the runs, the method and the figures.

    cat              the weighted sum, exactly: ranks add up, supports are united (the default)
    svd              the same sum, cut to a rank
    linear           the sum of the factors: smaller, a rough approximation of the sum
    ties             the largest entries, and only those whose sign most runs share
    dare_linear      a random part of the entries, the rest dropped
    dare_ties        both
    magnitude_prune  the largest entries

ties, dare and magnitude_prune take density=, the share of entries to keep, and act on the factors
A and B. With _svd at the end (ties_svd) they act on the whole update and cut it to a rank.
adapters/combine.py has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import paths
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say

Method = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
PRUNE = ("ties", "dare", "magnitude")  # the methods that take density


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    runs: str = option(
        "the runs, each FOLDER[@last|best|STEP]", value="[RUN,RUN,...]", reads=paths.runs_fault
    )
    to: Path = option("the folder to write", value="FOLDER", writes="folder")
    method: Method = option("how to merge", "cat")
    weights: str | None = option(
        "weights of the runs, by default 1 / the number of runs; 1 for ties, which take means",
        None,
        value="[W,W,...]",
    )
    density: float | None = option(
        "ties, dare, magnitude_prune: share of entries to keep", None, value="0.2", above=0,
        at_most=1,
    )  # fmt: skip
    rank: int | None = option(
        "svd: the rank of the result, by default the largest of the runs", None, value="16",
        at_least=1,
    )  # fmt: skip
    seed: int = option("dare: seed of the random draws", 0, at_least=0)
    evaluate: bool = option("measure each run's held-out rows, with its adapter and merged", True)

    @property
    def numbers(self) -> list[float]:
        """The weights."""
        count = len(paths.listed(self.runs))
        if self.weights is None:
            return [1.0 if "ties" in self.method else 1 / count] * count
        return [float(text) for text in paths.listed(self.weights)]

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        runs = paths.listed(self.runs)
        if len(runs) < 2:
            yield f"runs={self.runs}: expected two or more, as runs=[runs/a,runs/b]"
            return
        if len(set(runs)) < len(runs):
            yield f"runs={self.runs}: a run is there twice; give it a larger weight instead"
        try:
            numbers = self.numbers
        except ValueError:
            yield f"weights={self.weights}: expected numbers, as weights=[0.5,0.5]"
            return
        if len(numbers) != len(runs):
            yield f"weights={self.weights}: {len(numbers)} weights for {len(runs)} runs"
        elif not all(map(math.isfinite, numbers)) or not any(numbers):
            yield f"weights={self.weights}: expected finite numbers, not all zero"
        prunes = self.method.startswith(PRUNE)
        if prunes and self.density is None:
            yield f"missing: density=0.5, the share of entries that method={self.method} keeps"
        if self.density is not None and not prunes:
            yield f"density={self.density:g} has no effect with method={self.method}"
        if self.rank is not None and not self.method.endswith("svd"):
            yield f"rank={self.rank} has no effect with method={self.method}"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft merge")
    from rich import get_console

    from adapters.combine import Combination
    from trainer.assembly import quiet
    from trainer.exporting.combined import losses_table, merge
    from trainer.session import failures

    quiet.quiet()
    how = Combination(
        options.method, tuple(options.numbers), options.density, options.rank, options.seed
    )
    try:
        result = merge(paths.listed(options.runs), how, options.to, options.evaluate)
    except Exception as error:
        return failures.report_and_exit_code(error)
    if result.losses:
        get_console().print(losses_table(result))
    if options.method != "cat":
        say(f"the update differs from the runs' weighted sum by {result.from_sum:.1%} of its norm")
    say(
        f"{result.out}\nloaded back and compared: logits differ by {result.difference:.2e} of their"
        " spread"
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
