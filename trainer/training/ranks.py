"""Decisions that all ranks of a run share."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from trainer.config.errors import ConfigError

log = logging.getLogger("trainer")

_DECIDED = "GRAFT_DECIDED"  # what the first process tells those that Lightning starts for it


def shared_run_folder(lightning_: lightning.Trainer, path: Path) -> Path:
    """The first process's folder. Processes that Lightning starts are given it; those of torchrun
    and srun ask for it."""
    if not lightning_.is_global_zero:
        log.setLevel(logging.WARNING)  # the first process speaks for all
    if isinstance(lightning_._accelerator_connector.cluster_environment, LightningEnvironment):
        if lightning_.num_nodes > 1:
            raise ConfigError(
                f"lightning.num_nodes={lightning_.num_nodes}: processes of several machines find"
                " each other by torchrun or srun. Start python -m torch.distributed.run"
                " --nnodes=... --nproc-per-node=... -m trainer ... on each of them, or srun python"
                " -m trainer ..."
            )
        return path
    lightning_.strategy.setup_environment()
    agreed = Path(lightning_.strategy.broadcast(str(path)))
    if agreed != path:
        shutil.rmtree(path, ignore_errors=True)
    return agreed


def first_decides(lightning_: lightning.Trainer, decide: Callable[[], Any]) -> Any:
    """What the first process decides about the run's folder, in all of them. It changes the folder
    at once, and another one that looks there a moment later would begin elsewhere."""
    if lightning_.world_size == 1:
        return decide()
    if isinstance(lightning_._accelerator_connector.cluster_environment, LightningEnvironment):
        if lightning_.is_global_zero:  # its children begin with the fit, and with its environment
            made = earlier, parent, saved_path, longer = decide()
            os.environ[_DECIDED] = json.dumps(
                [earlier is not None, parent, saved_path and str(saved_path), longer]
            )
            return made
        begun, parent, saved_path, longer = json.loads(os.environ[_DECIDED])
        return ({} if begun else None), parent, saved_path and Path(saved_path), longer
    made, error = None, None
    if lightning_.is_global_zero:
        try:
            made = decide()
        except Exception as caught:
            error = caught
    made, error = lightning_.strategy.broadcast((made, error))
    if error is not None:
        raise error
    return made


def part(lightning_: lightning.Trainer) -> None:
    """End the group of processes while all of them are there: what the first one does from now on
    nobody waits for.

    torch's Reducer holds the group, and where it is the last to, it ends gloo's threads with the
    GIL in its hand, for which one of them may wait. So it has to be gone before the group is.
    """
    strategy = lightning_.strategy
    if not torch.distributed.is_initialized() or lightning_.joined:  # type: ignore[attr-defined]
        return
    strategy.model = strategy.lightning_module
    gc.collect()
    torch.distributed.destroy_process_group()
    for thread in threading.enumerate():
        if (
            thread.name == "child-process-observer"
        ):  # Lightning's; it kills this process when a child's code is not 0, as after a signal
            thread._child_processes = []  # type: ignore[attr-defined]
