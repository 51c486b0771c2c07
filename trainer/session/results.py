"""What a run leaves when it ends: its adapter, its drafter, and the numbers to look at."""

from __future__ import annotations

import logging
from typing import Any

import psutil
import rich

from adapters.delta import Adapter
from trainer.assembly.trained import checkpoint_record, load_trained
from trainer.drafters import Drafter
from trainer.drafters import io as drafter_io
from trainer.exporting import adapter as adapter_module
from trainer.models.base import Base
from trainer.storage import checkpoints
from trainer.storage.journal import Journal
from trainer.storage.run_folder import RunFolder
from trainer.training.finetune import FineTune

log = logging.getLogger("trainer")


def save_drafter(
    place: RunFolder,
    drafter: Drafter,
    base: Base,
    config: dict[str, Any],
    record: dict[str, Any],
    step: int,
) -> None:
    """Write the drafter as it is after the last step, or after the best one."""
    chosen = (
        checkpoints.chosen(place.checkpoints, config["export"])
        if checkpoints.complete(place.checkpoints)
        else None
    )
    if chosen is not None and int(chosen.stem[5:]) != step:
        step = int(chosen.stem[5:])
        log.info("the best evaluation was after step %d: that is what becomes the drafter", step)
        drafter.load_state(checkpoints.load(chosen)["drafter"])
    adapter = record["identity"]["target"]
    if config["adapter"]["_target_"] != "adapters.full.Nothing":
        adapter = checkpoint_record(
            place.path, record["id"], checkpoints.path_of(place.checkpoints, step)
        )
    about = drafter_io.trained_for(base, place.path, step, adapter)
    drafter_io.save(drafter, config["drafter"], about, place.path / "drafter")
    log.info("drafter: %s", place.path / "drafter")


def save_adapter(
    place: RunFolder, module: FineTune, base: Base, task: Any, adapter: Adapter, which: str
) -> None:
    """Write the adapter, and load it back to compare where the base fits into memory twice more."""
    target = place.path / "adapter"
    if not checkpoints.complete(place.checkpoints):  # callbacks.checkpoints=null
        adapter_module.save_adapter(adapter, module.model, base, task, target)
        log.info(
            "adapter: %s. Not loaded back, since the run kept no checkpoint to compare it with",
            target,
        )
        return
    chosen = checkpoints.chosen(place.checkpoints, which)
    if int(chosen.stem[5:]) != module.step:
        log.info(
            "the best evaluation was after step %d: that is what becomes the adapter",
            int(chosen.stem[5:]),
        )
        adapter.load_state(module.model, checkpoints.load(chosen)["adapter"])
    adapter_module.save_adapter(adapter, module.model, base, task, target)
    needed = 2 * 4 * sum(p.numel() for p in module.model.parameters())
    if needed > psutil.virtual_memory().available / 2:
        log.info(
            "adapter: %s. Not loaded back, which takes %.0f GB: python -m trainer.export run=%s"
            " to=peft does",
            target,
            needed / 1e9,
            place.path,
        )
        return
    difference = adapter_module.verify_adapter(
        load_trained(f"{place.path}@{which}", fp32=True), target
    )
    log.info(
        "adapter: %s, loaded back by stock PEFT: logits differ by %.1e of their spread",
        target,
        difference,
    )


def show(journal: Journal) -> None:
    """Print the held-out numbers before and after."""
    evaluations = journal.rows("evaluation")
    if not evaluations:
        return
    shown = (
        rich.table.Table("held out", "before", "after")
        if len(evaluations) > 1
        else rich.table.Table("held out", "")
    )
    for name in evaluations[-1]:
        if name not in ("kind", "step", "seconds"):
            ends = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
            shown.add_row(name, *(f"{row[name]:.4f}" if name in row else "" for row in ends))
    rich.get_console().print(shown)


def last_loss(journal: Journal) -> float | None:
    """Of the last evaluation, for sweeps."""
    evaluations = journal.rows("evaluation")
    return evaluations[-1].get("loss") if evaluations else None
