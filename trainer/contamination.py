"""Packed rows that see each other: whether a loaded model carries state across them, tried on a few tokens."""

from __future__ import annotations

import torch
from torch import nn

from trainer.base import Base, BaseError


@torch.no_grad()
def refuse_contamination(model: nn.Module, base: Base) -> None:
    """Try on a few tokens whether packed rows see only themselves in this model: what stands behind another row does not change with
    that row, and is what it is alone. The second is held for most positions only: in bf16 rounding alone, which differs between lengths,
    can turn a token's logits over.

    Raises:
        BaseError: they do not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    row = torch.arange(5, 12, device=device)
    firsts = [torch.arange(start, start + 8, device=device) for start in (3, 13)]
    places = torch.cat([torch.arange(len(part), device=device) for part in (firsts[0], row)])
    behind = [
        model(input_ids=torch.cat([first, row])[None], position_ids=places[None], use_cache=False)
        .logits[0, -len(row) :]
        .float()
        for first in firsts
    ]
    alone = model(input_ids=row[None], use_cache=False).logits[0].float()
    model.train(was_training)
    scale = max(float(alone.abs().max()), 1e-6)
    apart = (behind[0] - alone).abs().amax(-1).median()
    difference = max(float((behind[0] - behind[1]).abs().max()), float(apart))
    if difference > (0.05 if next(model.parameters()).dtype != torch.float32 else 1e-3) * scale:
        raise BaseError(
            f"in {base.path} packed rows see each other (logits differ by {difference:.3g} of {scale:.3g}): it carries state that attention masks "
            "do not cut. Set packing=false"
        )
