"""docs/families.md from the results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from scripts.zoo import running
from scripts.zoo.families import Family, every

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "families.md"
GROUPS = {
    "dense": "Dense decoders",
    "moe": "Mixtures of experts",
    "state": "State-space and hybrid models",
    "vision": "Vision-language bases, used for text",
}
COLUMNS = {
    "load": "loads by default, with transformers' logits",
    "preflight": "`graft preflight`",
    "lora": "`adapter=lora`, three steps, loaded by stock PEFT",
    "dora": "`adapter=dora`, the same",
    "rosa": "`adapter=rosa`, the same",
    "sparse": "`adapter=sparse`, the same",
    "spiel": "`adapter=spiel`, the same",
    "full": "`adapter=full`",
    "experts": "`adapter.target_parameters=all-experts`, loaded by stock PEFT",
    "packing": "packed rows give the logits of rows alone",
    "resume": "resumed from a checkpoint: the same bits",
    "merged": "`graft export to=merged`, loaded by transformers",
    "generate": "greedy text as transformers' own",
    "medusa": "`drafter=medusa`, lossless",
    "eagle3": "`drafter=eagle3`, lossless",
}
MARKS = {"ok": "✓", "failed": "✗", "skipped": "·"}
HEAD = """\
# Families

Tiny random models of {count} families of transformers go through the program as a user runs it:
`python -m scripts.zoo`, which also writes this page. A base of another family usually works; this
page says what was measured, with transformers {transformers} and PEFT {peft}.

- ✓ it works. A number is a reason below the table: the program refuses it before training.
- ✗ it fails, with the reason below. · is left out because what it needs failed.
- An empty cell does not apply.

The columns:

{columns}

Weights are random, so this says nothing about quality. Experts get an adapter only where
`adapter.target_parameters` names them.

Outcomes: {counts}.
"""


def counts(results: Path) -> str:
    """How many cells have which outcome."""
    cells = [
        cell["outcome"]
        for name in every()
        for cell in running.read(results / f"{name}.json")["checks"].values()
    ]
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(cells).most_common())


def write(results: Path) -> None:
    """Write the page from the families that have results."""
    import peft
    import transformers

    families = [family for family in every().values() if (results / f"{family.name}.json").exists()]
    columns = [*COLUMNS, *sorted({key for f in families for key in f.checks} - COLUMNS.keys())]
    described = "\n".join(f"- {key}: {COLUMNS[key]}" for key in columns if key in COLUMNS)
    parts = [
        HEAD.format(
            count=len(families),
            transformers=transformers.__version__,
            peft=peft.__version__,
            columns=described,
            counts=counts(results),
        )
    ]
    for group in dict.fromkeys(family.group for family in families):
        parts.append(_section(group, [f for f in families if f.group == group], results))
    PAGE.write_text("\n".join(parts), "utf-8")


def _section(group: str, families: list[Family], results: Path) -> str:
    """One table, and the reasons of its cells."""
    reasons: dict[str, int] = {}
    contents = {f.name: running.read(results / f"{f.name}.json")["checks"] for f in families}
    columns = list(dict.fromkeys(key for cells in contents.values() for key in cells))
    lines = [
        f"## {GROUPS.get(group, group)}\n",
        f"| family | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, cells in contents.items():
        marks = [_cell(cells.get(key), reasons) for key in columns]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    numbered = [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join([*lines, "", *numbered, ""])


def _cell(cell: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell["outcome"] in ("ok", "skipped"):
        return MARKS[cell["outcome"]]
    text = cell["text"].replace("|", "/").replace("<", "(").replace(">", ")")
    number = reasons.setdefault(text, len(reasons) + 1)
    return f"✗ {number}" if cell["outcome"] == "failed" else str(number)
