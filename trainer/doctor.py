"""List this machine's versions and devices, its slow parts, and missing packages.

    graft doctor [json=FILE]

Each line that is not ok names the command that fixes it. The command imports torch, which takes a
second or two; it loads no model and uses no network. The exit code is 1 if something is wrong: a
package that Graft needs is missing, or not of a version that was tested.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say

MARKS = {"ok": "green", "slow": "yellow", "missing": "cyan", "wrong": "red"}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    json: Path | None = option("write the lines as JSON", None, value="FILE", writes=True)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft doctor")
    from rich import get_console
    from rich.table import Table
    from rich.text import Text

    from trainer.session import failures, machine
    from trainer.storage import atomic

    try:
        lines = machine.checks()
        if options.json is not None:
            atomic.write_output(options.json, json.dumps(machine.as_rows(lines), indent=2) + "\n")
    except Exception as error:
        return failures.report_and_exit_code(error)
    table = Table("", "", "", "", show_header=False, box=None)
    for at, line in enumerate(lines):
        first = at == 0 or lines[at - 1].group != line.group
        group = Text(line.group if first else "", style="bold")
        table.add_row(
            group, Text(line.name), Text(line.state, style=MARKS[line.state]), Text(line.text)
        )
    get_console().print(table)
    if fixes := [line for line in lines if line.fix]:
        say("\nTo change that:")
        for line in fixes:
            say(f"    {line.fix:<50}  # {line.name}")
    return int(any(line.state == "wrong" for line in lines))


if __name__ == "__main__":
    exit_with(main)
