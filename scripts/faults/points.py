"""SIGKILL at each point of a save, and within an accumulation window: moments that random kills
rarely hit.

The points are patched into a forked child; the program itself knows nothing of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from scripts.faults import cases
from scripts.faults.cases import EVERY, Place
from scripts.faults.ledger import Ledger

# the step whose save is hit: after RoSA's mask, a move of SpIEL's support, and checkpoints before
# it
SAVE = 9
CASES = ("lora", "rosa", "spiel", "mtp", "eagle3")
FEW = ("before_write", "after_rename")  # the points of all cases but the first


def inject(place: Place, ledger: Ledger) -> None:
    """Kill LoRA's run at every point, the others at those that leave different files behind."""
    for case in CASES:
        for point in POINTS if case == "lora" else FEW:
            if ledger.due("points", case, point):
                one(place, ledger, case, point)


def one(place: Place, ledger: Ledger, case: str, point: str) -> None:
    """Kill a run at a point, resume it, and compare."""
    cases.reference(place, case)
    name = cases.cleared(place, f"{case}-{point}")
    child = cases.start(place, case, name, before=POINTS[point])
    code = child.wait()
    gone = cases.lost(place, name)
    cases.finish(cases.start(place, case, name))
    same = all(cases.same(place, case, name).values())
    ledger.add(
        "points",
        case,
        point,
        killed=code == -9,
        lost=gone,
        same=same,
        ok=same and code == -9 and gone <= EVERY,
    )


def die() -> NoReturn:
    """Kill this process, as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def wrapped(owner: Any, name: str, hit: Callable[..., bool], after: bool = False) -> None:
    """Kill this process before, or after, a call for which `hit(*arguments)` is true. Must be
    called in a child."""
    whole = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        if not after and hit(*args):
            die()
        result = whole(*args, **named)
        if after and hit(*args):
            die()
        return result

    setattr(owner, name, patched)


def _target(ending: str) -> Callable[..., bool]:
    return lambda *args: str(args[1]).endswith(f"step-{SAVE:08d}.{ending}")


def before_write() -> None:
    """Nothing of the save is on the disk."""
    from trainer.training.lightning_trainer import AtomicCheckpointIO

    wrapped(
        AtomicCheckpointIO,
        "save_checkpoint",
        lambda self, content, path, *_: content["counters"]["step"] == SAVE,
    )


def mid_write() -> None:
    """Half of the file is on the disk."""
    import io

    import torch

    whole = torch.save

    def half(content: Any, file: Any, *args: Any, **named: Any) -> None:
        if not (isinstance(content, dict) and content.get("counters", {}).get("step") == SAVE):
            return whole(content, file, *args, **named)
        memory = io.BytesIO()
        whole(content, memory)
        file.write(memory.getvalue()[: memory.tell() // 2])
        file.flush()
        os.fsync(file.fileno())
        die()

    torch.save = half  # type: ignore[assignment]


def before_rename() -> None:
    """The whole file is there, under its temporary name."""
    wrapped(os, "replace", _target("ckpt"))


def after_rename() -> None:
    """The file has its name, and no manifest."""
    wrapped(os, "replace", _target("ckpt"), after=True)


def before_manifest() -> None:
    """The manifest is there, under its temporary name."""
    wrapped(os, "replace", _target("json"))


def after_manifest() -> None:
    """The save is complete, and what is too old is not yet removed."""
    wrapped(os, "replace", _target("json"), after=True)


def between_removals() -> None:
    """An old checkpoint has lost its manifest and is still there."""
    from trainer.storage import checkpoints

    whole = checkpoints.remove

    def half(checkpoint: checkpoints.Checkpoint) -> None:
        if checkpoint.manifest.exists() and checkpoint.step >= EVERY:
            checkpoint.manifest.unlink()
            die()
        whole(checkpoint)

    checkpoints.remove = half


def mid_window() -> None:
    """Half of a step's gradients are there."""
    from trainer.training.finetune import FineTune

    wrapped(
        FineTune,
        "on_train_batch_start",
        lambda self, batch, at: (
            self.step == SAVE + 1 and at % self.accumulate == self.accumulate - 1
        ),
    )


def before_journal() -> None:
    """A step is done, and half of the line about it is written."""
    from trainer.storage import journal

    whole = journal._append

    def half(path: Path, row: dict[str, Any]) -> None:
        if row["step"] == SAVE + 1:
            with path.open("a") as file:
                file.write('{"kind": "step", "st')
            die()
        whole(path, row)

    journal._append = half


POINTS: dict[str, Callable[[], None]] = {
    point.__name__: point
    for point in (
        before_write,
        mid_write,
        before_rename,
        after_rename,
        before_manifest,
        after_manifest,
        between_removals,
        mid_window,
        before_journal,
    )
}
