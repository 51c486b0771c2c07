"""Lightning's trainer for a run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from adapters.delta import Adapter
from adapters.full import Full, Nothing
from trainer.models.precision import compute
from trainer.storage.checkpoints import Checkpoint, load, remove, save
from trainer.training.fsdp import Sharded


class AtomicCheckpointIO(CheckpointIO):
    """Lets Lightning save and load through trainer.storage.checkpoints."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(Checkpoint.of(Path(path)))

    def remove_checkpoint(self, path: Any) -> None:
        remove(Checkpoint.of(Path(path)))


def make_trainer(config: dict[str, Any], adapter: Adapter, path: Path) -> lightning.Trainer:
    """Make Lightning's trainer from conf/lightning and the run's length, precision and adapter."""
    cuda = torch.cuda.is_available() and config["lightning"]["accelerator"] != "cpu"
    _, precision, _ = compute(
        config["precision"], config["base"]["dtype"], isinstance(adapter, Full), cuda
    )
    idle = isinstance(adapter, Nothing) and not config["drafter"]
    settings = config["lightning"] | ({"devices": 1, "strategy": "auto"} if idle else {})
    timeout = timedelta(minutes=settings.pop("timeout"))
    if settings["strategy"] == "fsdp2":
        settings["strategy"] = Sharded(timeout=timeout)
    # Lightning chooses DDP by the number of devices, and takes it from this registry. Buffers are
    # the same on all ranks, and a sparse adapter's are as large as its weights. So they are not
    # synchronised in each forward pass.
    StrategyRegistry.register(
        "ddp", DDPStrategy, override=True, timeout=timeout, forward_sync_buffers=False
    )
    # The whole run is one epoch: the loader yields all its micro-batches, and ends with the run.
    return lightning.Trainer(
        **settings,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=-1,
        accumulate_grad_batches=config["accumulate"],
        deterministic=config["deterministic"],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
