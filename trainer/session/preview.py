"""The table of preflight, and samples with trained tokens in one colour and masked ones in
another."""

from __future__ import annotations

import itertools
from typing import Any

from rich.table import Table
from rich.text import Text

from trainer.assembly.rows import Data
from trainer.session.report_html import counted


def table(result: dict[str, Any]) -> Table:
    """Show the result of `inspect` as a table."""
    text_table = Table(show_header=False, box=None, padding=(0, 2))
    for split in ("train", "eval", *(n for n in result["data"] if n.startswith("eval/"))):
        for name, text in _split_lines(split, result["data"].get(split)):
            text_table.add_row(name, Text(text))  # a broken row's reason may hold [brackets]
    if "shared" in result["data"]:
        text_table.add_row("in train and eval", str(result["data"]["shared"]))
    if "prompts" in result["data"]:
        prompts = result["data"]["prompts"]
        text_table.add_row(
            "prompts as at inference", f"{prompts['as_at_inference']} of {prompts['tried']} tried"
        )
    if run := result.get("run"):
        for name, text in _run_lines(run):
            text_table.add_row(name, text)
    if "plan" in result:
        text_table.add_row("", result["plan"])
    if rates := result["schedule"]:
        bars = "".join(
            "▁▂▃▄▅▆▇█"[min(7, int(8 * rate / rates["peak"]))] if rate else " "
            for _, rate in rates["rates"]
        )
        text_table.add_row("learning rate", f"{bars}  peak {rates['peak']:g}")
    if advice := result.get("recommended_rate"):
        text_table.add_row("", f"recommended {advice['rate']:g}: {advice['source']}")
    model = result["model"]
    text_table.add_row(
        "parameters",
        f"{model['parameters']:,}, {counted(model['trainable'])} trained; {model['precision']},"
        f" base in {model['dtype']}",
    )
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in model["memory_bytes"].items())
    text_table.add_row(
        "memory, about",
        f"{model['memory_needed'] / 1e9:.2f} GB ({parts}); {model['memory_free'] / 1e9:.1f} GB"
        " free",
    )
    if measured := result.get("probe"):
        text_table.add_row(
            "longest batch, measured",
            f"{measured['peak_bytes'] / 1e9:.2f} GB at the peak, {measured['step_seconds']:.2f} s"
            f" for a step of {measured['tokens']:,} tokens",
        )
    if model.get("draft_head"):
        text_table.add_row("draft head", Text(model["draft_head"]))
    text_table.add_row(
        "checkpoint, about",
        f"{model['checkpoint_bytes'] / 1e6:.1f} MB; {model['disk_free'] / 1e9:.1f} GB of disk free",
    )
    return text_table


def _run_lines(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Say how long the run is, and what its batches hold."""
    lines = [
        (
            "steps",
            f"{run['steps']:,} ({run['steps_per_epoch']:,} an epoch, {run['epochs']:.2f} epochs)",
        )
    ]
    if "drawn_from" in run:
        drawn = f"{run['sequences']:,} of {run['drawn_from']:,}, by repeat_random"
        lines.append(("sequences an epoch", drawn))
    tokens = f"{run['tokens_per_epoch']:,}, {run['trained_tokens_per_epoch']:,} of them trained"
    packing = (
        f", packed sequences {run['packing_efficiency']:.1%} full"
        if "packing_efficiency" in run
        else ""
    )
    padding = f"{run['padding_share']:.1%} of a batch{packing}"
    return [*lines, ("tokens an epoch", tokens), ("padding", padding)]


def _split_lines(split: str, data: dict[str, Any] | None) -> list[tuple[str, str]]:
    if data is None:
        return [(split, "none")] if split == "eval" else []
    lost = [
        f"{data[key]:,} {text}"
        for key, text in (
            ("dropped", "too long, dropped"),
            ("truncated", "truncated"),
            ("answers_lost", "lost their answer"),
            ("skipped", "broken"),
            ("weightless", "of weight 0"),
        )
        if data[key]
    ]
    # one row may be several sequences
    read = f"{data['rows']:,} read"
    if data["further"]:
        read += f" as {data['rows'] + data['further']:,} sequences"
    lines = [
        (f"{split} rows", ", ".join([f"{read}, {data['kept']:,} kept", *lost])),
        (
            f"{split} tokens",
            (
                f"{data['tokens']:,}, {data['trained_share']:.1%} trained; longest row"
                f" {data['longest']:,}"
            ),
        ),
        (
            f"{split} answers that end",
            f"{data['ends_trained']:,} of {data['kept']:,} train their end token",
        ),
        (f"{split} duplicates", str(data["duplicates"])),
    ]
    return lines + [(f"{split} broken", line) for line in data["bad"][:5]]


def samples(data: Data, count: int) -> list[Text]:
    """Show the first rows as the model sees them: trained tokens green, masked ones dim."""
    if data.train is None:
        return []
    rows = data.train.rows
    texts = []
    for index in range(min(count, len(rows))):
        row = rows[index]
        text = Text(f"{rows.where(index)}\n", style="bold")
        for trained, group in itertools.groupby(
            zip(row.ids, row.trained, strict=True), key=lambda pair: pair[1]
        ):
            text.append(
                data.renderer.tokenizer.decode([token for token, _ in group]),
                style="black on green" if trained else "dim",
            )
        texts.append(text)
    return texts
