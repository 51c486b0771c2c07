"""A run's adapter in few bits: what is left of it, what that costs in held-out loss, and a file
that says only that.

    python -m trainer.compress run=FOLDER[@last|best|STEP] method=compeft [keep=0.2]
    [alpha=auto|FLOAT] [OPTIONS]
    python -m trainer.compress run=FOLDER[@last|best|STEP] method=dare    [drop=0.9] [seed=0] [OPTIONS]
    python -m trainer.compress run=FOLDER[@last|best|STEP] method=darex_q [drop=0.9] [seed=0] [q=auto|FLOAT] [OPTIONS]
    python -m trainer.compress expand=FOLDER out=FOLDER

    OPTIONS  [factors=both|B] [out=FOLDER] [evaluate=true]

compeft keeps the signs of the largest entries of each tensor and one scale; dare drops entries at
random and divides the others by 1 - drop, darex_q by q (adapters/compress.py has the formulas and
papers). auto tries a grid on training rows and takes the one of least loss. Of a low-rank pair
compeft compresses both factors and the others B alone, unless factors= says otherwise.

OUT is an adapter that stock PEFT loads, at full size, called done only after it was loaded back and
gave the compressed model's own logits. Beside it, compact.safetensors holds the same in few bits;
with adapter_config.json it is all that expand= needs to write that adapter again, without a base.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.assembly import quiet
from trainer.exporting.compact import Choice, Compressed, _choice, compress, expand


def _told(result: Compressed, choice: Choice) -> None:
    from rich import get_console
    from rich.table import Table

    table = Table("", "before", "after")
    table.add_row(
        "bytes",
        f"{result.before:,}",
        f"{result.after:,} ({result.before / result.after:.1f}x smaller)",
    )
    table.add_row(
        "bits per parameter",
        *(f"{8 * size / result.parameters:.2f}" for size in (result.before, result.after)),
    )
    if result.loss_before is not None and result.loss_after is not None:
        table.add_row("held-out loss", f"{result.loss_before:.4f}", f"{result.loss_after:.4f}")
    get_console().print(table)
    name = "alpha" if choice.method == "compeft" else "q"
    if result.searched:
        tried = ", ".join(
            f"{strength:.3g}: {loss:.4f}" for strength, loss in result.searched.items()
        )
        print(f"{name}={result.strength:.4g}, of least loss on {result.searched_on} ({tried})")
        if "held-out" in result.searched_on:
            print("searched on held-out rows: the held-out loss after is better than on others")
        if result.strength == max(result.searched):
            print(
                f"that is the end of the grid: {name} further on may be better"
                if name == "alpha"
                else "that is as little as q scales"
            )
    print(
        f"{result.out}\nloaded back and compared: logits differ by {result.difference:.2e} of their"
        " spread"
    )


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config.errors import bad
    from trainer.config.options import arguments
    from trainer.session import failures

    known = dict.fromkeys(
        ("run", "expand", "method", "keep", "drop", "q", "alpha", "factors", "seed", "out")
    ) | {"evaluate": True}
    options = arguments(argv, known, __doc__ or "")
    if (options["run"] is None) == (options["expand"] is None):
        return bad(f"give either run=FOLDER or expand=FOLDER\n\n{__doc__}")
    if options["expand"] is not None:
        others = [
            key
            for key in known
            if key not in ("expand", "out", "evaluate") and options[key] is not None
        ]
        if others or options["out"] is None:
            return bad("expand=FOLDER takes out=FOLDER and nothing else")
        try:
            expand(Path(options["expand"]), Path(options["out"]))
        except Exception as error:
            return failures.report_and_exit_code(error)
        print(options["out"])
        return 0
    try:
        choice = _choice(options)
    except ValueError as error:
        return bad(str(error))
    quiet.quiet()
    try:
        result = compress(
            options["run"],
            choice,
            Path(options["out"]) if options["out"] else None,
            options["evaluate"],
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    _told(result, choice)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
