"""A disk that fills when a run saves or logs, or when a command writes its output: a file system of
a few megabytes, which needs root to mount, or a limit on the size of files, which does not."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.faults import cases, commands, warm
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

STEP = 9
SIZE = "8m"
LIMITED = "a file can be no longer than half of a checkpoint, as on a disk that fills in a save"
COMMAND = "the disk fills while the command writes, and then has room"


def inject(place: Place, ledger: Ledger) -> None:
    """Fill the disk before a save, within one, and before a line of the log. Then free the space
    and resume the run."""
    for case, fault in (
        ("lora", before_save),
        ("rosa", before_save),
        ("eagle3", before_save),
        ("lora", mid_save),
        ("mtp", mid_save),
        ("lora", within_save),
        ("lora", before_log),
    ):
        if ledger.due("disk", case, fault.__doc__ or ""):
            one(place, ledger, case, fault)
    for case in ("lora", "spiel"):
        if ledger.due("disk", case, LIMITED):
            limited(place, ledger, case)
    for case in (*commands.WRITERS, "report"):
        if ledger.due("disk", case, COMMAND):
            command(place, ledger, case)


def one(place: Place, ledger: Ledger, case: str, fault: Callable[[Path], None]) -> None:
    """Fill a run's disk, check its message, free the space, resume the run, and compare."""
    from trainer.storage import checkpoints

    described = fault.__doc__ or ""
    cases.reference(place, case)
    name = cases.cleared(place, f"{case}-{fault.__name__}")
    run = place.runs / name
    run.mkdir(parents=True, exist_ok=True)
    try:
        with mounted(run):
            child = cases.start(place, case, name, before=lambda: fault(run))
            code, gone = child.wait(), cases.lost(place, name)
            saved = checkpoints.complete(run / "checkpoints")
            intact = bool(saved) and checkpoints.fault(saved[-1]) is None
            message = child.message("disk is full")
            (run / "filler").unlink(missing_ok=True)
            cases.finish(cases.start(place, case, name))
            same = all(cases.same(place, case, name).values())
    except Unmounted as reason:
        ledger.add("disk", case, described, skipped=True, said=str(reason), ok=True)
        return
    ok = code == 1 and bool(message) and intact and same and gone <= EVERY
    ledger.add("disk", case, described, code=code, lost=gone, said=message, same=same, ok=ok)


def limited(place: Place, ledger: Ledger, case: str) -> None:
    """Let a run save into files that end amid a write, then resume it without the limit."""
    from trainer.storage import checkpoints

    cases.reference(place, case)
    name = cases.cleared(place, f"{case}-limited")
    child = cases.start(place, case, name, before=small_files)
    code, gone = child.wait(), cases.lost(place, name)
    folder = place.runs / name / "checkpoints"
    saved = checkpoints.complete(folder)
    intact = bool(saved) and checkpoints.fault(saved[-1]) is None
    left = [path.name for path in folder.glob(".*")]
    message = child.message("could not be written")
    cases.finish(cases.start(place, case, name))
    same = all(cases.same(place, case, name).values())
    ok = code == 1 and bool(message) and intact and not left and same and gone <= EVERY
    ledger.add("disk", case, LIMITED, code=code, lost=gone, said=message, same=same, ok=ok)


def command(place: Place, ledger: Ledger, case: str) -> None:
    """Let a command write to a full disk, then to one with room, and compare."""
    cases.reference(place, "export" if case == "report" else case)
    folder = place.path / "full"
    folder.mkdir(exist_ok=True)
    out, log = folder / case, place.path / "logs" / f"{case}-full.log"
    module, arguments = commands.arguments(place, case, case, EVERY) or ("trainer.report", [])
    arguments = [word for word in arguments if not word.startswith("out=")]
    arguments.append(f"run={out}" if case == "report" else f"out={out}")
    try:
        with mounted(folder):
            if case == "report":
                shutil.copytree(place.runs / "lora-alone", out)
            fill(folder, 12 << 10)
            child = warm.start(module, arguments, log, place.cache(case))
            code, message = child.wait(), child.message("disk is full")
            left = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
            left += [path.name for path in out.glob("*.tmp")] if case == "report" else []
            torn = case != "report" and out.exists()
            (folder / "filler").unlink()
            again = warm.start(module, arguments, log, place.cache(case)).wait()
            same = again == 0 and (
                case == "report" or files(out) == files(place.path / "answers" / f"{case}-alone")
            )
    except Unmounted as reason:
        ledger.add("disk", case, COMMAND, skipped=True, said=str(reason), ok=True)
        return
    traced = "Traceback" in child.output()
    ok = code == 1 and bool(message) and not left and not torn and not traced and same
    message += f" {left} left" if left else ""
    ledger.add("disk", case, COMMAND, code=code, said=message, same=same, ok=ok)


def files(folder: Path) -> str:
    """Return a digest of all files of a folder."""
    return cases.digest(*sorted(path for path in folder.rglob("*") if path.is_file()))


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
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unmounted(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, room: int = 0) -> None:
    """Fill up the disk, but for `room` bytes."""
    with (folder / "filler").open("ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        file.truncate(max(0, file.tell() - room))


def before_save(run: Path, room: int = 0) -> None:
    """the disk is full when a save begins"""
    from trainer.training.lightning_trainer import AtomicCheckpointIO

    whole = AtomicCheckpointIO.save_checkpoint

    def patched(self: Any, content: dict[str, Any], *args: Any, **named: Any) -> None:
        if content["counters"]["step"] == STEP:
            fill(run, room)
        whole(self, content, *args, **named)

    AtomicCheckpointIO.save_checkpoint = patched  # type: ignore[method-assign, assignment]


def mid_save(run: Path) -> None:
    """the disk fills in the middle of a save"""
    before_save(run, 20 << 10)


def small_files() -> None:
    """Limit the size of files to half of a checkpoint, at a step's save."""
    from trainer.training.lightning_trainer import AtomicCheckpointIO

    whole = AtomicCheckpointIO.save_checkpoint

    def patched(self: Any, content: dict[str, Any], path: Any, *args: Any, **named: Any) -> None:
        if content["counters"]["step"] == STEP:
            earlier = max(Path(path).parent.glob("step-*.ckpt")).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (earlier // 2, earlier // 2))
        whole(self, content, path, *args, **named)

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
