"""docs/families.md from the results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.zoo import running
from scripts.zoo.families import Family, every

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "families.md"
GROUPS = {
    "dense": "Dense decoders",
    "moe": "Mixtures of experts",
    "state": "State-space and hybrid models",
    "more": "More decoders, with the same settings for all",
    "vision": "Vision-language bases, used for text",
    "encoder": "Encoders, which classify",
    "pairs": "Encoder-decoders, which answer prompts and classify",
}
COLUMNS = {
    "load": "loads by default, with transformers' logits",
    "preflight": "`graft preflight`",
    "lora": "`adapter=lora`, three steps, loaded by stock PEFT",
    "dora": "`adapter=dora`, the same",
    "rosa": "`adapter=rosa`, the same",
    "sparse": "`adapter=sparse`, the same",
    "spiel": "`adapter=spiel`, the same",
    "deft": "`adapter=deft`, the same",
    "full": "`adapter=full`",
    "lora_experts": "lora with `adapter.target_parameters=all-experts`, loaded by stock PEFT",
    "rosa_experts": "rosa with the same, loaded by stock PEFT or exported merged",
    "two_texts": "rows of two texts",
    "packing": "packed rows give the logits of rows alone",
    "resume": "resumed from a checkpoint: the same bits",
    "merged": "`graft export to=merged`, loaded by transformers",
    "generate": "greedy text as transformers' own",
    "evaluate": "`graft evaluate`",
    "medusa": "`drafter=medusa`, lossless",
    "eagle3": "`drafter=eagle3`, lossless",
}
# In reasons, what is of one family -> what it is of all.
WORDS = (
    (r" \(logits differ by [^)]*\)", ""),
    (r"\bin BASE packed", "packed"),
    (r"\b\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)\b", "the model"),
    (r"\b[A-Z]\w+(DecoderLayer|Layer|Block)\b", "a layer"),
    (r"\b[A-Z]\w+Attention\b", "its attention"),
)
MARKS = {"ok": "✓", "failed": "✗", "skipped": "·"}
HEAD = """\
# Families

Tiny random models of {count} families of transformers go through the program as a user runs it:
`python -m scripts.zoo`, which also [writes this page](developer/add-a-method.md#families). Other
families usually work; this page says what was measured, with transformers {transformers} and PEFT
{peft}.

- ✓ works. A number is a reason below the table: the program refuses it, before it trains.
- ✗ fails, with the reason below. · is left out because what it needs failed.
- An empty cell does not apply, or was not run.

The columns:

{columns}

Weights are random, so this says nothing about quality. Experts get an adapter only where
`adapter.target_parameters` names them.

Outcomes: {counts}.
"""


def counts(results: Path) -> str:
    """Return how many cells have which outcome."""
    cells = [
        cell["outcome"]
        for name in every()
        for cell in running.read(results / f"{name}.json")["checks"].values()
    ]
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(cells).most_common())


def write(results: Path) -> None:
    """Write the page."""
    PAGE.write_text(page(results), "utf-8")


def page(results: Path) -> str:
    """Return the page's text, of the families that have results."""
    import peft
    import transformers

    families = [family for family in every().values() if (results / f"{family.name}.json").exists()]
    described = "\n".join(f"- {key}: {text}" for key, text in COLUMNS.items())
    parts = [
        HEAD.format(
            count=distinct(f.name for f in families),
            transformers=transformers.__version__,
            peft=peft.__version__,
            columns=described,
            counts=counts(results),
        )
    ]
    for group in dict.fromkeys(family.group for family in families):
        parts.append(_section(group, [f for f in families if f.group == group], results))
    return "\n".join(parts)


def _section(group: str, families: list[Family], results: Path) -> str:
    """One table, and the reasons of its cells."""
    reasons: dict[str, int] = {}
    contents = {f.name: running.read(results / f"{f.name}.json")["checks"] for f in families}
    columns = [key for key in COLUMNS if any(key in cells for cells in contents.values())]
    lines = [
        f"## {GROUPS[group]}\n",
        f"| family | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, cells in contents.items():
        marks = [_cell(cells.get(key), reasons) for key in columns]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    numbered = [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join([*lines, "", *numbered, ""])


def distinct(names: Iterable[str]) -> int:
    """Return how many families there are: encoder-decoders have two rows."""
    return len({name.removesuffix("_classify") for name in names})


def plain(reason: str) -> str:
    """A reason without the figures and the class names of one family, as text of a page."""
    for pattern, words in WORDS:
        reason = re.sub(pattern, words, reason)
    reason = reason.replace("|", "/").replace("<", "(").replace(">", ")")
    return reason[:1].upper() + reason[1:]


def _cell(cell: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell["outcome"] in ("ok", "skipped"):
        return MARKS[cell["outcome"]]
    text = plain(cell["text"])
    number = reasons.setdefault(text, len(reasons) + 1)
    return f"✗ {number}" if cell["outcome"] == "failed" else str(number)
