"""Compress a run's adapter, and print what that costs in held-out loss.

    graft compress run=FOLDER[@last|best|STEP] method=compeft|dare|darex_q|levels [OPTIONS]
    graft compress expand=FOLDER out=FOLDER

compeft keeps the signs of the largest entries of each tensor and one scale; with scope=run, as its
paper has it, the largest of all tensors and one scale for all. dare drops entries at
random and divides the others by 1 - drop; darex_q divides them by q. levels packs what
adapter=bilora trained to its bits, without a loss. adapters/compress.py has the
formulas and papers. auto tries a grid on training rows and takes the value of least loss.

The output is an adapter that stock PEFT loads, at full size. It is complete only after it was
loaded back and gave the compressed model's own logits. Next to it, compact.safetensors holds the
same in few bits; with adapter_config.json it is all that expand= needs to write the adapter again,
without a base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import paths
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say

# the options that each method takes
SETTINGS = {
    "compeft": ("keep", "alpha", "scope"),
    "dare": ("drop", "seed"),
    "darex_q": ("drop", "q", "seed"),
    "levels": (),
}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str | None = option(
        "the run folder", None, value="FOLDER[@last|best|STEP]", reads=paths.saved_fault
    )
    expand: Path | None = option("a compressed adapter to expand", None, value="FOLDER")
    method: Literal["compeft", "dare", "darex_q", "levels"] | None = option("how to compress", None)
    keep: float | None = option(
        "compeft: share of entries to keep, 0.2 by default", None, value="0.2", above=0, at_most=1
    )
    alpha: float | Literal["auto"] | None = option(
        "compeft: factor of the scale", None, value="auto|NUMBER", above=0
    )
    drop: float | None = option(
        "dare, darex_q: share of entries to drop, 0.9 by default",
        None,
        value="0.9",
        at_least=0,
        below=1,
    )
    q: float | Literal["auto"] | None = option(
        "darex_q: divisor, from 1 - drop to 1", None, value="auto|NUMBER"
    )
    seed: int | None = option("dare, darex_q: seed of the draws", None, value="0", at_least=0)
    scope: Literal["tensor", "run"] | None = option("compeft: threshold and scale of each", None)
    factors: Literal["both", "B"] | None = option(
        "what to compress of a low-rank pair: both by default for compeft, else B", None
    )
    out: Path | None = option(
        "the folder to write, by default METHOD in the run folder", None, value="FOLDER",
        writes="folder",
    )  # fmt: skip
    evaluate: bool = option("measure the held-out loss before and after", True)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        numbers = ("keep", "alpha", "drop", "q", "seed", "scope")
        if (self.run is None) == (self.expand is None):
            yield "give either run=FOLDER or expand=FOLDER"
        elif self.expand is not None:
            others = ("method", "factors", *numbers)
            if self.out is None or any(getattr(self, key) is not None for key in others):
                yield "expand=FOLDER takes out=FOLDER and nothing else"
        elif self.method is None:
            yield f"missing: method={'|'.join(SETTINGS)}"
        else:
            takes = SETTINGS[self.method]
            for key in numbers:
                if getattr(self, key) is not None and key not in takes:
                    yield (
                        f"{key}={getattr(self, key)} has no effect with method={self.method},"
                        f" which takes {', '.join(takes) or 'none of them'}"
                    )
            least = 1 - (0.9 if self.drop is None else self.drop)
            if isinstance(self.q, float) and not least <= self.q <= 1:
                yield f"q={self.q:g}: expected auto, or from 1 - drop = {least:g} to 1"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft compress")
    from rich import get_console

    from trainer.assembly import quiet
    from trainer.exporting.compact import Choice, compress, expand, sizes_table, summary_lines
    from trainer.session import failures

    try:
        if options.expand is not None and options.out is not None:
            expand(options.expand, options.out)
            say(options.out)
            return 0
        quiet.quiet()
        assert options.run is not None
        assert options.method is not None
        strength = options.alpha if options.method == "compeft" else options.q
        choice = Choice.of(
            options.method, options.factors, options.keep, options.drop, strength, options.seed,
            options.scope,
        )  # fmt: skip
        result = compress(options.run, choice, options.out, options.evaluate)
    except Exception as error:
        return failures.report_and_exit_code(error)
    get_console().print(sizes_table(result))
    for line in summary_lines(result, "alpha" if options.method == "compeft" else "q"):
        say(line)
    return 0


if __name__ == "__main__":
    exit_with(main)
