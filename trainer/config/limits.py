"""Limits on input that may come from a stranger: size of YAML, links of a folder, CPU time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainer.config import files

# libyaml's loader gives the same nodes at the same places, ten times as fast.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEPTH = 64
DIGITS = 1000  # of a number in YAML
_NUMBER = re.compile(r"[-+0-9a-fA-FoxX_:.]*")
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
        for event in yaml.parse(text, LOADER):
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
                _refuse_long_number(event, where)
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


def _refuse_long_number(event: yaml.ScalarEvent, where: str) -> None:
    """YAML reads 1:30:00 as a number to the base of 60, in a time that grows with the square of its
    length."""
    number = event.style is None or event.tag is not None
    if number and len(event.value) > DIGITS and _NUMBER.fullmatch(event.value):
        raise LimitExceeded(
            f"{where} has a number of {len(event.value):,} characters; at most {DIGITS:,} are read"
        )


def load_yaml(file: Path, unique: bool = False) -> Any:
    """Read the content of a run.yaml, or of another file. Of a key that occurs twice YAML takes the
    last; `unique` refuses it.

    Raises:
        LimitExceeded, OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read.
    """
    try:
        text = files.read_text(file, RECORD[0])
    except files.Unreadable as error:
        raise LimitExceeded(str(error)) from None
    refuse_bomb(text, str(file), RECORD)
    if unique:
        _refuse_repeated(yaml.compose(text, Loader=LOADER), str(file))
    try:
        return yaml.load(text, Loader=LOADER)
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, an odd key
        raise LimitExceeded(f"{file} cannot be read: {error}") from None


def _refuse_repeated(node: Any, where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item, where)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise LimitExceeded(
                    f"{where}:{key.start_mark.line + 1}: the key {key.value} occurs twice"
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            _refuse_repeated(value, where)


def strange_entry(folder: Path, passed: str = "", links: bool = False) -> str | None:
    """Return a message about the first entry of a folder that a run never has there: a symbolic
    link that leads out of it, unless `links` allows them, a device, a FIFO or a socket. None if
    there is no such entry.

    The folder itself may be a link. The content of its folder `passed` is not checked, but `passed`
    itself is.
    """
    root = folder.resolve()
    if not root.is_dir():
        return None
    waiting = [root]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:  # it cannot be read or written either
            continue
        for entry in ordered:
            shown = folder / Path(entry.path).relative_to(root)
            if entry.is_symlink() and not links and not _leads_into(Path(entry.path), root):
                return (
                    f"{shown} is a link that leads out of the run folder. Replace it by a copy of"
                    " its target"
                )
            if entry.is_dir(follow_symlinks=False):
                waiting += [] if place == root and entry.name == passed else [Path(entry.path)]
            elif not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path):
                return f"{shown} is a device, a FIFO or a socket, expected a file: remove it"
    return None


def _leads_into(link: Path, root: Path) -> bool:
    try:
        return link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link to itself
        return False


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Stop the code inside after `seconds` of CPU time of this process.

    It works in the main thread only, and not within one operation of a library; a match of a
    regular expression is stopped.

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
