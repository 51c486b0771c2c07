"""Decisions that all ranks of a run share, and the end of their process group."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self, TypeVar

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from trainer.config.errors import ConfigError

log = logging.getLogger("trainer")

# The environment variable with rank 0's decision, for the ranks that Lightning starts.
_DECISION = "GRAFT_DECIDED"


class Decision(Protocol):
    """Can be sent to another process as text."""

    def to_json(self) -> str: ...

    @classmethod
    def from_json(cls, text: str) -> Self: ...


D = TypeVar("D", bound=Decision)


def lightning_starts_ranks(trainer: lightning.Trainer) -> bool:
    """Return whether rank 0 starts the other ranks itself, when it begins to fit. torchrun and srun
    start all ranks at once."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment)


def shared_run_folder(trainer: lightning.Trainer, path: Path) -> Path:
    """Return rank 0's run folder. Ranks that Lightning starts have it in their arguments; it is
    broadcast to those of torchrun and srun."""
    if not trainer.is_global_zero:
        log.setLevel(logging.WARNING)  # rank 0 logs for all
    if lightning_starts_ranks(trainer):
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"lightning.num_nodes={trainer.num_nodes}: processes of several machines need"
                " torchrun or srun. Start python -m torch.distributed.run --nnodes=..."
                " --nproc-per-node=... -m trainer ... on each machine, or srun python -m trainer"
                " ..."
            )
        return path
    trainer.strategy.setup_environment()
    shared = Path(trainer.strategy.broadcast(str(path)))
    if shared != path:
        shutil.rmtree(path, ignore_errors=True)
    return shared


def decide_on_rank0(trainer: lightning.Trainer, decide: Callable[[], D], kind: type[D]) -> D:
    """Return what rank 0 decides about the run folder, on all ranks. The decision changes the
    folder at once, and a rank that looked there a moment later would decide differently."""
    if trainer.world_size == 1:
        return decide()
    if lightning_starts_ranks(trainer):
        if not trainer.is_global_zero:
            return kind.from_json(os.environ[_DECISION])
        decision = decide()
        # The other ranks are started by fit, with this environment.
        os.environ[_DECISION] = decision.to_json()
        return decision
    local: D | None = None  # rank 0 keeps its own, which has more than the text (StartPoint)
    text, error = None, None
    if trainer.is_global_zero:
        try:
            local = decide()
            text = local.to_json()
        except Exception as caught:
            error = caught
    text, error = trainer.strategy.broadcast((text, error))
    if error is not None:
        raise error
    return local if local is not None else kind.from_json(text)  # type: ignore[arg-type]


def destroy_process_group(trainer: lightning.Trainer) -> None:
    """Destroy the process group while all ranks are alive. Rank 0 continues alone (export, report);
    the other ranks exit.

    DDP's reducer keeps a reference to the group. If it is the last one, gloo's threads are joined
    while holding the GIL, which can deadlock; so the reducer is deleted first.
    """
    strategy = trainer.strategy
    strategy.model = strategy.lightning_module
    gc.collect()
    torch.distributed.destroy_process_group()
    # Lightning watches the ranks that it started, and kills this process when one of them has a
    # non-zero exit code, such as after a signal. So it is given none to watch.
    if (ranks := getattr(strategy.launcher, "procs", None)) is not None:
        ranks.clear()
