"""A small model's drafts for the sequences of a batch (trainer.drafters.small)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.drafters import DrafterError, Target, TargetUpdate, passes
from trainer.drafters.batch_passes import ModelEntries
from trainer.drafters.ragged import RaggedMemory
from trainer.drafters.tree_batch import TreeBatch
from trainer.drafters.tree_places import Columns

# Of logits: what sums of other shapes may change, relative to the largest.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def memory_of(small: Target, count: int) -> RaggedMemory:
    """Return the empty memory of `count` sequences."""
    return RaggedMemory.empty(small.config.num_hidden_layers, count)


def tree_batch(
    small: Target, depth: int, memory: RaggedMemory, updates: Sequence[TargetUpdate], size: int
) -> TreeBatch:
    """Return the growth of a small model, whose first `size` logits are those of the target's
    tokens."""
    dtype = small.model.get_input_embeddings().weight.dtype

    def read(ids: Tensor, at: Columns) -> Tensor:
        mask = passes.masks(small, at.sees, at.positions, at.keys, dtype)
        cache = ModelEntries(memory.layers)
        return passes.run(small, cache, ids, position_ids=at.positions, attention_mask=mask)

    growth = TreeBatch(depth, memory, updates, read, lambda states: small.head(states)[..., :size])
    own = growth.root.shape[-1]
    growth.vocabulary = torch.arange(own, device=growth.root.device) if own < size else None
    return growth


@torch.no_grad()
def as_batch(model: torch.nn.Module) -> Target | None:
    """Return a small model as it reads several texts at once; None if it cannot. That is tried on
    two short texts and a tree, since models differ in what they make of masks and positions."""
    try:
        passes.refuse(model, "small")
        small = Target(model)
        weight = small.model.get_input_embeddings().weight
        ids = torch.arange(1, 7, device=weight.device) * (small.config.vocab_size // 7)
        none = weight.new_zeros(0)
        updates = [TargetUpdate(none, none, text) for text in (ids[:3], ids[3:4])]
        growth = tree_batch(small, 2, memory_of(small, 2), updates, small.config.vocab_size)
        actual = [
            growth.first(),
            growth.extend(ids[4:].expand(2, -1), torch.full((2, 2), -1))[:, 1],
        ]
        expected = [
            torch.stack([model(text.unsqueeze(0)).logits[0, -1] for text in texts])
            for texts in (
                [ids[:3], ids[3:4]],
                [torch.cat([ids[:3], ids[5:]]), torch.cat([ids[3:4], ids[5:]])],
            )
        ]
    except (DrafterError, TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return None
    for one, other in zip(actual, expected, strict=True):
        allowed = TOLERANCE.get(weight.dtype, 1e-3) * float(other.abs().max())
        if float((one - other).abs().max()) > allowed:
            return None
    return small
