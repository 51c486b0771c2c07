"""The part of a model card that shows what lm-eval measured."""

from __future__ import annotations

from huggingface_hub import EvalResult

from trainer.evaluation import harness_table
from trainer.evaluation.run_summary import Summary

TITLE = "## Benchmarks"
NEXT = "## Training"  # the section that follows


def section(source: Summary) -> list[str]:
    """Return the lines of the section, none without scores."""
    table = harness_table.table(source.rows["harness"])
    if table is None:
        return []
    text = "Measured by lm-eval on the un-merged model; ± is a 95 % interval."
    return [TITLE, "", text, "", table.markdown().rstrip(), ""]


def replaced(body: str, source: Summary) -> str:
    """Return a card's text with the section as the run's scores are now."""
    before, following, rest = body.partition(f"\n{NEXT}\n")
    if not following:
        return body
    before = before.partition(f"\n{TITLE}\n")[0].rstrip("\n")
    own = "".join(f"{line}\n" for line in section(source))
    return f"{before}\n\n{own}{NEXT}\n{rest}"


def results(source: Summary, task_type: str) -> list[EvalResult]:
    """Return the scores of the adapted model as the Hub's metadata has them."""
    rows = source.rows["harness"]
    scored = [
        (name, harness_table.newest(rows, "adapted", name)) for name in harness_table.names(rows)
    ]
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=name.rpartition("/")[0],
            dataset_name=f"{name.rpartition('/')[0]} (lm-eval)",
            metric_type=name.rpartition("/")[2],
            metric_value=round(float(row[name]), 6),
        )
        for name, row in scored
        if row is not None
    ]
