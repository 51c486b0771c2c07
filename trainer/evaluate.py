"""Evaluate a run's model on its held-out rows: loss, accuracy, graded answers.

    graft evaluate run=FOLDER[@last|best|STEP] [OPTIONS]

Metrics are loss, perplexity and accuracy over the rows, and with generate=N the task's grades of N
generated answers. During training the Evaluation callback measures the same.

With task=speculation the run's drafter is evaluated instead: graft evaluate task=speculation --help
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import bad
from trainer.config.options import exit_with, option, parse


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]")
    compare: bool = option("evaluate the base as well", False)
    generate: int = option("answers to generate and grade", 0, at_least=0)
    batch_size: int = option("rows at once", 16, at_least=1)
    max_new_tokens: int = option("of a generated answer", 128, at_least=1)
    json: Path | None = option("write the metrics as JSON", None, value="FILE", writes=True)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    if tasks := [word for word in argv if word.startswith("task=")]:
        if tasks != ["task=speculation"]:
            return bad(f"{tasks[-1]}: a run is evaluated on its own task, or with task=speculation")
        from trainer.evaluation import speculation
        from trainer.session import failures

        try:
            return speculation.main([word for word in argv if word != "task=speculation"])
        except Exception as error:
            return failures.report_and_exit_code(error)
    options = parse(Options, argv, __doc__, "graft evaluate")
    from rich import get_console
    from rich.table import Table

    from trainer.assembly import quiet
    from trainer.evaluation.run_metrics import run_metrics
    from trainer.session import failures

    quiet.quiet()
    try:
        results = run_metrics(
            options.run,
            options.compare,
            options.generate,
            options.batch_size,
            options.max_new_tokens,
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    table = Table("", *results)
    for metric in next(iter(results.values())):
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in results.values()))
    get_console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
