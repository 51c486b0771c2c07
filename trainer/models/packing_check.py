"""A check that packed rows do not see each other: some models carry state across them, which no
attention mask stops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.models.base import Base, BaseError

SHORT = 15  # tokens of a packed sequence that shows what plain attention does
# Kinds of layers, as configs of transformers name them, that do at any length what they do at SHORT
PLAIN = {"full_attention", "sliding_attention", "chunked_attention"}


@torch.no_grad()
def check_packing_isolation(model: nn.Module, base: Base, length: int = SHORT) -> None:
    """Check that packed rows see only themselves in this model: on a few tokens, in batches of one
    sequence and of several. Where layers choose or compress keys, as in the sparse attention of
    MiniMax M3, that may hold for a few tokens and fail beyond a block. There a sequence of `length`
    tokens is checked too, the length of the run's own.

    The logits of a row must not change with the row before it, and must be those of the row alone.
    The second is required at the median position only: rounding in bf16 differs between lengths,
    and can change all logits of one token.

    Raises:
        BaseError: packed rows see each other.
    """
    was_training = model.training
    model.eval()
    try:
        _check_short(model, base)
        kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
        if length > SHORT and kinds - PLAIN:
            _check_long(model, base, length)
    finally:
        model.train(was_training)


def _check_short(model: nn.Module, base: Base) -> None:
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
    scale = max(float(alone.abs().max()), 1e-6)
    from_alone = (packed - alone).abs().amax(-1).median(-1).values.max()
    # Each pair has the same row after two different ones.
    from_other = max(float((one - other).abs().max()) for one, other in (packed[:2], packed[2:]))
    _refuse(model, base, max(from_other, float(from_alone)), scale)


def _check_long(model: nn.Module, base: Base, length: int) -> None:
    """Check the last of two rows, a quarter of the sequence."""
    device = next(model.parameters()).device
    size, last = base.config.get_text_config().vocab_size, length // 4
    ids = torch.arange(length, device=device) * 7 % max(1, size - 3) + min(3, size - 1)
    positions = torch.arange(length, device=device)
    positions[-last:] -= length - last
    inputs: dict[str, Any] = {"input_ids": ids[None], "position_ids": positions[None]}
    packed = model(**inputs, use_cache=False).logits[0, -last:].float()
    alone = model(input_ids=ids[None, -last:], use_cache=False).logits[0].float()
    difference = float((packed - alone).abs().amax(-1).median())
    _refuse(model, base, difference, max(float(alone.abs().max()), 1e-6))


def _refuse(model: nn.Module, base: Base, difference: float, scale: float) -> None:
    """Refuse to pack where logits differ by more than rounding.

    Raises:
        BaseError: they do.
    """
    if difference > (0.05 if next(model.parameters()).dtype != torch.float32 else 1e-3) * scale:
        raise BaseError(
            f"in {base.path} packed rows see each other (logits differ by {difference:.3g} of"
            f" {scale:.3g}): its layers carry state from token to token, or its attention masks are"
            " made without position_ids. Set packing=false"
        )
