"""How dense a run's activations are, per MLP and in mean, and what it costs to leave out the small
ones.

    python -m trainer.density run=FOLDER[@last|best|STEP] [compare=true] [tau=NUMBER] [ppl=1.0]
    [batch_size=16] [json=FILE]

measures the input of each down projection on the task's held-out rows, for the base and with the
adapter (compare=false: with it only), prints a table, and writes density.json and density.svg into
the run folder.

    non-zero    share of activations that are not exactly 0. A SiLU is never exactly 0, and a GELU only far below it: look on
    above tau   share with |h| > tau. tau is what the run's penalty was calibrated to, else the layer's median |h| before training,
                the same for both models. A model can make h small and the weights behind it large,
                so look on
    CETT at 50% mean over tokens of ‖Σ_inactive h_j W_j‖ / ‖W h‖ where half of the neurons, those
    with the least |h_j| ‖W_j‖,
                are inactive (CETT: ReLU² Wins, arXiv 2402.03804); no scale of h changes it
    PPL-p%      share of neurons that are really set to 0 in every MLP while the loss rises by no more than ln(1 + p/100): one CETT
                value for all layers, found by halving (Sparsing Law, arXiv 2411.02335); ppl=0
                leaves it out

W is what the adapted layer applies. Thresholds come from a sample of the tokens; shares and losses
are of all held-out rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tasks.reading import DataError
from trainer.assembly import quiet
from trainer.assembly.rows import load_data
from trainer.assembly.trained import load_trained
from trainer.evaluation.mlp_density import Rows, density_table, measured, plot
from trainer.models.losses import CausalLoss, ClassLoss
from trainer.penalties.deft import mlp_inputs
from trainer.storage import atomic, checkpoints, run_folder


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from rich import get_console

    from trainer.config.errors import bad
    from trainer.config.options import arguments
    from trainer.session import failures

    known = {"run": ..., "compare": True, "tau": None, "ppl": 1.0, "batch_size": 16, "json": None}
    options = arguments(argv, known, __doc__ or "")
    if options["batch_size"] < 1:
        return bad(f"batch_size={options['batch_size']}: at least 1")
    if not 0 <= options["ppl"] < math.inf:
        return bad(f"ppl={options['ppl']}: a percentage of at least 0")
    try:
        tau = None if options["tau"] is None else float(options["tau"])
    except ValueError:
        tau = -1.0
    if tau is not None and not 0 <= tau < math.inf:
        return bad(f"tau={options['tau']}: a number of at least 0")
    if options["json"] and not Path(options["json"]).parent.is_dir():
        return bad(f"json={options['json']}: there is no such folder")
    quiet.quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = load_trained(options["run"], device)
        layers = mlp_inputs(found.model, (found.config.get("penalty") or {}).get("modules", "auto"))
        data = load_data(found.config, found.base, found.task, train=False)
        if data.held_out is None:
            raise DataError(
                "this run's task has no held-out rows: it had task.eval_fraction=0 and no"
                " task.eval_path"
            )
        labelled = found.task.kind == "label"
        loss = (
            ClassLoss(found.model)
            if labelled
            else CausalLoss(found.model, found.config["objective"]["logits_chunk"])
        )
        rows = Rows(loss, data.held_out, options["batch_size"], device)
        taus = [tau] * len(layers) if tau is not None else _of_the_penalty(options["run"])
        results: dict[str, dict[str, Any]] = {}
        for name in ["base", "adapted"] if options["compare"] else ["adapted"]:
            with (
                found.adapter.disabled(found.model) if name == "base" else contextlib.nullcontext()
            ):
                taus = taus or rows.medians(layers)
                results[name] = measured(layers, rows, taus, options["ppl"])
    except Exception as error:
        return failures.report_and_exit_code(error)
    get_console().print(density_table(results, options["ppl"]))
    for name, result in results.items():
        for line in _told(name, result):
            print(line)
    text = json.dumps({"step": found.step, **results}, indent=2) + "\n"
    atomic.write_text(
        Path(options["json"]) if options["json"] else found.folder / "density.json", text
    )
    plot(results, options["ppl"], found.folder / "density.svg")
    print(found.folder / "density.svg")
    return 0


def _of_the_penalty(run: str) -> list[float] | None:
    """What the run's penalty was calibrated to, if it had one."""
    place, _, which = run_folder.read(run)
    saved = checkpoints.load(checkpoints.chosen(place / "checkpoints", which))
    return saved["penalty"]["tau"] if "penalty" in saved else None


def _told(name: str, result: dict[str, Any]) -> Iterator[str]:
    yield f"{name}: loss {result['loss']:.4f}"
    if "ppl" in result:
        ppl = result["ppl"]
        yield (
            f"{name}: with {result['mean']['ppl_sparsity']:.1%} of the neurons set to 0 (CETT"
            f" {ppl['cett']:.4f}) exp(loss) is {ppl['ratio']:.4f} times as large"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
