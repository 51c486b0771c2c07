"""The model card of several runs' adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.evaluation.tables import Table
from trainer.exporting import card_loading
from trainer.exporting.card_metadata import Origin, base_text, put, word
from trainer.storage.run_folder import flat

_HOW = ("density", "rank", "seed")


def write(folder: Path, name: str, contents: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Write README.md into a folder that has its other files.

    Args:
        name: of the result.
        contents: run.yaml of each run.
        record: merge.json of the result.
    """
    origin = Origin.of(*(dict(flat(content["config"])) for content in contents))
    base = base_text(origin.settings[0], origin.base, None)
    loss = _mean_loss(record)
    data = origin.metadata(
        "peft",
        "text-generation",
        ["merge", *(content["identity"]["choices"]["adapter"] for content in contents)],
        "adapter",
        name,
        origin.results("text-generation", {"loss": loss}, "the runs' rows"),
    )
    lines = [
        f"# {word(name)}",
        "",
        f"The adapters of {len(contents)} runs for {base} as one, made with Graft.",
        "",
        *card_loading.adapter_section(folder, origin.base),
        "## Runs",
        "",
        _runs(record),
        "",
        _how(record),
        "",
        "## Checked",
        "",
        "The folder was loaded back by stock PEFT, and its logits in fp32 differ from those of the"
        f" base with the update that was meant by {record['logits_difference']:.1e} of their spread"
        " (root mean square).",
    ]
    put(folder, data, "\n\n" + "\n".join(line.rstrip() for line in lines) + "\n")


def _mean_loss(record: dict[str, Any]) -> float | None:
    losses = [row["merged"] for row in record["held_out_loss"] if row["merged"] is not None]
    return sum(losses) / len(losses) if losses else None


def _runs(record: dict[str, Any]) -> str:
    """A row for each run: its weight, and the loss of its held-out rows."""
    losses = {row["run"]: row for row in record["held_out_loss"]}
    rows = []
    for run, weight in zip(record["runs"], record["weights"], strict=True):
        row = losses.get(run["given"], {})
        own, merged = (row.get(key) for key in ("own", "merged"))
        rows.append(
            [word(Path(run["given"]).name), f"{weight:.4g}"]
            + ["" if value is None else f"{value:.4f}" for value in (own, merged)]
        )
    columns = ["run", "weight", "held-out loss of the run", "held-out loss of this adapter"]
    return Table(columns, rows, frozenset({0})).markdown().rstrip()


def _how(record: dict[str, Any]) -> str:
    settings = [f"{key}={record[key]}" for key in _HOW if record.get(key)]
    lost = record["difference_from_weighted_sum"]
    text = f"The method is {', '.join([record['method'], *settings])}."
    if record["method"] == "cat":
        return f"{text} The update is the weighted sum of the runs' updates."
    return (
        f"{text} The update differs from the weighted sum of the runs' by {lost:.1%} of its norm."
    )
