"""TRL's SFTTrainer with its peft_config, on tokenised rows with labels, its own collator and its
own loss.

That loss, `nll`, computes the log-probabilities in chunks without the full logits (TRL 1.16.0). Off
by default here, since they change what is computed: activation checkpointing and bf16 autocast,
both on by default in TRL; see gradient_checkpointing and autocast.
"""

from __future__ import annotations

import itertools
import tempfile

import measuring
from datasets import Dataset
from hf_trainer import arguments, train
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    spec = measuring.read()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token_id = spec["pad"]
    rows = Dataset.from_list(list(itertools.chain.from_iterable(measuring.rows(spec))))
    clock = measuring.Clock(spec)
    wrapped = spec["adapter_dtype"] == "float32"  # what SFTTrainer makes of a peft_config
    model = measuring.base(spec) if wrapped else measuring.adapted(spec)
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            **arguments(spec, out), max_length=None, pad_to_multiple_of=measuring.EIGHT
        )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=measuring.lora(spec) if wrapped else None,
        )
        measuring.begin(spec, trainer.model)
        train(spec, trainer, clock, loss=settings.loss_type)


if __name__ == "__main__":
    main()
