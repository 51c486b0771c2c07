"""Limits on input that may come from a stranger: size of YAML, links of a folder, CPU time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPTH = 64
CONFIG = (1 << 20, 10_000)  # bytes and nodes; an alias counts each time it is used
RECORD = (16 << 20, 400_000)  # of a run.yaml, which records each start of a run


class LimitExceeded(ValueError):
    """A file or a piece of work exceeds a limit, which the message names."""


def refuse_bomb(text: str, where: str, limits: tuple[int, int] = CONFIG) -> None:
    """Refuse YAML that is too large or too deep, before or after its aliases are expanded.

    Raises:
        LimitExceeded: a limit is exceeded.
        yaml.YAMLError: the text is not YAML.
    """
    size, nodes = limits
    if len(text) > size:
        raise LimitExceeded(f"{where} has {len(text):,} characters; at most {size:,} are read")
    counts: list[int] = []  # sizes of the open nodes
    anchors: list[str | None] = []
    sizes: dict[str, int] = {}  # of anchored nodes, expanded
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                counts.append(1)
                anchors.append(event.anchor)
                if len(counts) > DEPTH:
                    raise LimitExceeded(f"{where} is nested more than {DEPTH} levels deep")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                count, anchor = counts.pop(), anchors.pop()
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in anchors:
                    raise LimitExceeded(f"{where}: *{event.anchor} contains itself")
                count, anchor = sizes.get(event.anchor, 1), None
            elif isinstance(event, yaml.ScalarEvent):
                count, anchor = 1, event.anchor
            else:
                continue
            if anchor is not None:
                sizes[anchor] = count
            if count > nodes or (counts and counts[-1] + count > nodes):
                raise LimitExceeded(
                    f"{where} has more than {nodes:,} values with its aliases expanded, the limit"
                )
            if counts:
                counts[-1] += count
    except RecursionError:
        raise LimitExceeded(f"{where} is nested too deeply") from None


def load_yaml(file: Path) -> Any:
    """Read the content of a run.yaml.

    Raises:
        LimitExceeded, OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read.
    """
    if file.stat().st_size > RECORD[0]:
        raise LimitExceeded(
            f"{file} has {file.stat().st_size:,} bytes; at most {RECORD[0]:,} are read"
        )
    text = file.read_text("utf-8")
    refuse_bomb(text, str(file), RECORD)
    return yaml.safe_load(text)


def link_outside(folder: Path, passed: str) -> Path | None:
    """Return the first symbolic link in a folder that leads out of it, None if there is none.

    The folder itself may be a link. The content of its folder `passed` is not checked, but `passed`
    itself is.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                return folder / path.relative_to(root)
        if parent == str(root):
            folders[:] = [name for name in folders if name != passed]
    return None


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Stop the code inside after `seconds` of CPU time of this process.

    It works in the main thread only, and not within one operation of the interpreter, such as a
    match of a regular expression.

    Raises:
        LimitExceeded: the code took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise LimitExceeded(f"{what} took more than {seconds:g} s of computing, and was stopped")

    # The virtual timer: libraries use the real-time one, which also counts waiting for a core.
    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
