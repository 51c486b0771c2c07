"""passes.run for several sequences of different lengths: the target reads further text of each over
a drafter's own keys and values, and positions after it that see chosen others and are not kept.

    a row of a pass    m places of text, padded on the right, then N further positions
    their entries      a row's text, the N positions behind it, then what its padding writes

The next pass writes over all but the text, as in trainer.drafters.ragged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from trainer.drafters import Target, passes
from trainer.drafters.ragged import Entries, RaggedMemory
from trainer.drafters.tree_places import Columns


class ModelEntries(DynamicCache):
    """The entries of a target's layers, as its class takes a cache."""

    def __init__(self, entries: Sequence[Entries]):
        super().__init__()
        self.entries = entries

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.entries[layer_idx].update(key_states, value_states)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.entries[0].end


def layout(
    lengths: Sequence[int],
    counts: Sequence[int],
    ahead: Int[Tensor, " N"],
    sees: Bool[Tensor, "N N"],
) -> Columns:
    """Return the layout of a pass over `counts` further tokens of sequences of `lengths` tokens,
    and over positions that are `ahead` of each text's end and see each other by `sees`."""
    device, most, further = ahead.device, max(counts), len(ahead)
    start, count = (
        torch.tensor(numbers).to(device, non_blocking=True).unsqueeze(1)
        for numbers in (lengths, counts)
    )
    end, column = start + count, torch.arange(most, device=device)
    rows = len(lengths)
    behind = end + torch.arange(further, device=device)
    at = torch.cat([start + column + further * (column >= count), behind], dim=1)
    last = end - 1
    positions = torch.cat([torch.minimum(start + column, last), last + ahead], dim=1)
    places = torch.arange(max(lengths) + most + further, device=device).expand(rows, -1)
    text = (places.unsqueeze(1) <= positions[:, :most].unsqueeze(2)).expand(-1, most, -1)
    number = places - end  # of the further positions
    inside = (number >= 0) & (number < further)
    keys, both = places, text
    if further:
        number = number.clamp(0, further - 1)
        keys = torch.where(inside, last + ahead[number], places)
        own = sees.t()[number].transpose(1, 2) & inside.unsqueeze(1)
        both = torch.cat([text, own | (places < end).unsqueeze(1)], dim=1)
    return Columns(at, positions, keys, both)


def padded(texts: Sequence[Int[Tensor, " n"]]) -> tuple[Int[Tensor, "B m"], list[int]]:
    """Return several texts, padded on the right, and the length of each."""
    return pad_sequence(list(texts), batch_first=True), [len(text) for text in texts]


def room(target: Target, memory: RaggedMemory, counts: Sequence[int], most: int) -> int:
    """Return how many positions may follow each of several texts, at most `most`, once `counts`
    further tokens of each are read."""
    lengths = (length + count for length, count in zip(memory.lengths, counts, strict=True))
    rooms = (passes.room(target.config, length) for length in lengths)
    return min([most, *(room for room in rooms if room is not None)])


def after_texts(
    target: Target,
    memory: RaggedMemory,
    ids: Int[Tensor, "B m"],
    counts: Sequence[int],
    block: passes.Block,
    around: contextlib.AbstractContextManager[Any],
) -> tuple[Float[Tensor, "B d"], Float[Tensor, "B N d"]]:
    """Read `counts` tokens of each row of `ids`, and the block's positions, of which each row has
    the same number. Return the states that the output head reads at the last token and at these
    positions. `around` is open while the target runs."""
    plan = layout(memory.lengths, counts, block.ahead, block.sees)
    for entries in memory.layers:
        entries.place(plan.at, plan.keys.shape[1])
    dtype = target.model.get_input_embeddings().weight.dtype
    mask = passes.masks(target, plan.sees, plan.positions, plan.keys, dtype)
    further = block.inputs
    if "input_ids" in further:
        inputs = {"input_ids": torch.cat([ids, further["input_ids"]], dim=1)}
    else:
        inputs = {"inputs_embeds": torch.cat([target.embed(ids), further["inputs_embeds"]], dim=1)}
    cache = ModelEntries(memory.layers)
    with around:
        hidden = passes.run(
            target, cache, position_ids=plan.positions, attention_mask=mask, **inputs
        )
    memory.lengths = [length + count for length, count in zip(memory.lengths, counts, strict=True)]
    rows = torch.arange(len(ids), device=ids.device)
    last = torch.tensor(counts).to(ids.device, non_blocking=True) - 1
    return hidden[rows, last], hidden[:, ids.shape[1] :]
