"""A command in this process, and what it takes for a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RECORD = "{id: a, name: b, overrides: [], identity: {choices: {}}, starts: [{}], config: {}}"


def exit_code(main: Callable[[list[str]], int], words: list[str]) -> int | str | None:
    """The exit code of a command, returned or raised."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code


def make_run(folder: Path) -> Path:
    """Write as much of a run's folder as options are checked for."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "step-00000002.json").write_text("{}")
    (folder / "run.yaml").write_text(RECORD)
    return folder
