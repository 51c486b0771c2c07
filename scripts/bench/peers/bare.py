"""A bare PyTorch loop over stock PEFT's LoRA with the model's own loss on full logits."""

from __future__ import annotations

import contextlib

import measuring
import torch


def main() -> None:
    spec = measuring.read()
    torch.manual_seed(spec["seed"])
    model = measuring.adapted(spec).train()
    if spec["gradient_checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0, fused=True)
    clock = measuring.Clock(spec)
    autocast = (
        torch.autocast(spec["device"], torch.bfloat16)
        if spec["autocast"]
        else contextlib.nullcontext()
    )
    for batch in measuring.batches(spec):
        with autocast:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step(loss.item())
    clock.write()


if __name__ == "__main__":
    main()
