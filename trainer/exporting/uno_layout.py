"""Uno's LoRA as the PEFT folder that SGLang serves (--uno-lora-path)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from adapters import io
from trainer.drafters import Drafter, DrafterError, Target
from trainer.drafters.uno import Uno
from trainer.exporting.compare import TOLERANCE, Mismatch, distance

PARTS = {"A": "lora_A.weight", "B": "lora_B.weight"}


def check(drafter: Drafter, to: str, model: Any) -> None:
    """Refuse a format that cannot hold the LoRA, and a base whose layers PEFT names otherwise.

    Raises:
        DrafterError: the message says which format fits.
    """
    if to != "sglang":
        raise DrafterError(
            f"to={to} is for draft heads with layers of their own, and drafter=uno is a LoRA on the"
            " target: to=sglang writes it as the PEFT folder that SGLang loads"
        )
    assert isinstance(drafter, Uno)
    if rewritten := [name for name in drafter.lora.names if io.is_rewritten(model, name)]:
        raise DrafterError(
            f"to=sglang needs a LoRA on plain layers, and PEFT reads {rewritten[0]} of"
            f" {type(model).__name__} as an experts' matrix: train it with other"
            " drafter.target_modules, or use to=drafter"
        )


@torch.no_grad()
def write(drafter: Uno, base: Any, folder: Path, dtype: torch.dtype, target: str) -> float:
    """Write adapter_config.json and adapter_model.safetensors for a plain `base` in fp32, which
    `target` names. Load them with stock PEFT and return the distance of the logits with the LoRA on
    all positions.

    Raises:
        Mismatch: the logits differ, or the LoRA is lost.
    """
    for parameter in drafter.parameters():
        parameter.copy_(parameter.to(dtype).float())
    names = drafter.lora.names
    tensors: dict[str, Tensor] = {}
    for name, tensor in drafter.lora.tensors().items():
        layer, _, part = name.rpartition(".")
        tensors[f"{io.PREFIX}{layer}.{PARTS[part]}"] = tensor.detach().to(dtype)
    config = peft.LoraConfig(
        r=drafter.rank,
        lora_alpha=drafter.alpha,  # type: ignore[arg-type]
        target_modules=io.shortened(names, base),
        lora_dropout=0.0,
        fan_in_fan_out=any(type(base.get_submodule(name)).__name__ == "Conv1D" for name in names),
        base_model_name_or_path=target,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    io.write(folder, config, tensors)
    draw = torch.Generator().manual_seed(0)
    size = base.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (2, 12), generator=draw).to(base.device)
    plain = base(input_ids=ids).logits.float()
    with drafter.lora.on(Target(base), rows=12, last=12):
        expected = base(input_ids=ids).logits.float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*a tied layer is part of the adapter.*")
        loaded = peft.PeftModel.from_pretrained(base, folder).eval()  # type: ignore[arg-type]
    actual = loaded(input_ids=ids).logits.float()
    difference = distance(expected, actual)
    if not difference <= TOLERANCE or difference > 0.02 * distance(expected, plain) + 5e-5:
        raise Mismatch(
            f"stock PEFT gives other logits than the drafter's LoRA, by {difference:.3g} of their"
            f" spread (at most {TOLERANCE:g}); the LoRA moves them by"
            f" {distance(expected, plain):.3g}"
        )
    return difference
