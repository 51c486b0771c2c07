"""Print how large an adapter is, and how much it changes each layer.

    graft sizes run=FOLDER[@last|best|STEP] [OPTIONS]

The table has a row for each adapted layer: bytes in the adapter's file, trained parameters, and
three numbers of the merged update D = W' - W: the share of entries that are not zero, |D| / |W| in
Frobenius norm, and the effective rank exp(-Σ p log p), where p are the singular values divided by
their sum (Roy and Vetterli 2007).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import paths
from trainer.config.options import exit_with, option, parse


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    spectrum: bool = option(
        "print the effective rank, which takes a singular value decomposition of each dense D",
        True,
    )
    json: Path | None = option("write the table as JSON", None, value="FILE", writes=True)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft sizes")
    from trainer.assembly import quiet
    from trainer.assembly.trained import load_trained
    from trainer.evaluation.adapter_sizes import sizes
    from trainer.session import failures
    from trainer.storage import atomic

    quiet.quiet()
    try:
        # A packed weight cannot be merged into.
        layers = sizes(load_trained(options.run, fp32=True, dequantise=True), options.spectrum)
    except Exception as error:
        return failures.report_and_exit_code(error)
    _print_table(layers)
    if options.json:
        text = json.dumps([asdict(size) for size in layers], indent=2) + "\n"
        atomic.write_output(options.json, text)
    return 0


def _print_table(layers: list[Any]) -> None:
    from rich import get_console
    from rich.table import Table

    table = Table("module", "bytes", "parameters", "density", "norm / base's", "effective rank")
    for size in layers:
        shares = (size.density, size.norm, size.rank)
        cells = (
            "" if share is None else text.format(share)
            for share, text in zip(shares, ("{:.4%}", "{:.3g}", "{:.1f}"), strict=True)
        )
        table.add_row(size.module, f"{size.bytes:,}", f"{size.parameters:,}", *cells)
    table.add_section()
    totals = [sum(getattr(size, key) for size in layers) for key in ("bytes", "parameters")]
    table.add_row("all", *(f"{total:,}" for total in totals))
    get_console().print(table)


if __name__ == "__main__":
    exit_with(main)
