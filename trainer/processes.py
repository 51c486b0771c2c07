"""Lightning's trainer for a run, and the processes that it is made of: where they live, who decides, and how they part."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from adapters.delta import Adapter
from adapters.full import Full, Nothing
from trainer.checkpoint import load, remove, save
from trainer.config import ConfigError
from trainer.precision import compute
from trainer.sharding import Sharded

log = logging.getLogger("trainer")

_DECIDED = "GRAFT_DECIDED"  # what the first process tells those that Lightning starts for it


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to the disk: trainer.checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def make_trainer(config: dict[str, Any], adapter: Adapter, path: Path) -> lightning.Trainer:
    """Lightning's trainer as conf/lightning and the run's length, precision and adapter ask for it."""
    cuda = torch.cuda.is_available() and config["lightning"]["accelerator"] != "cpu"
    _, precision, _ = compute(config["precision"], config["base"]["dtype"], isinstance(adapter, Full), cuda)
    idle = isinstance(adapter, Nothing) and not config["drafter"]
    settings = config["lightning"] | ({"devices": 1, "strategy": "auto"} if idle else {})
    timeout = timedelta(minutes=settings.pop("timeout"))
    if settings["strategy"] == "fsdp2":
        settings["strategy"] = Sharded(timeout=timeout)
    # One epoch for the whole run: the loader holds all its micro-batches, and its end is the run's.
    lightning_ = lightning.Trainer(
        **settings, precision=precision,  # type: ignore[arg-type]
        max_epochs=1, max_steps=-1, accumulate_grad_batches=config["accumulate"],
        deterministic=config["deterministic"], plugins=[AtomicCheckpointIO()], default_root_dir=path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        limit_val_batches=0, log_every_n_steps=1, num_sanity_val_steps=0,
    )  # fmt: skip
    if isinstance(lightning_.strategy, DDPStrategy):
        # No buffer here differs between processes, and a sparse adapter's are as large as itself, for each forward pass.
        lightning_.strategy._ddp_kwargs.setdefault("forward_sync_buffers", False)
        lightning_.strategy._timeout = timeout
    lightning_.joined = torch.distributed.is_initialized()  # type: ignore[attr-defined]
    return lightning_


def agreed_folder(lightning_: lightning.Trainer, path: Path) -> Path:
    """The first process's folder. Processes that Lightning starts are given it; those of torchrun and srun ask for it."""
    if not lightning_.is_global_zero:
        log.setLevel(logging.WARNING)  # the first process speaks for all
    if isinstance(lightning_._accelerator_connector.cluster_environment, LightningEnvironment):
        if lightning_.num_nodes > 1:
            raise ConfigError(
                f"lightning.num_nodes={lightning_.num_nodes}: processes of several machines find each other by torchrun or srun. Start "
                "python -m torch.distributed.run --nnodes=... --nproc-per-node=... -m trainer ... on each of them, or srun python -m trainer ..."
            )
        return path
    lightning_.strategy.setup_environment()
    agreed = Path(lightning_.strategy.broadcast(str(path)))
    if agreed != path:
        shutil.rmtree(path, ignore_errors=True)
    return agreed


def first_decides(lightning_: lightning.Trainer, decide: Callable[[], Any]) -> Any:
    """What the first process decides about the run's folder, in all of them. It changes the folder at once, and another one that looks
    there a moment later would begin elsewhere."""
    if lightning_.world_size == 1:
        return decide()
    if isinstance(lightning_._accelerator_connector.cluster_environment, LightningEnvironment):
        if lightning_.is_global_zero:  # its children begin with the fit, and with its environment
            made = earlier, parent, saved_path, longer = decide()
            os.environ[_DECIDED] = json.dumps([earlier is not None, parent, saved_path and str(saved_path), longer])
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
    """End the group of processes while all of them are there: what the first one does from now on nobody waits for.

    torch's Reducer holds the group, and where it is the last to, it ends gloo's threads with the GIL in its hand, for which one of them
    may wait. So it has to be gone before the group is.
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
