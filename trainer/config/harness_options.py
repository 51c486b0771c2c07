"""Options of graft evaluate harness=TASKS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import paths
from trainer.config.options import option

HARNESS = """\
Let lm-eval evaluate a run's model, with its adapter un-merged, and its base next to it.

    graft evaluate harness=TASKS run=FOLDER[@last|best|STEP] [OPTIONS]

    graft evaluate harness=arc_easy,hellaswag run=runs/mine limit=200
    graft evaluate harness=mine* include=my_tasks run=runs/mine chat=true

Tasks, grades and standard errors are lm-eval's, from the package lm-eval (extra `eval`); `lm-eval
ls tasks` lists the names, which may have * in them. ± in the table is a 95 % interval: 1.96 of
lm-eval's standard errors. The difference is over the same rows, so its interval is its own.

include=FOLDER has tasks of your own as lm-eval's YAML files. Their data may be local files. Such a
folder is code: its files may name Python functions. Include only what you trust.

The scores are added to metrics.jsonl and report.html of the run, and to the cards of its results.
"""


@dataclass(frozen=True)
class HarnessOptions:
    """The options of the command line, with harness=TASKS."""

    harness: str = option("names of lm-eval's tasks and groups", value="TASK,TASK")
    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    include: str | None = option(
        "further tasks, as YAML files; they may run code", None, value="FOLDER",
        reads=paths.task_folder_fault,
    )  # fmt: skip
    limit: int | float | None = option(
        "rows of each task, or below 1 a share of them; default all", None, value="NUMBER", above=0
    )
    num_fewshot: int | None = option(
        "solved examples in a prompt; default what the task says", None, value="NUMBER", at_least=0
    )
    chat: bool = option("write prompts with the run's chat template", False)
    compare: bool = option("evaluate the base as well", True)
    batch_size: int = option("rows at once", 16, at_least=1)
    record: bool = option("add the scores to the run's journal, report and cards", True)
    log: bool = option("send the scores to the run's dashboards (logger), too", False)
    json: Path | None = option("write the scores as JSON", None, value="FILE", writes=True)
    rows: Path | None = option(
        "write prompt, answer and grade of each row", None, value="FILE.jsonl", writes=True
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if not self.names:
            yield f"harness={self.harness}: expected names of tasks, as arc_easy,hellaswag"
        if isinstance(self.limit, float) and self.limit >= 1:
            yield f"limit={self.limit}: expected whole rows, or a share below 1"

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks; brackets as in an override of a run are allowed."""
        words = self.harness.strip("[]").split(",")
        return tuple(word.strip() for word in words if word.strip())
