"""A check that packed rows do not see each other: some models carry state across them, which no
attention mask stops."""

from __future__ import annotations

import torch
from torch import nn

from trainer.models.base import Base, BaseError


@torch.no_grad()
def check_packing_isolation(model: nn.Module, base: Base) -> None:
    """Check on a few tokens that packed rows see only themselves in this model, in batches of one
    sequence and of several.

    The logits of a row must not change with the row before it, and must be those of the row alone.
    The second is required at the median position only: rounding in bf16 differs between lengths,
    and can change all logits of one token.

    Raises:
        BaseError: packed rows see each other.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    row = torch.arange(5, 12, device=device)
    sequences = torch.stack(
        [torch.cat([torch.arange(start, start + 8, device=device), row]) for start in (3, 13)]
    )
    positions = torch.cat([torch.arange(8, device=device), torch.arange(len(row), device=device)])
    packed = torch.cat(
        [
            model(input_ids=ids, position_ids=positions.expand_as(ids), use_cache=False)
            .logits[:, -len(row) :]
            .float()
            for ids in (sequences[:1], sequences[1:], sequences)
        ]
    )
    alone = model(input_ids=row[None], use_cache=False).logits[0].float()
    model.train(was_training)
    scale = max(float(alone.abs().max()), 1e-6)
    from_alone = (packed - alone).abs().amax(-1).median(-1).values.max()
    # Each pair has the same row after two different ones.
    from_other = max(float((one - other).abs().max()) for one, other in (packed[:2], packed[2:]))
    difference = max(from_other, float(from_alone))
    if difference > (0.05 if next(model.parameters()).dtype != torch.float32 else 1e-3) * scale:
        raise BaseError(
            f"in {base.path} packed rows see each other (logits differ by {difference:.3g} of"
            f" {scale:.3g}): its layers carry state from token to token, or its attention masks are"
            " made without position_ids. Set packing=false"
        )
