"""A run that branches off another one's checkpoint: what it takes along, and what has to be the
same.

The child keeps weights, optimiser, data position and random draws; only the rates from there on are
its own (conf/branch), and its rows if it is given others. The parent is read and never written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.data.identity import changed
from trainer.schedules.cooldown import Cooling
from trainer.storage import checkpoints, run_folder
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.journal import read
from trainer.storage.run_folder import RunFolder

log = logging.getLogger("trainer")


def cooling(branch: dict[str, Any]) -> Cooling:
    """The cooldown of a branch, from the node of the config."""
    return Cooling(
        branch["step"], branch["steps"], branch["level"], branch["shape"], branch["final"]
    )


def fork(
    place: RunFolder, config: dict[str, Any], identity: dict[str, Any], owner: bool
) -> tuple[dict[str, Any], Path]:
    """Bring the parent's checkpoint, and its journal up to there, into a new run folder; returns
    what run.yaml says of the parent, and the checkpoint to go on from. Processes that are not the
    `owner` read the parent's own.

    Raises:
        FolderError, CheckpointError: the parent or its checkpoint cannot be used, or is a run with
        other settings.
    """
    step = config["branch"]["step"]
    path, content, _ = run_folder.read(config["branch"]["run"])
    source = checkpoints.chosen(path / "checkpoints", str(step))
    then = content["identity"]
    different = run_folder.differences(
        content["config"], config, (*run_folder.FREE, *run_folder.LENGTHS, "branch", "task")
    )
    different += run_folder.differences(
        then, identity, ("choices", "steps", "base", "data", "target.run")
    )
    if then["base"] != identity["base"]:
        different.append("base: its weights are others now")
    if different:
        raise CheckpointError(
            f"{path} cannot be branched off with other settings:\n  " + "\n  ".join(different)
        )
    if changed(path, {"train": then["data"]["train"]}, identity["data"]):
        log.info("the rows from step %d on are others than the parent's", step)
    fault = checkpoints.fault(source)
    if fault is not None:
        raise CheckpointError(f"{source} cannot be used: {fault}")
    manifest = json.loads(source.with_suffix(".json").read_text())
    parent = {
        "id": content["id"],
        "run": str(path.resolve()),
        "step": step,
        "sha256": manifest["sha256"],
    }
    if not owner:
        return parent, source
    target = checkpoints.path_of(place.checkpoints, step)
    for file in (source, source.with_suffix(".json")):
        copy = target.with_suffix(file.suffix)
        copy.unlink(missing_ok=True)
        try:
            # checkpoints are never changed in place, so that both runs can have the same file
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [
            row for row in read(path / name) if row["step"] <= step and row.get("kind") != "stopped"
        ]
        (place.path / name).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
        )
    log.info("branching off %s after step %d", path, step)
    return parent, target
