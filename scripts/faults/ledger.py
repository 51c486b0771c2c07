"""The injections and their outcomes: faults.jsonl with a line for each, and faults.md with the
table."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LONGEST = 280  # characters of a message that the table shows

HEADS = {
    "kills": "SIGKILL at random moments",
    "points": "SIGKILL at every point of a save, and in the middle of an accumulation window",
    "disk": "Full disk",
    "damage": "Damaged files",
    "ranks": "A killed process of two",
    "loader": "A hung data loader",
    "clock": "A clock that jumps",
    "nonfinite": "NaN in a gradient",
    "memory": "No memory",
}


class Ledger:
    """The rows of faults.jsonl. A line that a kill truncated is skipped."""

    def __init__(self, folder: Path, only: list[str] | None = None):
        self.folder, self.file = folder, folder / "faults.jsonl"
        self.only = [entry.split(":") for entry in only or HEADS]
        self.rows: list[Row] = []
        # of each kind of run: its phases, and how many kills each must have
        self.expected: dict[str, dict[str, int]] = {}
        if self.file.exists():
            whole = [
                line
                for line in self.file.read_text("utf-8").splitlines(keepends=True)
                if line.endswith("\n")
            ]
            self.file.write_text("".join(whole), "utf-8")
            self.rows = [json.loads(line) for line in whole]

    def add(self, family: str, case: str, fault: str, **values: Any) -> Row:
        """Append the outcome of an injection, and print it."""
        row = {"family": family, "case": case, "fault": fault, **values}
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row

    def selects(self, family: str, case: str, fault: str = "") -> bool:
        """Return whether an injection is selected."""
        names = (family, case, fault)
        return any(
            all(part in value for part, value in zip(entry, names, strict=False))
            for entry in self.only
        )

    def due(self, family: str, case: str, fault: str) -> bool:
        """Return whether an injection is selected and not done yet."""
        return self.selects(family, case, fault) and not self.of(family, case, fault)

    def of(self, family: str, case: str | None = None, fault: str | None = None) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["family"] == family
            and case in (None, row["case"])
            and fault in (None, row["fault"])
        ]

    def missing(self, case: str, share: dict[str, int]) -> list[str]:
        """Return the phases of a kind of run that have fewer kills than their share."""
        return [phase for phase, count in share.items() if self.kills(case, phase) < count]

    def kills(self, case: str, phase: str) -> int:
        """Count the kills of a kind of run in a phase."""
        return sum(1 for row in self.of("kills", case) if row.get("phase") == phase)

    def uneven(self) -> list[str]:
        """Name each kind of run and phase that has not as many kills as it must have."""
        return [
            f"{case}, {phase}: {self.kills(case, phase)} kills instead of {count}"
            for case, share in self.expected.items()
            for phase, count in share.items()
            if self.kills(case, phase) != count
        ]

    def write(self, places: list[Path]) -> bool:
        """Write faults.md. Return whether all outcomes are right."""
        text, good = table(self.rows)
        if uneven := self.uneven():
            text += "\nThe kills are not spread evenly:\n\n"
            text += "".join(f"- {line}\n" for line in uneven)
        for place in places:
            text = text.replace(str(place), "FOLDER")
        (self.folder / "faults.md").write_text(text, "utf-8")
        return good and not uneven


def table(rows: list[Row]) -> tuple[str, bool]:
    """Return the table, and whether all outcomes are right."""
    import torch

    killed, left_out = (
        sum(1 for row in rows if row.get("killed")),
        sum(1 for row in rows if row.get("skipped")),
    )
    bad = [row for row in rows if not row["ok"] and not row.get("skipped")]
    lines = [
        "# Faults that were injected, and what came of them",
        "",
        (
            f"{len(rows)} lines of faults.jsonl: {killed} SIGKILLs, {left_out} skipped, {len(bad)}"
            " not as they should be. Tiny base, fp32 on the CPU, one thread; a checkpoint every 3"
            f" steps; torch {torch.__version__}, Python {platform.python_version()}."
        ),
        (
            "`python -m scripts.faults out=FOLDER` writes this table. Steps lost: logged and not"
            " saved when the process ended. Same weights: every file of weights, and every logged"
            " number and text but times, are those of the run that was left alone, bit for bit."
        ),
    ]
    lines += spread(rows)
    for family, head in HEADS.items():
        of_family = [row for row in rows if row["family"] == family]
        if not of_family:
            continue
        lines += [
            "",
            f"## {head}",
            "",
            (
                "| run | injected | times | steps lost, at most | what was said | same weights | as"
                " it should be |"
            ),
            "|---|---|---|---|---|---|---|",
        ]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in of_family:
            groups.setdefault((row["case"], row["fault"]), []).append(row)
        lines += [_line(case, fault, group) for (case, fault), group in groups.items()]
    return "\n".join(lines) + "\n", not bad


def spread(rows: list[Row]) -> list[str]:
    """Return a table of the kills in each phase of each kind of run."""
    kinds: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.get("phase"):
            counts = kinds.setdefault(row["case"], {})
            counts[row["phase"]] = counts.get(row["phase"], 0) + 1
    lines = [
        f"| {case} | {sum(counts.values())} |"
        f" {', '.join(f'{phase} {count}' for phase, count in counts.items())} |"
        for case, counts in kinds.items()
    ]
    if not lines:
        return []
    head = ["", "## Kills in each phase", "", "| run | kills | in each phase |", "|---|---|---|"]
    return head + lines


def _line(case: str, fault: str, group: list[Row]) -> str:
    lost = [row["lost"] for row in group if row.get("lost") is not None]
    same = [row["same"] for row in group if row.get("same") is not None]
    message = next((row["said"] for row in group if row.get("said")), "")
    shown = re.sub(r"\s+", " ", message).replace("|", "\\|")
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
    if group[0].get("skipped"):
        return f"| {case} | {fault} | skipped | | {shown} | | |"
    identical = (
        "" if not same else "yes" if all(same) else f"**no** ({same.count(False)} of {len(same)})"
    )
    good = "yes" if all(row["ok"] for row in group) else "**no**"
    return (
        f"| {case} | {fault} | {sum(row.get('times', 1) for row in group)} |"
        f" {max(lost) if lost else ''} | {shown} | {identical} | {good} |"
    )
