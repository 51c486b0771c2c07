"""README.md of a smaller base, and the lines that the command prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAPERS = {
    "wanda": "Wanda (arXiv 2306.11695)",
    "sparsegpt": "SparseGPT (arXiv 2301.00774)",
    "magnitude": "magnitude",
}


def text(path: str, record: dict[str, Any]) -> str:
    """Return the card of a base that was made from the base at `path`."""
    name = _name(path)
    local = Path(path).is_dir()
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [] if local else [f"base_model: {path}"]
    head += ["tags: [graft, pruned]", "---"]
    parts = [
        "\n".join(head),
        f"# {name}, shrunk by {record['method']}",
        removed(record),
        table(record),
        _warning(record),
        f"Calibrated on {record['rows']} training rows ({record['tokens']:,} tokens). shrink.json"
        " has all settings and the figures of each layer.",
        "## Use",
        "The folder is an ordinary model of transformers. Train it as any base:",
        "```bash\ngraft base=hf base.path=THIS_FOLDER task.path=ROWS adapter=lora\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
                f" search have come to, {record['divergence']:.4f} on the calibration rows. It is"
                f" {record['divergence_least_influence']:.4f} without the layers of least"
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
    return (
        f"By {PAPERS[record['method']]}, {part} of the decoder layers have the pattern {what}: the"
        " other weights are zero."
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


def _name(path: str) -> str:
    return Path(path).name or path
