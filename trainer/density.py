"""Measure how dense a run's MLP activations are, and what leaving out small ones costs.

    graft density run=FOLDER[@last|best|STEP] [OPTIONS]

This command measures the input of each down projection on the task's held-out rows, for the base
and with the adapter. It prints a table and writes density.json and density.svg into the run folder.

    non-zero      share of activations that are not exactly 0. A SiLU is never exactly 0, and a GELU
                  only far below it, so look at the next columns
    above tau     share with |h| > tau. tau is what the run's penalty was calibrated to, else the
                  layer's median |h| before training; both models have the same. A model can make h
                  small and the weights behind it large, so look at the next columns
    CETT at 50%   mean over tokens of ‖Σ_inactive h_j W_j‖ / ‖W h‖ where half of the neurons, those
                  with the least |h_j| ‖W_j‖, are inactive (CETT: ReLU² Wins, arXiv 2402.03804). No
                  scale of h changes it
    PPL-p%        share of neurons that are set to 0 in every MLP while the loss rises by no more
                  than ln(1 + p/100): one CETT value for all layers, searched by bisection (Sparsing
                  Law, arXiv 2411.02335)

W is the weight that the adapted layer applies. Thresholds come from a sample of the tokens; shares
and losses are of all held-out rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.config import paths
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    compare: bool = option("measure the base as well", True)
    tau: float | None = option("one threshold for all layers", None, value="NUMBER", at_least=0)
    ppl: float = option("the p of PPL-p%; 0 leaves it out", 1.0, at_least=0)
    batch_size: int = option("rows at once", 16, at_least=1)
    json: Path | None = option(
        "the file to write instead of density.json", None, value="FILE", writes=True
    )


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft density")
    from rich import get_console

    from trainer.assembly import quiet
    from trainer.evaluation import mlp_density
    from trainer.session import failures
    from trainer.storage import atomic

    quiet.quiet()
    try:
        run, results = mlp_density.measure_run(
            options.run, options.compare, options.tau, options.ppl, options.batch_size
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    get_console().print(mlp_density.density_table(results, options.ppl))
    for name, result in results.items():
        for line in mlp_density.summary_lines(name, result):
            say(line)
    text = json.dumps({"step": run.step, **results}, indent=2) + "\n"
    atomic.write_text(options.json or run.folder / "density.json", text)
    mlp_density.plot(results, options.ppl, run.folder / "density.svg")
    say(run.folder / "density.svg")
    return 0


if __name__ == "__main__":
    exit_with(main)
