"""Choose rows of a pool to train on: for a target, or without one.

    graft select run=RUN keep=0.1 by=gradient target=FILE to=ROWS.jsonl [task.path=POOL] [OPTIONS]

The pool is the run's training rows, or those of task.path=POOL in the same format. The chosen rows
are written as they are, for task.path=ROWS.jsonl; ROWS.select.json says why each was chosen.

    gradient    the rows whose gradients point where the targets' do, target by target in turn
    transport   the same, with the last round decided by optimal transport (TAROT)
    leverage    rows drawn by how much their gradients differ from all others
    perplexity  the rows whose loss is nearest to the median
    random      drawn, to compare with

Gradients are those of the run's adapter, after a warm-up of some 50 steps: graft adapter=lora
max_steps=50 name=warm. They are sketched to `dims` numbers a row, which are on disk while the
command runs. The same command resumes where it was stopped. Rows that are targets, too, are left
out of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import paths
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.shown import say

TARGETED = ("gradient", "transport")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str = option(
        "the run whose model judges", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault
    )
    to: Path = option("the file to write", value="ROWS.jsonl", writes=True)
    keep: int | float = option(
        "rows to keep: their number, or a share below 1", value="0.1", above=0
    )
    by: Literal["gradient", "transport", "leverage", "perplexity", "random"] = option(
        "how to choose", "gradient"
    )
    target: str | None = option(
        "gradient, transport: rows to choose for; eval takes the run's held-out rows", None,
        value="FILE|eval",
    )  # fmt: skip
    dims: int | None = option(
        "numbers that a gradient is sketched to, by default 64 to 1024 by the pool's size", None,
        value="512", at_least=2, at_most=8192,
    )  # fmt: skip
    seed: int = option("seed of sketches and draws", 0, at_least=0)
    task: tuple[str, ...] = rest(
        "the pool, as task.path=FILE", "task.KEY=VALUE", lambda key: key.startswith("task.")
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if self.to.suffix != ".jsonl":
            yield f"to={self.to}: expected the name of a .jsonl file"
        if isinstance(self.keep, float) and self.keep >= 1:
            yield f"keep={self.keep}: expected a whole number of rows, or a share below 1"
        if self.by in TARGETED and self.target is None:
            yield f"missing: target=FILE, the rows that by={self.by} chooses for"
        if self.target is not None and self.by not in TARGETED:
            yield f"target={self.target} has no effect with by={self.by}"
        if self.dims is not None and self.by not in (*TARGETED, "leverage"):
            yield f"dims={self.dims} has no effect with by={self.by}"
        files = [("target", self.target)] if self.target not in (None, "eval") else []
        words = [(key, path) for key, _, path in (word.partition("=") for word in self.task)]
        for key, path in [*files, *(word for word in words if word[0] == "task.path")]:
            yield from paths.rows_problems(str(path), key)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft select")
    from trainer.assembly import quiet
    from trainer.selection.selected import Plan, select
    from trainer.session import failures

    quiet.quiet()
    plan = Plan(
        options.run, options.by, options.keep, options.to, options.target, options.task,
        options.dims, options.seed,
    )  # fmt: skip
    try:
        result = select(plan)
    except Exception as error:
        return failures.report_and_exit_code(error)
    if result.removed:
        say(f"{result.removed} rows of the pool are targets, too, and were left out")
    for_targets = f" for {result.targets} targets" if result.targets else ""
    say(
        f"{result.rows:,} of {result.pool:,} rows{for_targets}, {result.tokens:,} of"
        f" {result.pool_tokens:,} trained tokens\n{result.to}\n{result.record}"
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
