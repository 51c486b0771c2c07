"""README.md of a smaller base, and the lines that the command prints."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.exporting import card_loading
from trainer.exporting.card_metadata import Origin, base_text, put, word
from trainer.storage.run_folder import flat

PAPERS = {
    "wanda": "Wanda (arXiv 2306.11695)",
    "sparsegpt": "SparseGPT (arXiv 2301.00774)",
    "magnitude": "magnitude",
}


def write(
    folder: Path, name: str, config: dict[str, Any], record: dict[str, Any], difference: float
) -> None:
    """Write README.md into the folder of a smaller base, which has its other files.

    Args:
        name: of the result.
        config: the composed one, with the base and the task.
        record: shrink.json of the result.
        difference: of the loaded folder's logits, over their spread.
    """
    settings = dict(flat(config))
    origin = Origin.of(settings).inherited()
    values = {key: record["after"].get(key) for key in ("loss", "perplexity", "accuracy")}
    task = "text-generation"
    data = origin.metadata(
        "transformers",
        task,
        ["pruned", record["method"]],
        None,  # the Hub has no relation for it
        name,
        origin.results(task, values, "rows of the task"),
    )
    parts = [
        f"# {word(name)}",
        f"{_capital(base_text(settings, Origin.of(settings).base, None))}, shrunk by"
        f" {record['method']} with Graft.",
        removed(record),
        table(record),
        _warning(record),
        f"Calibrated on {record['rows']} training rows ({record['tokens']:,} tokens)"
        f"{f' of {word(origin.data)}' if origin.data else ''}. shrink.json has all settings and the"
        " figures of each layer.",
        "\n".join(card_loading.model_section(folder)).rstrip(),
        "It trains as any base:",
        f"```bash\ngraft base=hf base.path={card_loading.PLACE} task.path=ROWS adapter=lora\n```",
        "## Checked",
        f"The folder was loaded back by transformers {version('transformers')}, and its logits"
        f" differ from those of the model in memory by {difference:.1e} of their spread (root mean"
        " square).",
    ]
    put(folder, data, "\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def removed(record: dict[str, Any]) -> str:
    """Say what was removed, in a sentence or two."""
    figures = record["layers_figures"]
    if record["method"] == "drop_layers":
        dropped = ", ".join(map(str, record["dropped"]))
        were = "s {} were" if len(record["dropped"]) > 1 else " {} was"
        what = f"the least {record['score']} change of the states."
        if "generations" in record:
            what = (
                f"the least divergence from the base that {record['generations']} generations of a"
                f" search have come to, {record['divergence']:.3g} on the calibration rows. It is"
                f" {record['divergence_least_influence']:.3g} without the layers of least"
                f" {record['score']} change of the states."
            )
        return (
            f"Decoder layer{were.format(dropped)} dropped, of {len(figures)} (the first is 0):"
            f" {what}"
        )
    if record["method"] == "slice":
        return (
            f"The states have {record['states']} numbers after one rotation of the whole model:"
            f" {record['variance']:.1%} of their variance on the calibration rows. The head has a"
            " weight of its own, also where the base shared it with the embedding."
        )
    if record["method"] == "narrow":
        return (
            f"Each MLP has {record['neurons']} neurons: those of the largest {record['score']}"
            f" score. {len(figures)} layers were narrowed."
        )
    pattern = record["pattern"]
    what = f"{record['density']:g} of each row" if pattern == "unstructured" else pattern
    part = {"all": "all linears"}.get(record["part"], f"the linears of the {record['part']}")
    if "generations" in record:
        return (
            f"By {PAPERS[record['method']]}, {part} of the decoder layers keep {what} on average:"
            f" the other weights are zero. The share of each linear is that of the least divergence"
            f" from the base in {record['generations']} generations of a search (EvoPress, arXiv"
            f" 2410.14649), {record['divergence']:.3g} on the calibration rows. It is"
            f" {record['divergence_uniform']:.3g} with the same share in all."
        )
    verb = "keep" if pattern == "unstructured" else "have the pattern"
    return (
        f"By {PAPERS[record['method']]}, {part} of the decoder layers {verb} {what}: the other"
        " weights are zero."
    )


def table(record: dict[str, Any]) -> str:
    """Return the figures before and after, as a table of Markdown."""
    names = {
        "parameters": ("parameters", ","),
        "nonzero": ("parameters that are not zero", ","),
        "bytes": ("bytes of the weights", ","),
        "loss": ("held-out loss", ".4f"),
        "perplexity": ("perplexity of trained tokens", ".3f"),
        "accuracy": ("accuracy of the next token", ".4f"),
        "seconds_per_1000_tokens": ("seconds for 1000 tokens, here", ".3f"),
    }
    lines = ["| | before | after |", "|---|---|---|"]
    for key, (label, form) in names.items():
        if key in record["before"]:
            values = (format(record[when][key], form) for when in ("before", "after"))
            lines.append(f"| {label} | {' | '.join(values)} |")
    return "\n".join(lines)


def _warning(record: dict[str, Any]) -> str:
    if "pattern" not in record:
        return ""
    return (
        "Zeros make a dense product no faster: only an engine with kernels for the pattern gains"
        " speed. A LoRA merged into these weights fills the zeros."
    )
