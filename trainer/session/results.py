"""The results of a run: its adapter, its drafter, and its held-out numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import rich

from adapters.full import Nothing
from trainer.assembly import guarded
from trainer.assembly.recipe import Recipe
from trainer.assembly.trained import checkpoint_record, load_trained
from trainer.callbacks.averaging import Averaging
from trainer.drafters import head_lora
from trainer.drafters import io as drafter_io
from trainer.exporting import adapter as adapter_module
from trainer.exporting import card
from trainer.exporting.serving import Serving
from trainer.storage import checkpoints
from trainer.storage.journal import NO_METRICS, Journal
from trainer.storage.progress import Progress
from trainer.storage.run_folder import RunFolder
from trainer.training.finetune import FineTune

log = logging.getLogger("trainer")


def save(
    folder: RunFolder,
    run_yaml: dict[str, Any],
    recipe: Recipe,
    module: FineTune,
    callbacks: list[Any],
) -> None:
    """Write the run's drafter, its adapter and the averaged adapter, whichever it has."""
    if recipe.sharded:
        # each rank holds a part of the weights; the checkpoint holds all
        trained = load_trained(f"{folder.path}@last")
        module.model, module.adapter = trained.model, trained.adapter
    if module.drafter is not None and module.drafter.proposes:
        save_drafter(folder, run_yaml, recipe, module)
    if not module.adapter.exportable or isinstance(module.adapter, Nothing):
        return
    serving = Serving.of(recipe)

    def write(target: Path) -> None:
        serving.write(target, module.model)
        adapter_module.save_adapter(module.adapter, module.model, recipe.base, recipe.task, target)

    with Progress("saving the adapter"):
        for callback in callbacks:
            # before save_adapter, which may load another checkpoint's weights
            if isinstance(callback, Averaging):
                callback.save(partial(_with_card, write, folder.path))
        parity, step = save_adapter(folder, module, write, recipe.config)
        card.write(folder.path / "adapter", "adapter", folder.path, parity, step)


def _with_card(write: Callable[[Path], None], run: Path, target: Path) -> None:
    write(target)
    card.write(target, "adapter", run, None)


def save_drafter(
    folder: RunFolder, run_yaml: dict[str, Any], recipe: Recipe, module: FineTune
) -> None:
    """Write the drafter of the last or the best step, as config's `export` says."""
    drafter, step, config = module.drafter, module.step, recipe.config
    assert drafter is not None
    if checkpoints.complete(folder.checkpoints):
        checkpoint = checkpoints.chosen(folder.checkpoints, config["export"])
        if drafter.guarded:
            step = _kept(folder, drafter)
        elif checkpoint.step != step:
            step = checkpoint.step
            log.info("the best evaluation was after step %d: its drafter is exported", step)
            drafter.load_state(checkpoints.load(checkpoint)["drafter"])
    head_lora.merge(drafter)
    adapter = run_yaml["identity"]["target"]
    if config["adapter"]["_target_"] != "adapters.full.Nothing":
        adapter = checkpoint_record(
            folder.path, run_yaml["id"], checkpoints.Checkpoint.at(folder.checkpoints, step)
        )
    trained_for = drafter_io.trained_for(recipe.base, folder.path, step, adapter)
    drafter_io.save(drafter, config["drafter"], trained_for, folder.path / "drafter")
    card.write(folder.path / "drafter", "drafter", folder.path, None, step)
    log.info("drafter: %s", folder.path / "drafter")


def _kept(folder: RunFolder, drafter: Any) -> int:
    """Load the best measured head of a run into its drafter, the stock one included. Return its
    step."""
    saved = {checkpoint.step: checkpoint for checkpoint in checkpoints.complete(folder.checkpoints)}
    verdict = guarded.judge(folder.path, list(saved))
    if verdict is None or not verdict.kept:
        drafter.restore()
        return 0
    drafter.load_state(checkpoints.load(saved[verdict.kept])["drafter"])
    return verdict.kept


def save_adapter(
    folder: RunFolder, module: FineTune, write: Callable[[Path], None], config: dict[str, Any]
) -> tuple[float | None, int]:
    """Call `write` to save the adapter. Load it back and compare, if two more copies of the base
    fit into memory. Return the distance of the logits, None if they were not compared, and the
    step."""
    target, which = folder.path / "adapter", config["export"]
    if not checkpoints.complete(folder.checkpoints):  # callbacks.checkpoints=null
        write(target)
        log.info(
            "adapter: %s. Not loaded back, since the run kept no checkpoint to compare it with",
            target,
        )
        return None, module.step
    checkpoint = checkpoints.chosen(folder.checkpoints, which)
    if checkpoint.step != module.step:
        log.info(
            "the best evaluation was after step %d: its adapter is exported",
            checkpoint.step,
        )
        module.adapter.load_state(module.model, checkpoints.load(checkpoint)["adapter"])
    write(target)
    if not config["check_export"]:
        log.info("adapter: %s. Not loaded back, since check_export=false", target)
        return None, checkpoint.step
    needed = 2 * 4 * sum(p.numel() for p in module.model.parameters())
    if needed > psutil.virtual_memory().available / 2:
        log.info(
            "adapter: %s. Not loaded back, since that takes %.0f GB: graft export"
            " run=%s to=peft does it",
            target,
            needed / 1e9,
            folder.path,
        )
        return None, checkpoint.step
    with Progress(f"loading {target} back to compare it"):
        trained = load_trained(f"{folder.path}@{which}", fp32=True)
        difference = adapter_module.verify_adapter(trained, target)
    log.info(
        "adapter: %s, loaded back by stock PEFT: logits differ by %.1e of their spread",
        target,
        difference,
    )
    return difference, checkpoint.step


def show(journal: Journal) -> None:
    """Print the held-out numbers before and after."""
    evaluations = journal.rows("evaluation")
    if not evaluations:
        return
    table = (
        rich.table.Table("held out", "before", "after")
        if len(evaluations) > 1
        else rich.table.Table("held out", "")
    )
    for name in evaluations[-1]:
        if name not in NO_METRICS or name == "answers":
            rows = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
            style = "d" if name == "answers" else ".4f"
            title = "graded answers" if name == "answers" else name
            table.add_row(title, *(f"{row[name]:{style}}" if name in row else "" for row in rows))
    rich.get_console().print(table)


def last_loss(journal: Journal) -> float | None:
    """Return the loss of the last evaluation, for sweeps."""
    evaluations = journal.rows("evaluation")
    return evaluations[-1].get("loss") if evaluations else None
