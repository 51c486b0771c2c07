"""What may come from a stranger, read within limits: YAML that does not grow without end, folders
whose links stay inside, and work that ends."""

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
CONFIG = (1 << 20, 10_000)  # bytes and nodes, aliases counted as often as they are used
RECORD = (16 << 20, 400_000)  # of a run.yaml, which notes each of a run's starts


class TooMuch(ValueError):
    """A file or a piece of work is beyond its limits. The message says which."""


def refuse_bomb(text: str, where: str, limits: tuple[int, int] = CONFIG) -> None:
    """Refuse YAML that is too large, too deep, or becomes so when its aliases are written out.

    Raises:
        TooMuch: with the limit.
        yaml.YAMLError: it is no YAML.
    """
    size, nodes = limits
    if len(text) > size:
        raise TooMuch(f"{where} has {len(text):,} characters; at most {size:,} are read")
    counts: list[int] = []  # of the nodes that are open
    anchors: list[str | None] = []
    sizes: dict[str, int] = {}  # of anchored nodes, written out
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                counts.append(1)
                anchors.append(event.anchor)
                if len(counts) > DEPTH:
                    raise TooMuch(f"{where} is nested more than {DEPTH} levels deep")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                count, anchor = counts.pop(), anchors.pop()
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in anchors:
                    raise TooMuch(f"{where}: *{event.anchor} stands within itself")
                count, anchor = sizes.get(event.anchor, 1), None
            elif isinstance(event, yaml.ScalarEvent):
                count, anchor = 1, event.anchor
            else:
                continue
            if anchor is not None:
                sizes[anchor] = count
            if count > nodes or (counts and counts[-1] + count > nodes):
                raise TooMuch(
                    f"{where} has more than {nodes:,} values, its aliases written out; that many"
                    " are not read"
                )
            if counts:
                counts[-1] += count
    except RecursionError:
        raise TooMuch(f"{where} is nested too deeply") from None


def load_yaml(file: Path) -> Any:
    """A run.yaml's content.

    Raises:
        TooMuch, OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read.
    """
    if file.stat().st_size > RECORD[0]:
        raise TooMuch(f"{file} has {file.stat().st_size:,} bytes; at most {RECORD[0]:,} are read")
    text = file.read_text("utf-8")
    refuse_bomb(text, str(file), RECORD)
    return yaml.safe_load(text)


def link_outside(folder: Path, passed: str) -> Path | None:
    """The first symbolic link within a folder that leads out of it; None if all stay inside. The
    folder itself may be a link. What is in its folder `passed` is passed over, but not where that
    one leads."""
    root = folder.resolve()
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                return folder / path.relative_to(root)
        if place == str(root):
            folders[:] = [name for name in folders if name != passed]
    return None


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Stop what runs within after so many seconds of the process's own computing. It counts in a
    process's main thread only; a single operation of the interpreter is ended before it is stopped.

    Raises:
        TooMuch: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooMuch(f"{what} has not ended after {seconds:g} s of computing, and was stopped")

    # Virtual time: others use the real-time alarm, and on a busy machine waiting is no fault of
    # what is waited for.
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
