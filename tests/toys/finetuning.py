"""A training loop on a few rows of tokens, without a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from adapters.delta import Start
from adapters.lora import LoRAAdapter
from tests.toys import adapters as toys
from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.data.batches import Batches, BatchOrder, Collate, Sequences
from trainer.data.render import Tokens
from trainer.training.finetune import FineTune
from trainer.training.lightning_trainer import make_trainer


class Table(list):
    """Rows as trainer.data.rows keeps them, in memory."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.ids) for row in self])

    @property
    def trained(self) -> np.ndarray:
        return np.array([sum(row.trained[1:]) for row in self])


def table(count: int) -> Table:
    """Rows of 4 to 40 tokens, of which 1 to 39 are trained."""
    draw = np.random.default_rng(0)
    made = Table()
    for i in range(count):
        length = int(draw.integers(4, 41)) if i % 3 else 40
        first = 1 if i % 3 == 0 else length - 1 - i % 2  # all of a long row, or one or two tokens
        made.append(
            Tokens(draw.integers(1, 64, length).tolist(), [at >= first for at in range(length)])
        )
    return made


def lora(**changes: Any) -> LoRAAdapter:
    return toys.lora(**{"target_modules": ["q_proj", "up_proj"], "dtype": "float64"} | changes)


def adapted(adapter: Any = None, model: Any = None) -> tuple[Any, Any]:
    """The adapter, and a model with it in which no trained matrix is zero."""
    adapter = adapter or lora()
    torch.manual_seed(1)
    model = adapter.attach(model or toys.llama(), Start(steps=8, data=toys.batches))
    for name, parameter in model.named_parameters():
        if name.endswith("delta.B"):
            nn.init.normal_(parameter, std=0.2)
    return adapter, model


@dataclass
class Run:
    """A run of the module under Lightning as trainer.run sets both up from a config."""

    folder: Path
    overrides: list[str] = field(default_factory=list)
    rows: Table = field(default_factory=lambda: table(24))

    def __post_init__(self) -> None:
        settings = [
            "base=tiny",
            "task.path=rows",
            "lightning=cpu",
            "precision=fp32",
            "logger=none",
            "optimizer.lr=1e-2",
        ]
        composed = compose.compose(
            [*settings, "batch_size=8", "schedule=constant", "schedule.warmup=0", *self.overrides]
        )
        self.config: Any = OmegaConf.to_container(composed, resolve=True)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    def plan(self, ranks: int = 1) -> BatchOrder:
        c = self.config
        return BatchOrder(
            *Sequences(self.rows).sizes(),
            c["seed"],
            c["batch_size"],
            c["accumulate"],
            ranks,
            epochs=c["max_epochs"],
        )

    def fit(
        self,
        adapter: Any,
        model: Any,
        *callbacks: lightning.Callback,
        steps: int = 3,
        resumed: str | None = None,
    ) -> FineTune:
        c = self.config
        trainer = make_trainer(c, adapter, self.folder)
        trainer.callbacks = list(callbacks)
        module: FineTune = instantiate(c["objective"])(
            model=model,
            adapter=adapter,
            optimizer=instantiate(c["optimizer"]),
            steps=steps,
            labelled=False,
            schedule=partial(instantiate(c["schedule"]), steps=steps),
            accumulate=c["accumulate"],
            seed=c["seed"],
        )
        plan = self.plan(trainer.world_size)
        sampler = Batches(plan, int(resumed[-13:-5]) if resumed else 0, steps, trainer.global_rank)
        loader = DataLoader(
            Sequences(self.rows), batch_sampler=sampler, collate_fn=Collate(0, False, False)
        )
        trainer.fit(module.train(), loader, ckpt_path=resumed)
        assert module.step == steps
        return module
