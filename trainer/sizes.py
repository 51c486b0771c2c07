"""How large an adapter is, and how large what it does to each layer.

    python -m trainer.sizes run=FOLDER[@last|best|STEP] [spectrum=true] [json=FILE]

Per adapted layer: bytes in the adapter's file, trained parameters, and of the merged update D = W'
- W the share of entries that are not zero, |D| / |W| in Frobenius norm, and the effective rank
exp(-Σ p log p), p the singular values over their sum (Roy and Vetterli 2007). spectrum=false leaves
the rank out, which takes a singular value decomposition of each dense D.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from trainer.assembly import quiet
from trainer.assembly.trained import load_trained
from trainer.evaluation.adapter_sizes import Size, sizes


def _told(layers: list[Size]) -> None:
    from rich import get_console
    from rich.table import Table

    table = Table("module", "bytes", "parameters", "density", "norm / base's", "effective rank")
    for size in layers:
        shares = (size.density, size.norm, size.rank)
        told = (
            "" if share is None else text.format(share)
            for share, text in zip(shares, ("{:.4%}", "{:.3g}", "{:.1f}"), strict=True)
        )
        table.add_row(size.module, f"{size.bytes:,}", f"{size.parameters:,}", *told)
    table.add_section()
    table.add_row(
        "all",
        *(f"{sum(getattr(size, key) for size in layers):,}" for key in ("bytes", "parameters")),
    )
    get_console().print(table)


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config.errors import bad
    from trainer.config.options import arguments
    from trainer.session import failures

    options = arguments(argv, {"run": ..., "spectrum": True, "json": None}, __doc__ or "")
    if options["json"] and not Path(options["json"]).parent.is_dir():
        return bad(f"json={options['json']}: there is no such folder")
    quiet.quiet()
    try:
        # A packed weight cannot be merged into.
        layers = sizes(
            load_trained(options["run"], fp32=True, dequantise=True), options["spectrum"]
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    _told(layers)
    if options["json"]:
        Path(options["json"]).write_text(
            json.dumps([asdict(size) for size in layers], indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
