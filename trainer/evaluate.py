"""Evaluation: loss, perplexity and accuracy over the held-out rows, and generated answers graded by
the task.

    python -m trainer.evaluate run=FOLDER[@last|best|STEP] [compare=true] [generate=N]
    [batch_size=16] [max_new_tokens=128] [json=FILE]

evaluates a run's model on its task's held-out rows; compare=true does the base alone too. During
training the Evaluation callback does the same. With task=speculation the run's drafter is evaluated
instead: python -m trainer.evaluate task=speculation --help
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

from tasks.reading import DataError
from trainer import drafters
from trainer.evaluation.answers import answers, means
from trainer.evaluation.loss import losses


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from rich import get_console
    from rich.table import Table

    from trainer.assembly import quiet
    from trainer.assembly.rows import add_prompts, load_data
    from trainer.assembly.trained import load_trained
    from trainer.config.errors import bad
    from trainer.config.options import arguments
    from trainer.models.losses import CausalLoss, ClassLoss
    from trainer.session import failures

    if others := [word for word in argv if word.startswith("task=")]:
        from trainer.evaluation import speculation

        if others != ["task=speculation"]:
            return bad(
                f"{others[-1]}: a run is evaluated on its own task, or with task=speculation"
            )
        try:
            return speculation.main([word for word in argv if word != "task=speculation"])
        except Exception as error:
            return failures.report_and_exit_code(error)
    known = {
        "run": ...,
        "compare": False,
        "generate": 0,
        "batch_size": 16,
        "max_new_tokens": 128,
        "json": None,
    }
    options = arguments(argv, known, __doc__ or "")
    for name, least in (("generate", 0), ("batch_size", 1), ("max_new_tokens", 1)):
        if options[name] < least:
            return bad(f"{name}={options[name]}: at least {least}")
    if options["json"] and not Path(options["json"]).parent.is_dir():
        return bad(f"json={options['json']}: there is no such folder")
    quiet.quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = load_trained(options["run"], device)
        data = load_data(found.config, found.base, found.task, train=False)
        if data.held_out is None:
            raise DataError(
                "this run's task has no held-out rows: it had task.eval_fraction=0 and no"
                " task.eval_path"
            )
        add_prompts(data, options["generate"], found.model)
        labelled = found.task.kind == "label"
        target = drafters.Target(found.model) if found.drafter is not None else None
        chunk = found.config["objective"]["logits_chunk"]
        loss = (
            ClassLoss(found.model)
            if labelled
            else CausalLoss(found.model, chunk, found.drafter, target)
        )
        results: dict[str, dict[str, float]] = {}
        for name in ["base", "adapted"] if options["compare"] else ["adapted"]:
            with (
                found.adapter.disabled(found.model) if name == "base" else contextlib.nullcontext()
            ):
                results[name] = losses(loss, data.held_out, options["batch_size"], device)
                if data.held_out.prompts:
                    graded = answers(
                        found.model,
                        data.held_out,
                        options["batch_size"],
                        options["max_new_tokens"],
                        device,
                    )
                    results[name] |= means(graded or [])
    except Exception as error:
        return failures.report_and_exit_code(error)
    table = Table("", *results)
    for metric in next(iter(results.values())):
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in results.values()))
    get_console().print(table)
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
