"""Evaluate a run's model on its held-out rows: loss, accuracy, graded answers.

    graft evaluate run=FOLDER[@last|best|STEP] [OPTIONS]

Metrics are loss, perplexity and accuracy over the rows, and with generate=N the task's grades of N
generated answers. During training the Evaluation callback measures the same. task.eval_path=FILE
takes other rows than those that the run held out.

With task=speculation the run's drafter is evaluated instead: graft evaluate task=speculation --help

With harness=TASKS lm-eval asks its benchmarks, or yours: graft evaluate harness=TASKS --help
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import paths
from trainer.config.decoding_options import MeasureOptions
from trainer.config.errors import bad
from trainer.config.harness_options import HARNESS, HarnessOptions
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.shown import say

SPECULATION = """\
Measure speculative decoding on a set of prompts, against the target alone, in one run.

    graft evaluate task=speculation run=FOLDER[@last|best|STEP] [OPTIONS]

prompts=FILE.jsonl has Spec-Bench's layout, {"question_id": 81, "category": "writing", "turns":
["...", "..."]} a line, or that of graft speculate. Without it the questions are the first `heldout`
conversations that the run holds out. A later turn follows the target's own answers to those before.

Each prompt is decoded three times, one sequence at a time: by transformers' generate, by the
decoder without the drafter, and with it. The table shows tau (tokens of a target pass, including
the target's own), the acceptance of each draft position (conditional, and over all passes that
verified a draft), and the speed-up (new tokens per second over another way's, including the
prompt's pass). Intervals are 95 % of bootstraps over the questions, all turns of one together.
"""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    compare: bool = option("evaluate the base as well", False)
    generate: int = option("answers to generate and grade", 0, at_least=0)
    batch_size: int = option("rows at once", 16, at_least=1)
    max_new_tokens: int = option("most tokens of a generated answer", 128, at_least=1)
    json: Path | None = option("write the metrics as JSON", None, value="FILE", writes=True)
    rows: Path | None = option(
        "write loss, answer and scores of each row", None, value="FILE.jsonl", writes=True
    )
    task: tuple[str, ...] = rest(
        "other rows, as task.eval_path=FILE", "task.KEY=VALUE", lambda key: key.startswith("task.")
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        for word in self.task:
            key, _, path = word.partition("=")
            if key == "task.eval_path":
                yield from paths.rows_problems(path, key)


@dataclass(frozen=True)
class SpeculationOptions(MeasureOptions):
    """The options of the command line, with task=speculation."""

    prompts: str | None = option(
        "a file of questions", None, value="FILE.jsonl", reads=paths.file_fault
    )
    heldout: int = option("held-out conversations to ask without a file", 16, at_least=1)
    each: int = option("questions of each category, 0 for all", 0, at_least=0)
    compared: int = option("questions that all ways decode, spread evenly; 0: all", 0, at_least=0)
    max_new_tokens: int = option("most tokens of an answer", 128, at_least=2)
    plot: Path | None = option("draw the result", None, value="FILE.svg", writes=True)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    if any(word.partition("=")[0] == "harness" for word in argv):
        return _harness(argv)
    if tasks := [word for word in argv if word.startswith("task=")]:
        if tasks != ["task=speculation"]:
            return bad(f"{tasks[-1]}: a run is evaluated on its own task, or with task=speculation")
        return _speculation([word for word in argv if word != "task=speculation"])
    options = parse(Options, argv, __doc__, "graft evaluate")
    from rich import get_console
    from rich.table import Table

    from trainer.assembly import quiet
    from trainer.evaluation.run_metrics import run_metrics
    from trainer.session import failures
    from trainer.storage import atomic

    quiet.quiet()
    rows: list[dict[str, Any]] | None = [] if options.rows else None
    try:
        results = run_metrics(
            options.run,
            options.compare,
            options.generate,
            options.batch_size,
            options.max_new_tokens,
            options.task,
            rows,
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    table = Table("", *results)
    for metric in next(iter(results.values())):
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in results.values()))
    get_console().print(table)
    if options.json:
        atomic.write_output(options.json, json.dumps(results, indent=2) + "\n")
    if options.rows:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows or []]
        atomic.write_output(options.rows, "".join(lines))
    return 0


def _speculation(argv: list[str]) -> int:
    options = parse(SpeculationOptions, argv, SPECULATION, "graft evaluate task=speculation")
    from rich import get_console

    from trainer.assembly import quiet
    from trainer.evaluation import drafter_measures, speedup_report
    from trainer.session import failures
    from trainer.storage import atomic

    quiet.quiet()
    try:
        summary = drafter_measures.by_category(options, options.each, _report, options.compared)
    except Exception as error:
        return failures.report_and_exit_code(error)
    for part in speedup_report.categories_report(summary):
        get_console().print(part)
    if options.json:
        atomic.write_output(options.json, json.dumps(summary, indent=2) + "\n")
    if options.plot:
        speedup_report.plot(summary, options.plot)
    return 0


def _harness(argv: list[str]) -> int:
    options = parse(HarnessOptions, argv, HARNESS, "graft evaluate harness=TASKS")
    from trainer.assembly import quiet
    from trainer.session import benchmarks, failures

    quiet.quiet()
    try:
        benchmarks.run(options)
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


def _report(text: str) -> None:
    say(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_with(main)
