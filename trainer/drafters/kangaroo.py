"""Kangaroo: the target's first layers and a small adapter draft (Liu et al. 2024, arXiv
2404.18911).

    f_t = h^E_t                                        the output of the target's first E layers
    m_t = norm(f_t + Attention(RMSNorm(f_1 .. f_t)))   one layer of attention, without an MLP
    q_t = softmax(head(m_t))                           predicts x_{t+1}; head is the target's

    L = Σ_t loss(p_t, q_t),  p_t = softmax(head(h_t))

A drafted token is read by the E layers and the adapter, which predict the next one: a small model
that shares the target's first layers. So offset k at position t is q_{t+k}, after the row's own
tokens, and all offsets are one prediction: the first is trained, the others are only measured.

Norm (d,) starts as the target's last one. The E layers are those of the target with its adapter. In
decoding the drafter keeps keys and values of the E layers and its own, and a tree's entries are
dropped. The authors stop a draft where the best token's probability is below 0.6:
policy=confidence:0.6, which stops before that token and not after it.

Differs from the paper:
    The authors verify from layer E on, with the drafter's own states; here the target reads drafted
    tokens from the start, and the drafter reads accepted ones again, E of L layers each. The
    attention has as many heads for keys and values as the target, and Llama's layout. There is no
    format of engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, passes
from trainer.drafters.batch_passes import ModelEntries
from trainer.drafters.distilled import Distilled
from trainer.drafters.families import family_of
from trainer.drafters.layers import (
    autocast_like,
    check_states,
    decoder_layer,
    final_norm,
    layer_cache,
    layer_inputs,
    layers_of,
    rotations,
    run_layer,
)
from trainer.drafters.ragged import RaggedMemory
from trainer.drafters.small import SmallModelGrowth
from trainer.drafters.tree_batch import TreeBatch
from trainer.drafters.tree_places import Columns
from trainer.drafters.unrolled import Entries
from trainer.models.cache_argument import with_cache
from trainer.models.heads import captured_layers
from trainer.speed.roomy_cache import roomy


@dataclass
class Memory:
    """Keys and values of the E layers and of the adapter at the first `length` tokens, followed by
    those of the last tree."""

    cache: DynamicCache = field(default_factory=lambda: roomy(DynamicCache()))
    entries: Entries = field(default_factory=Entries)
    length: int = 0


class Nothing(nn.Module):
    """In place of an MLP."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class Kangaroo(Distilled):
    """Kangaroo's adapter; conf/drafter/kangaroo.yaml documents the settings.

    Raises:
        DrafterError: a setting is out of its range, or the target's first layers cannot run alone.
    """

    branches = True

    def __init__(
        self,
        model: Any,
        offsets: int,
        depth: int,
        exit: int | None,
        weight: float,
        loss: str,
        eta: float,
        lr_scale: float,
    ):
        default = [1.0, *[0.0] * (offsets - 1)]
        super().__init__(offsets, None, default, weight, lr_scale, loss, eta)
        passes.refuse(model, "kangaroo")
        count = len(layers_of(model))
        exit = exit or min(2 if count <= 32 else 3, max(1, count // 2))
        if not 1 <= exit < count:
            raise DrafterError(
                f"drafter.exit={exit}: the drafter reads the output of the target's first layers,"
                f" and {type(model).__name__} has {count}: expected 1 .. {count - 1}"
            )
        self.layers = (exit,)
        check_states(model, self.layers)
        self.exit, self.most = exit, depth
        family: Any = family_of(model, "llama", "random", keeps_biases=False)
        self.family = family
        self.layer: Any = decoder_layer(family, "random")
        self.layer.mlp, self.layer.post_attention_layernorm = Nothing(), nn.Identity()
        self.norm = final_norm(model, "last_layer")

    @property
    def depth(self) -> int:
        """Return how many tokens may follow one another in a draft."""
        return self.most

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        passes.refuse_virtual_tokens(target.model, "kangaroo")
        assert output.features is not None, "the states of `layers` are missing"
        with autocast_like(output.hidden):
            states = output.features.to(self.layer.input_layernorm.weight.dtype)
            inputs = layer_inputs(self.family, states, output.positions)
            m = self.norm(run_layer(self.layer, states, inputs)).to(output.hidden.dtype)
        for k in range(1, self.offsets + 1):
            yield m.roll(-k, dims=1)

    def start(self, target: Target) -> Memory:
        passes.refuse_virtual_tokens(target.model, "kangaroo")
        return Memory()

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> KangarooGrowth:
        passes.cropped(memory.cache, memory.length)
        memory.entries.crop(memory.length)
        ids = passes.text_of(update)
        places = torch.arange(memory.length + len(ids), device=ids.device)
        new = places[memory.length :]
        m = self.read(memory, target, ids, new, new.unsqueeze(1) >= places, places)
        memory.length += len(ids)
        newest, size = target.head(m[-1:])[0], target.config.vocab_size
        return KangarooGrowth(self, memory, newest, size, target=target)

    def read(
        self,
        memory: Memory,
        target: Target,
        ids: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        sees: Bool[Tensor, "n S"],
        keys: Int[Tensor, " S"],
    ) -> Float[Tensor, "n d"]:
        """Return m of further tokens, which see S positions by `sees`; `keys` are all positions
        that are read so far, these included."""
        inputs = ids, positions, keys, sees
        at_once = (part.unsqueeze(0) for part in inputs)
        return self.run(target, memory.cache, memory.entries, *at_once)[0]

    def run(
        self,
        target: Target,
        cache: Any,
        entries: Any,
        ids: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"],
        keys: Int[Tensor, "B S"],
        sees: Bool[Tensor, "B n S"],
    ) -> Float[Tensor, "B n d"]:
        """Return m, and add to the cache of the E layers and the adapter's entries."""
        seen, decoder = (sees, positions, keys), target.decoder
        mask = passes.masks(target, *seen, target.embed(ids).dtype)
        with first_layers(decoder, self.exit), captured_layers(decoder, self.layers) as states:
            decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **with_cache(decoder.forward, cache),
            )
        with autocast_like(states[0]):
            f = states[0].to(self.layer.input_layernorm.weight.dtype)
            inputs = {
                "attention_mask": passes.masks(self.family, *seen, f.dtype),
                "position_ids": positions,
                **layer_cache(self.family, entries),
                "position_embeddings": rotations(self.family, f, positions),
            }
            return self.norm(run_layer(self.layer, f, inputs)).to(states[0].dtype)

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        passes.refuse_virtual_tokens(target.model, "kangaroo")
        return RaggedMemory.empty(self.exit + 1, count)

    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> TreeBatch:
        *first, own = memory.layers

        def read(ids: Tensor, at: Columns) -> Tensor:
            cache = ModelEntries(first)
            return self.run(target, cache, own, ids, at.positions, at.keys, at.sees)

        return TreeBatch(self.depth, memory, updates, read, target.head)


@dataclass
class KangarooGrowth(SmallModelGrowth):
    """The growth of the target's first layers and the adapter over one tree."""

    target: Any = None

    def logits_of(
        self, tokens: Int[Tensor, " m"], depths: Int[Tensor, " m"], visible: Bool[Tensor, "m n"]
    ) -> Float[Tensor, "m v"]:
        length = self.memory.length
        sees = torch.nn.functional.pad(visible, (length, 0), value=True)
        before = torch.arange(length, device=tokens.device)
        keys = torch.cat([before, length + self.depths])
        m = self.drafter.read(self.memory, self.target, tokens, length + depths, sees, keys)
        return self.target.head(m)


@contextlib.contextmanager
def first_layers(decoder: Any, count: int) -> Iterator[None]:
    """While open, the decoder has its first `count` layers only."""
    layers = decoder.layers
    decoder.layers = layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers
