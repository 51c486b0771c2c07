"""Hydra's heads, each reading the drafted tokens before its own, and Hydra++ (Ankner et al. 2024,
arXiv 2402.05109).

    z_k = B_{k,n}( .. B_{k,1}([s_t ; e(x_{t+1}) ; .. ; e(x_{t+k})]) .. )
    logits_k[t] = U_k z_k[t] predict x_{t+1+k}        L = w Σ_k Σ_t loss
    B_{k,1}(v) = R v + c + SiLU(W v + b)        B_{k,j}(z) = z + SiLU(W z + b)

s (B, T, d) are the hidden states h that the target's output head reads or, with a `prefix` layer,
norm(Block(h)), where Block is one decoder layer of the target's family over h_1 .. h_t. e is the
target's embedding and is not trained. U_k (V, d) is a trained copy of the target's output layer for
each head (`own_head`), or the target's own for all. Hydra++ has four blocks per head and the prefix
layer, and learns the target's distributions (loss=ce) instead of the rows' tokens (loss=labels).

At the start W = 0, b = c = 0 and R = [I | 0 | .. ], which selects s_t: without a prefix layer each
head is the target's own next-token head. Dropout is on the inputs of each block and of U_k.

Differs from the paper:
    The authors start R and b at random, so their copied U_k reads a state that it does not know.
    Their code runs one block n - 1 times where n - 1 blocks are meant.

Tensors are named heads.{k}.0.linear, heads.{k}.0.res_connection, heads.{k}.{j}.linear and
heads.{k}.{n} (U_k), k and j from 0, and prefix.block and prefix.norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from trainer.drafters import Drafter, DrafterError, Target, TargetOutput, TargetUpdate
from trainer.drafters.distillation import KINDS
from trainer.drafters.distilled import Distilled
from trainer.drafters.layers import (
    autocast_like,
    decoder_layer,
    embeddings_ahead,
    final_norm,
    head_of_layer,
    layer_inputs,
    output_layer,
    run_layer,
)
from trainer.drafters.medusa import ResidualBlock
from trainer.drafters.ragged import RaggedMemory, padded, ragged_inputs
from trainer.models.heads import Head
from trainer.speed.roomy_cache import roomy


class FirstBlock(nn.Module):
    """R v + c + SiLU(W v + b), from `count` concatenated vectors of `size` to one, in fp32; at the
    start it returns the first of them."""

    def __init__(self, size: int, count: int, device: torch.device):
        super().__init__()
        self.linear = nn.Linear(count * size, size, device=device, dtype=torch.float32)
        self.res_connection = nn.Linear(count * size, size, device=device, dtype=torch.float32)
        for tensor in (self.linear.weight, self.linear.bias, self.res_connection.bias):
            nn.init.zeros_(tensor)
        nn.init.eye_(self.res_connection.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.res_connection(inputs) + F.silu(self.linear(inputs))


class Prefix(nn.Module):
    """norm(Block(h)): a decoder layer and a norm, (B, T, d) to (B, T, d), both in fp32.

    A random layer adds little to h. All weights of the norm start at the mean of the target's final
    norm's weights, so s is about as large as h, and heads start near the target's own. On one text
    of 400 tokens at SmolLM2-135M they then shared 77 % of its next-token probability (Σ min(p, q));
    28 % with ones in the norm, and 2 % with copies of the last layer and the norm.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.block = decoder_layer(model, "random")
        self.norm = final_norm(model, "last_layer")
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.copy_(parameter.mean())

    def forward(self, hidden: Tensor, inputs: Any) -> Tensor:
        return self.norm(run_layer(self.block, hidden, inputs))


@dataclass
class Memory:
    """The state of one sequence: the prefix layer's keys and values at the target's states, and
    none of drafted tokens."""

    cache: DynamicCache


class Hydra(Distilled):
    """K heads of `layers` blocks; conf/drafter/hydra.yaml documents the settings.

    Raises:
        DrafterError: an unknown `loss`, not one weight for each offset, less than one block,
        `confidence` that is not above 0 or comes with loss=labels, or a prefix layer that cannot be
        built from the model's.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        layers: int,
        own_head: bool,
        prefix: bool,
        dropout: float,
        loss: str,
        eta: float,
        confidence: float | None,
        weights: list[float] | None,
        weight: float,
        lr_scale: float,
    ):
        if loss not in (choices := ("labels", *KINDS)):
            raise DrafterError(f"drafter.loss={loss}: one of {', '.join(choices)}")
        super().__init__(
            offsets,
            weights,
            [1.0] * offsets,
            weight,
            lr_scale,
            "ce" if loss == "labels" else loss,
            eta,
        )
        if layers < 1:
            raise DrafterError(
                f"drafter.layers={layers}, but a head without a block reads no drafted token: set"
                " at least 1"
            )
        if loss == "labels" and confidence is not None:
            raise DrafterError(
                f"drafter.confidence={confidence}, and with drafter.loss=labels no acceptance is"
                " known to learn from: set drafter.loss=ce or another distance from the target's"
                " distributions, or leave drafter.confidence out"
            )
        if not 0 <= dropout < 1:
            raise DrafterError(f"drafter.dropout={dropout}, expected a share from 0 to below 1")
        self.hard, self.dropout, self.own_head, self.blocks = (
            loss == "labels",
            dropout,
            own_head,
            layers,
        )
        output: Any = model.get_output_embeddings()
        size, device = model.config.get_text_config().hidden_size, output.weight.device
        self.prefix = Prefix(model) if prefix else None
        self.heads = nn.ModuleList()
        for k in range(1, offsets + 1):
            blocks = [
                FirstBlock(size, k + 1, device),
                *(ResidualBlock(size, device) for _ in range(layers - 1)),
            ]
            self.heads.append(nn.Sequential(*blocks, *([output_layer(model)] if own_head else [])))
        self.predict_acceptance(model, confidence, offsets)

    def head_of(self, offset: int, target: Target) -> tuple[Head, tuple[nn.Parameter, ...]]:
        if not self.own_head:
            return super().head_of(offset, target)
        blocks: Any = self.heads[offset - 1]
        return head_of_layer(blocks[-1], target), tuple(blocks[-1].parameters())

    def draft_heads(self, target: Target) -> tuple[Head, ...]:
        return tuple(self.head_of(k, target)[0] for k in range(1, self.offsets + 1))

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        heads: Any = self.heads
        return (
            tuple(p for blocks in heads for p in blocks[-1].parameters()) if self.own_head else ()
        )

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        hidden = self.in_own_dtype(output.hidden)
        if self.prefix is not None:
            with autocast_like(output.hidden):
                hidden = self.in_own_dtype(
                    self.prefix(hidden, layer_inputs(target, hidden, output.positions))
                )
        inputs = hidden
        for k in range(1, self.offsets + 1):
            inputs = torch.cat(
                [inputs, self.in_own_dtype(embeddings_ahead(k, output, target))], dim=-1
            )
            yield self.head_input(k, inputs, output.hidden)

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        return (
            Drafter.loss(self, output, target, chunk)
            if self.hard
            else super().loss(output, target, chunk)
        )

    def start(self, target: Target) -> Memory:
        return Memory(roomy(DynamicCache()))

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> HydraGrowth:
        hidden = self.in_own_dtype(update.hidden)
        if self.prefix is not None:
            before = memory.cache.get_seq_length()
            positions = torch.arange(before, before + len(hidden), device=hidden.device).unsqueeze(
                0
            )
            unread = hidden.unsqueeze(0)
            with autocast_like(update.hidden):
                hidden = self.in_own_dtype(
                    self.prefix(unread, layer_inputs(target, unread, positions, memory.cache))[0]
                )
        newest = self.in_own_dtype(target.embed(update.ids[-1:]))
        return HydraGrowth(self, target, torch.cat([hidden[-1:], newest], dim=-1), update.hidden)

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(0 if self.prefix is None else 1, count)

    @torch.no_grad()
    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> HydraBatch:
        read = padded(updates)
        hidden = self.in_own_dtype(read.hidden)
        if self.prefix is not None:
            places = memory.read(read.counts, 0, hidden.device)
            with autocast_like(read.hidden):
                around = ragged_inputs(target, hidden, places, memory.layers[0])
                hidden = self.in_own_dtype(self.prefix(hidden, around))
        token = read.newest(read.ids.unsqueeze(2))[:, 0]
        newest = self.in_own_dtype(target.embed(token))
        root = torch.cat([read.newest(hidden), newest], dim=-1)
        return HydraBatch(self, target, root, read.hidden[:0, 0])

    def head_input(
        self, k: int, inputs: Float[Tensor, "... c"], like: Tensor
    ) -> Float[Tensor, "... d"]:
        """Return U_k's input for s_t and k embeddings, concatenated, c = (k + 1) d; in the dtype of
        `like`."""
        blocks: Any = self.heads[k - 1]
        with autocast_like(like):
            for block in blocks[: self.blocks]:
                inputs = block(F.dropout(inputs, self.dropout, self.training))
        return F.dropout(inputs, self.dropout, self.training).to(like.dtype)

    def in_own_dtype(self, hidden: Tensor) -> Tensor:
        first: Any = self.heads[0]
        return hidden.to(first[0].linear.weight.dtype)


class HydraGrowth:
    """The growth of Hydra's heads: a node's head reads the embeddings of its path. The nodes of a
    call are a batch."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, " m"] | None = None

    def __init__(self, drafter: Hydra, target: Target, root: Float[Tensor, "1 c"], like: Tensor):
        self.depth = drafter.offsets
        self._drafter, self._target, self._like = drafter, target, like
        # for the newest token, then each node: s_t and the embeddings up to its own
        self._inputs = [root[0]]
        self._head_inputs = [drafter.head_input(1, root, like)[0]]  # and the input of U_k

    @torch.no_grad()
    def first(self) -> Float[Tensor, " V"]:
        return self._logits(1, self._head_inputs[0].unsqueeze(0))[0]

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
        rows = [parent + 1 for parent in parents.tolist()]
        above = torch.stack([self._inputs[row] for row in rows])
        inputs = torch.cat([above, self._target.embed(tokens).to(above.dtype)], dim=-1)
        k = inputs.shape[-1] // self._target.config.hidden_size - 1
        self.confidence = self._drafter.predicted(
            k - 1, torch.stack([self._head_inputs[row] for row in rows])
        )
        read = self._drafter.head_input(k, inputs, self._like)
        self._inputs += inputs.unbind()
        self._head_inputs += read.unbind()
        return self._logits(k, read)

    def _logits(self, k: int, read: Float[Tensor, "m d"]) -> Float[Tensor, "m V"]:
        return self._drafter.head_of(k, self._target)[0](read)


class HydraBatch:
    """A trainer.drafters.BatchGrowth, of HydraGrowth's numbers."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, "B m"] | None = None

    def __init__(self, drafter: Hydra, target: Target, root: Float[Tensor, "B c"], like: Tensor):
        self.depth = drafter.offsets
        self._drafter, self._target, self._like = drafter, target, like
        # of the last level: the number of its first node, s_t and the embeddings up to each node's,
        # and the input of U_k
        self._start, self._inputs = -1, root.unsqueeze(1)
        self._read = self._head_input(1, self._inputs)

    @torch.no_grad()
    def first(self) -> Float[Tensor, "B V"]:
        return self._logits(1, self._read)[:, 0]

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        rows = (parents - self._start).unsqueeze(2)
        above, read = (
            states.gather(1, rows.expand(-1, -1, states.shape[2]))
            for states in (self._inputs, self._read)
        )
        embedded = self._target.embed(tokens).to(above.dtype)
        k = above.shape[-1] // self._target.config.hidden_size
        predicted = self._drafter.predicted(k - 1, read.flatten(0, 1))
        self.confidence = None if predicted is None else predicted.unflatten(0, tokens.shape)
        self._start += self._inputs.shape[1]
        self._inputs = torch.cat([above, embedded], dim=-1)
        self._read = self._head_input(k, self._inputs)
        return self._logits(k, self._read)

    def _head_input(self, k: int, inputs: Float[Tensor, "B m c"]) -> Float[Tensor, "B m d"]:
        flat = self._drafter.head_input(k, inputs.flatten(0, 1), self._like)
        return flat.unflatten(0, inputs.shape[:2])

    def _logits(self, k: int, read: Float[Tensor, "B m d"]) -> Float[Tensor, "B m V"]:
        head = self._drafter.head_of(k, self._target)[0]
        return head(read.flatten(0, 1)).unflatten(0, read.shape[:2])
