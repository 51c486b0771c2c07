"""A command in this process."""

from __future__ import annotations

from collections.abc import Callable


def exit_code(main: Callable[[list[str]], int], words: list[str]) -> int | str | None:
    """The exit code of a command, returned or raised."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code
