"""Scores of lm-eval: measured, shown, and added to a run's record of itself."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from typing import Any

from trainer.callbacks.dashboards import Dashboards, make_dashboards
from trainer.config.harness_options import HarnessOptions
from trainer.evaluation import harness, harness_run, harness_table
from trainer.evaluation.harness_run import Measured
from trainer.evaluation.tables import Table
from trainer.exporting import card
from trainer.session import report_html
from trainer.storage import atomic, run_folder
from trainer.storage.journal import Journal

log = logging.getLogger("trainer")


def run(options: HarnessOptions) -> None:
    """Measure a run, print the scores and write them where the options say.

    Raises:
        as harness_run.measure and `record`.
    """
    settings = harness.Settings(
        options.names,
        options.include,
        options.limit,
        options.num_fewshot,
        options.chat,
        options.batch_size,
    )
    measured = harness_run.measure(options.run, settings, options.compare)
    table(measured).show(longest=60)
    if options.json:
        atomic.write_output(options.json, json.dumps(measured.rows, indent=2) + "\n")
    if options.rows:
        atomic.write_output(options.rows, "".join(lines(measured)))
    if options.record:
        record(measured, options.log)


def table(measured: Measured) -> Table:
    """Return the scores side by side with 95 % intervals, and the difference over the same
    rows."""
    rows, differences = measured.rows, measured.differences
    cells = []
    for name in harness_table.names([*rows.values()]):
        line = [name, *(harness_table.text(row, name) for row in rows.values())]
        if differences:
            mean, error = differences.get(name, (None, None))
            values = {name: mean, name + harness_table.STDERR: error}
            line.append(harness_table.text(values, name))
        task = name.rpartition("/")[0]
        cells.append([*line, str(measured.rows["adapted"]["rows"].get(task, ""))])
    more = ["difference"] if differences else []
    return Table(["task and metric", *rows, *more, "rows"], cells)


def lines(measured: Measured) -> Iterator[str]:
    """Yield a JSON line of each row that was asked: prompt, expected, answer and grades."""
    for which, scores in measured.scores.items():
        for task, samples in scores.samples.items():
            for sample in samples:
                line = {
                    "model": which,
                    "task": task,
                    "row": sample["doc_id"],
                    "filter": sample["filter"],
                    "prompts": [arguments[0] for arguments in sample["arguments"]],
                    "expected": sample["target"],
                    "answers": sample["filtered_resps"],
                    "scores": {metric: sample.get(metric) for metric in sample["metrics"]},
                }
                yield json.dumps(line, ensure_ascii=False, default=str) + "\n"


def record(measured: Measured, to_dashboards: bool) -> None:
    """Append the scores to the run's journal, and write its report and the cards of its results
    again. With `to_dashboards` send them to its dashboards, too; these raise nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = measured.folder
    with Dashboards() as dashboards:
        if to_dashboards:
            dashboards.all = _dashboards_of(folder)
        journal = Journal(folder, dashboards.all)
        for values in measured.rows.values():
            journal.write(harness.KIND, measured.step, values)
    log.info("report: %s", report_html.write(folder))
    for name, kind in (("adapter", "adapter"), ("drafter", "drafter")):
        if (folder / name).is_dir():
            card.refresh(folder / name, kind, folder)


def _dashboards_of(folder: Any) -> list[Any]:
    content = run_folder.read(str(folder))[1]
    config = copy.deepcopy(content["config"])
    if not any(config["logger"].values()):
        log.warning("log=true: this run was made with logger=none")
    for node in filter(None, config["logger"].values()):
        # The run has ended: nothing is uploaded or announced again.
        node |= {key: False for key in ("alerts", "artifacts") if key in node}
    return make_dashboards(config, folder, content)
