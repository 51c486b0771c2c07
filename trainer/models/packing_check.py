"""Packed rows that see each other: whether a loaded model carries state across them, tried on a few
tokens."""

from __future__ import annotations

import torch
from torch import nn

from trainer.models.base import Base, BaseError


@torch.no_grad()
def check_packing_isolation(model: nn.Module, base: Base) -> None:
    """Try on a few tokens whether packed rows see only themselves in this model, in batches of one
    sequence and of several: what stands behind another row does not change with that row, and is
    what it is alone. The second is held for most positions only: in bf16 rounding alone, which
    differs between lengths, can turn a token's logits over.

    Raises:
        BaseError: they do not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    row = torch.arange(5, 12, device=device)
    sequences = torch.stack(
        [torch.cat([torch.arange(start, start + 8, device=device), row]) for start in (3, 13)]
    )
    places = torch.cat([torch.arange(8, device=device), torch.arange(len(row), device=device)])
    behind = torch.cat(
        [
            model(input_ids=ids, position_ids=places.expand_as(ids), use_cache=False)
            .logits[:, -len(row) :]
            .float()
            for ids in (sequences[:1], sequences[1:], sequences)
        ]
    )
    alone = model(input_ids=row[None], use_cache=False).logits[0].float()
    model.train(was_training)
    scale = max(float(alone.abs().max()), 1e-6)
    apart = (behind - alone).abs().amax(-1).median(-1).values.max()
    changed = max(float((one - other).abs().max()) for one, other in (behind[:2], behind[2:]))
    difference = max(changed, float(apart))
    if difference > (0.05 if next(model.parameters()).dtype != torch.float32 else 1e-3) * scale:
        raise BaseError(
            f"in {base.path} packed rows see each other (logits differ by {difference:.3g} of"
            f" {scale:.3g}): it carries state that attention masks do not cut. Set packing=false"
        )
