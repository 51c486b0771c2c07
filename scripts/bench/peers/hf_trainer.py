"""Hugging Face's Trainer over stock PEFT's LoRA, with its collator for labelled rows; it logs each
step, as ours does."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import measuring
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Ends(TrainerCallback):
    """Tells the clock of each optimiser step."""

    def __init__(self, clock: measuring.Clock):
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()


def arguments(spec: dict[str, Any], out: str) -> dict[str, Any]:
    """Return the run's settings under transformers' names: rows in their order, constant rate, no
    checkpoints."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": spec["batch_size"],
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": spec["device"] == "cpu",
        "seed": spec["seed"],
        "bf16": spec["autocast"],
        "gradient_checkpointing": spec["gradient_checkpointing"],
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": spec["device"] == "cuda",
    }


def train(spec: dict[str, Any], trainer: Trainer, clock: measuring.Clock, **more: Any) -> None:
    """Train, check what the trainer's loader gave, and write the result."""
    trainer.add_callback(Ends(clock))
    trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = measuring.memory()
    measuring.same_batches(spec, iter(trainer.get_train_dataloader()))
    clock.write(**peak, **more)


def main() -> None:
    spec = measuring.read()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="right")
    tokenizer.pad_token_id = spec["pad"]
    rows = list(itertools.chain.from_iterable(measuring.rows(spec)))
    clock = measuring.Clock(spec)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            measuring.adapted(spec),
            TrainingArguments(**arguments(spec, out)),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=measuring.EIGHT),
        )
        train(spec, trainer, clock)


if __name__ == "__main__":
    main()
