"""Write the table of docs/chat-templates.md: what becomes of rows of every shape under the chat
templates of tests/data/templates.

    python -m scripts.chat_templates [check=true] [counts=true]

check=true writes nothing, and exits with 1 if the page differs. counts=true prints how many cells
have which outcome.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

from scripts.docs import DOCS
from tests.toys.chat_templates import NAMES, SHAPES, cells
from trainer.data.render import Tokens

PAGE = DOCS / "chat-templates.md"
START, END = "<!-- table: python -m scripts.chat_templates -->", "<!-- end of the table -->"
# The start of a reason, and its short form in the table.
REASONS = {
    r"leaves out tool \d+: ": "tools",
    r"leaves out message \d+ \(assistant\): tool_calls": "calls",
    r"leaves out message \d+ \(assistant\): reasoning": "reasoning",
    r"leaves out message \d+ \(\w+\): content": "content",
    r"opens a thought": "needs reasoning",
    r"closes the thought": "thinks by option",
    r"refuses it: (?:This model only supports single)": "one call only",
    r"refuses it: .*alternate": "turns alternate",
    r"refuses it: System role": "no system role",
    r"the answer is empty": "empty",
    r"must end in an answer": "no answer",
}


def short(outcome: list[Tokens] | str) -> str:
    """A cell of the table."""
    if not isinstance(outcome, str):
        return "trains" if len(outcome) == 1 else f"trains, {len(outcome)} texts"
    for pattern, reason in REASONS.items():
        if re.search(pattern, outcome):
            return f"no: {reason}"
    raise ValueError(f"a reason without a short form: {outcome}")


def table() -> str:
    """The table in Markdown."""
    found = {(name, shape): short(outcome) for name, shape, outcome in cells()}
    # Two shapes are refused whatever the template.
    shapes = [shape for shape in SHAPES if len({found[name, shape] for name in NAMES}) > 1]
    lines = [
        f"| template | {' | '.join(shapes)} |",
        f"|---|{'---|' * len(shapes)}",
        *(f"| {name} | {' | '.join(found[name, shape] for shape in shapes)} |" for name in NAMES),
    ]
    alike = [shape for shape in SHAPES if shape not in shapes]
    notes = [f"- {shape}: {found[NAMES[0], shape]}, whatever the template." for shape in alike]
    counts = Counter(
        "trains" if cell.startswith("trains") else "refused" for cell in found.values()
    )
    total = (
        f"{len(found)} cells: {counts['trains']} train, {counts['refused']} are refused by name."
    )
    return "\n".join([*lines, "", *notes, "", total])


def page(text: str) -> str:
    """The page with a new table."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    """Write, check or count."""
    if "counts=true" in sys.argv:
        outcomes = Counter(
            "trains" if not isinstance(outcome, str) else f"refused: {short(outcome)[4:]}"
            for _, _, outcome in cells()
        )
        for outcome, count in outcomes.most_common():
            print(f"{count:5} {outcome}")
        return
    text = PAGE.read_text("utf-8")
    new = page(text)
    if "check=true" in sys.argv:
        sys.exit(new != text)
    PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
