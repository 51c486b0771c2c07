"""A disk that is full when a run saves or logs: a file system of a few megabytes. Mounting it needs
root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.faults import cases
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

STEP = 9
SIZE = "8m"


def inject(place: Place, ledger: Ledger) -> None:
    """Fill the disk before a save, within one, and before a line of the log. Then free the space
    and resume the run."""
    for case, fault in (
        ("lora", before_save),
        ("rosa", before_save),
        ("eagle3", before_save),
        ("lora", within_save),
        ("lora", before_log),
    ):
        if ledger.due("disk", case, fault.__doc__ or ""):
            one(place, ledger, case, fault)


def one(place: Place, ledger: Ledger, case: str, fault: Callable[[Path], None]) -> None:
    """Fill a run's disk, check its message, free the space, resume the run, and compare."""
    from trainer.storage import checkpoints

    told = fault.__doc__ or ""
    cases.reference(place, case)
    name = cases.anew(place, f"{case}-{fault.__name__}")
    run = place.runs / name
    run.mkdir(parents=True, exist_ok=True)
    try:
        with mounted(run):
            child = cases.start(place, case, name, before=lambda: fault(run))
            code, gone = child.wait(), cases.lost(place, name)
            saved = checkpoints.complete(run / "checkpoints")
            intact = bool(saved) and checkpoints.fault(saved[-1]) is None
            said = child.told("disk is full")
            (run / "filler").unlink(missing_ok=True)
            cases.finish(cases.start(place, case, name))
            same = all(cases.same(place, case, name).values())
    except Unmounted as reason:
        ledger.add("disk", case, told, skipped=True, said=str(reason), ok=True)
        return
    ok = code == 1 and bool(said) and intact and same and gone <= EVERY
    ledger.add("disk", case, told, code=code, lost=gone, said=said, same=same, ok=ok)


class Unmounted(RuntimeError):
    """A file system cannot be mounted here."""


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Mount a small file system at a folder.

    Raises:
        Unmounted: this needs root, or the machine does not allow it.
    """
    if os.geteuid() != 0:
        raise Unmounted("mounting a file system needs root")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise Unmounted(f"a file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Fill up the disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def before_save(run: Path) -> None:
    """the disk is full when a save begins"""
    from trainer.training.lightning_trainer import AtomicCheckpointIO

    whole = AtomicCheckpointIO.save_checkpoint

    def patched(self: Any, content: dict[str, Any], *given: Any, **named: Any) -> None:
        if content["counters"]["step"] == STEP:
            fill(run)
        whole(self, content, *given, **named)

    AtomicCheckpointIO.save_checkpoint = patched  # type: ignore[method-assign, assignment]


def within_save(run: Path) -> None:
    """the disk is full when a checkpoint is written and its manifest is not"""
    whole = os.replace

    def patched(source: Any, target: Any) -> None:
        whole(source, target)
        if str(target).endswith(f"step-{STEP:08d}.ckpt"):
            fill(run)

    os.replace = patched  # type: ignore[assignment]


def before_log(run: Path) -> None:
    """the disk is full when a step is logged"""
    from trainer.storage import journal

    whole = journal._append

    def patched(path: Path, row: dict[str, Any]) -> None:
        if row["step"] == STEP + 1:
            fill(run)
        whole(path, row)

    journal._append = patched
