"""Uno: the target itself, with a LoRA, drafts a block in one pass (Sahoo et al. 2026, "Unlocking
Lossless Speedups in LLMs via Discrete Diffusion"; SGLang 0.5.23 serves it).

    ids of a block at the anchor a    x_a, z_1 .. z_{K-1}        z_j drawn uniformly from all V ids
    positions                         a, a + 1 .. a + K - 1      causal, after x_0 .. x_{a-1}
    weights                           the target's at x_a; the target's and s B A at z_1 .. z_{K-1}
    logits at x_a predict x_{a+1}: they are the target's own; logits at z_j predict x_{a+1+j}

    L = Σ_a Σ_{j=1}^{K-1} w_j loss(p_{a+j}, q_j)        w_j = β^(j-1), divided by their sum
    p_{a+j} = the target's distribution of x_{a+1+j} after the row's own tokens

No token stands for a mask, and nothing but A (r, i) and B (o, r) of the linear layers is trained.
Slot k = j + 1 of a block is offset k, so offset 1 is the target's own token: its acceptance is 1.
A step of K slots takes two passes of the target, one that drafts and one that verifies. It gives
1 + a tokens, where the a accepted ones are at least 1. So a block pays from 1 accepted z on.

A block is trained at up to `anchors` random positions of a row whose token and next token are
trained, and their loss counts for all such positions. A slot counts while all tokens up to it are
trained. The row's own positions have no LoRA, so one pass without a gradient gives their keys and
values, and a second one runs the z alone. In evaluation the anchors are evenly spaced, and z is the
same every time.

In decoding the drafter has its own keys and values of the text, from the target's weights. A
draft's pass reads the newly accepted tokens, then z, which is dropped afterwards. z is drawn from a
generator of its own, so texts depend on the seed of sampling alone.

Differs from the paper:
    The authors' training loss, data, alpha and targets are not published. The loss here follows
    from what the engine serves: it distils the target's distribution at each z, from the
    distribution of z that the engine draws. `loss` has the distances of all distilled drafters.
    The engine shares one cache between drafting and verifying; here the text is read twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from adapters.linear import features
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, passes
from trainer.drafters.anchors import anchors_of, counted, distilled_slots, goals, numbers_of
from trainer.drafters.batch_passes import after_texts, padded, room
from trainer.drafters.distillation import KINDS
from trainer.drafters.independent import IndependentGrowth
from trainer.drafters.layers import Heads, decayed
from trainer.drafters.lora_rows import Cast, RowLoRA
from trainer.drafters.ragged import Entries, IndependentBatch, RaggedMemory
from trainer.models.on_host import all_sent, sent
from trainer.speed.roomy_cache import roomy


@dataclass
class Memory:
    """Keys and values of the first `length` tokens, from the target's own weights."""

    cache: DynamicCache
    cast: Cast | None = None  # RowLoRA.cast
    length: int = 0
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))


@dataclass
class BatchMemory(RaggedMemory):
    """Memory of several sequences, each with its own random numbers."""

    draws: list[torch.Generator] = field(default_factory=list)
    cast: Cast | None = None  # RowLoRA.cast

    @classmethod
    def of(cls, layers: int, count: int) -> BatchMemory:
        """Return the memory of `count` sequences, of which nothing has been read."""
        draws = [torch.Generator().manual_seed(0) for _ in range(count)]
        return cls([Entries() for _ in range(layers)], [0] * count, draws)

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.draws = [self.draws[row] for row in rows]


class Uno(Heads):
    """Uno's LoRA; conf/drafter/uno.yaml documents the settings.

    Raises:
        DrafterError: a setting is out of its range, or the target cannot run such passes.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        rank: int,
        alpha: float,
        target_modules: str | list[str],
        anchors: int,
        beta: float,
        weight: float,
        loss: str,
        eta: float,
        lr_scale: float,
    ):
        if offsets < 2:
            raise DrafterError(
                f"drafter.offsets={offsets}: the first token of a draft is the target's own, so"
                " expected at least 2"
            )
        if loss not in KINDS:
            raise DrafterError(f"drafter.loss={loss}: one of {', '.join(KINDS)}")
        super().__init__(offsets, None, [0.0, *decayed(beta, offsets - 1)], weight, True, lr_scale)
        passes.refuse(model, "uno")
        self.rank, self.alpha, self.anchors, self.kind, self.eta = rank, alpha, anchors, loss, eta
        _, self.vocabulary_size = features(model.get_output_embeddings())
        self.lora = RowLoRA(model, rank, alpha, target_modules)

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        host, device = output.on_host(), output.hidden.device
        at, real, share = anchors_of(host, self.anchors, drawn=self.training)
        goal = goals(at, self.offsets)
        counts = counted(goal, at, real, host)
        weights = share.unsqueeze(1) * torch.tensor(self.weights[1:])
        at, counts_there = all_sent(device, at, counts)
        z = self.slots(output, target, at, self.drawn((*at.shape, self.offsets - 1), device))
        how = self.kind, self.eta
        total, numbers = distilled_slots(
            z, counts[:, :, 1:], goal[:, :, 1:], weights, output, target, how, chunk
        )
        # The first slot is the target's own: always right, at a distance of 0.
        own = counts_there[:, :, :1].float()
        first = torch.stack([torch.zeros_like(own), own, own, own])
        return total, numbers_of(counts_there, *torch.cat([first, numbers], dim=3))

    def drawn(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return z: from the run's generator in training, always the same in evaluation. It is
        drawn on the CPU, and so equal on every device."""
        draw = None if self.training else torch.Generator().manual_seed(0)
        return sent(torch.randint(self.vocabulary_size, shape, generator=draw), device)

    def slots(
        self,
        output: TargetOutput,
        target: Target,
        at: Int[Tensor, "B A"],
        z: Int[Tensor, "B A K-1"],
    ) -> Float[Tensor, "B A K-1 d"]:
        """Return the states that the head reads at z, of the blocks at these anchors."""
        passes.refuse_virtual_tokens(target.model, "uno")
        rows, blocks, width = z.shape
        ahead = 1 + torch.arange(width, device=at.device)
        block = passes.Block({"input_ids": z.flatten(1)}, ahead, _causal(blocks, width, at.device))
        lora = self.lora.on(target, rows=blocks * width, last=blocks * width)
        hidden = passes.after_anchors(target, output, at, block, lora)
        return hidden.view(rows, blocks, width, -1)

    def start(self, target: Target) -> Memory:
        passes.refuse_virtual_tokens(target.model, "uno")
        cache = roomy(DynamicCache(config=target.config))
        cache.activate_past_recording()
        return Memory(cache, self.lora.cast(target))

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> IndependentGrowth:
        passes.cropped(memory.cache, memory.length)
        ids = passes.text_of(update)
        memory.length += len(ids)
        room = passes.room(target.config, memory.length)
        more = self.offsets - 1 if room is None else min(self.offsets - 1, room)
        z = torch.randint(self.vocabulary_size, (more,), generator=memory.draw)
        tokens = torch.cat([ids, z.to(ids.device)]).unsqueeze(0)
        if more:
            with self.lora.on(target, tokens.shape[1], more, memory.cast):
                hidden = passes.run(target, memory.cache, tokens)[0, -1 - more :]
        else:
            hidden = passes.run(target, memory.cache, tokens)[0, -1:]
        return IndependentGrowth.read(target.head, hidden)

    def start_batch(self, target: Target, count: int) -> BatchMemory:
        passes.refuse_virtual_tokens(target.model, "uno")
        memory = BatchMemory.of(target.config.num_hidden_layers, count)
        memory.cast = self.lora.cast(target)
        return memory

    @torch.no_grad()
    def grow_batch(
        self, memory: BatchMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> IndependentBatch:
        """Start trees as `grow` does. All have as many z as the longest one has room for."""
        ids, counts = padded([passes.text_of(update) for update in updates])
        more = room(target, memory, counts, self.offsets - 1)
        drawn = [
            torch.randint(self.vocabulary_size, (more,), generator=draw) for draw in memory.draws
        ]
        z = torch.stack(drawn).to(ids.device)
        ahead = 1 + torch.arange(more, device=ids.device)
        block = passes.Block({"input_ids": z}, ahead, _causal(1, more, ids.device))
        on: Any = contextlib.nullcontext()
        if more:
            on = self.lora.on(target, ids.shape[1] + more, more, memory.cast)
        newest, slots = after_texts(target, memory, ids, counts, block, on)
        hidden = torch.cat([newest.unsqueeze(1), slots], dim=1)
        return IndependentBatch.read(target.head, hidden)

    def state(self) -> dict[str, Tensor]:
        """Return A and B by the names of their layers."""
        return {name: tensor.detach() for name, tensor in self.lora.tensors().items()}


def _causal(blocks: int, width: int, device: torch.device) -> Bool[Tensor, "N N"]:
    """Return which z see which, N = A (K-1): those before them in their block, and themselves."""
    block = torch.arange(blocks, device=device).repeat_interleave(width)
    place = torch.arange(width, device=device).repeat(blocks)
    return (block.unsqueeze(1) == block) & (place.unsqueeze(1) >= place)
