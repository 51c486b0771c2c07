"""Draft heads that continue from their own states: EAGLE's. Training runs all passes of a row at
once.

Pass k of slot t has the token x_{t+k}, the position t + k - 1, and the output of pass k - 1 of slot
t. It sees the first pass's slots up to t, which are made from the target's own features, and the
later passes of slot t: keys [K_1 | K_2 | .. | K_k] under the mask [causal | I | .. | I]. A draft of
k tokens after x_{t+1} sees the same in decoding ("training-time test", arXiv 2503.01840).

A pass costs the attention of one pass over the row (`attend`). Only slot t sees its later passes:
a loss computes them for slots that have targets from the second pass on (`counted_states`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate
from trainer.drafters.distilled import Distilled
from trainer.drafters.families import Family
from trainer.drafters.layers import (
    autocast_like,
    decoder_layer,
    embeddings_ahead,
    layer_cache,
    rotations,
    window,
)
from trainer.drafters.ragged import RaggedMemory, padded
from trainer.drafters.unrolled_batch import UnrolledBatch
from trainer.models.on_host import offset_mask, sent


class Entries:
    """Keys and values (B, H, S, c) of one attention layer; each pass adds its own. transformers
    uses it as a cache."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def crop(self, length: int) -> None:
        """Forget all entries after the first `length`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


DIAGONAL = "sdpa_and_diagonal"


def attend(
    module: nn.Module,
    query: Float[Tensor, "B H T c"],
    key: Float[Tensor, "B G S c"],
    value: Float[Tensor, "B G S c"],
    attention_mask: Bool[Tensor, "B 1 T M"],
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' sdpa attention, if the mask covers all keys (M = S).

    Otherwise S = M + n T, and place t of T sees the first M keys by the mask, and also the keys
    M + t, M + T + t, and so on, without the cost of all S keys.

    These n keys of a place count as one key with the score s = log Σ exp(q·k). All places see one
    more key, whose value is zero. Its score is s, since queries carry s in channels that only this
    key reads. A channel that only this key's value has gives its weight w, and w Σ softmax(q·k) v
    is added to the output.
    """
    length, size = attention_mask.shape[-1], query.shape[-1]
    if key.shape[2] == length:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )  # type: ignore[return-value]
    scale = size**-0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        later[:, :, length:].unflatten(2, (-1, query.shape[2])).repeat_interleave(groups, dim=1)
        for later in (key, value)
    )
    scores = (query.unsqueeze(2) * keys).sum(-1, dtype=torch.float32) * scale
    mixed = (scores.softmax(2).unsqueeze(-1) * values).sum(2)
    # Two channels: in half precision one would round the score by more than the error of the
    # scores.
    total = scores.logsumexp(2, keepdim=True).transpose(2, 3) / scale
    high = total.to(query.dtype)
    wide_query = torch.cat(
        [query, high, (total - high).to(query.dtype), query.new_zeros(*query.shape[:3], 6)], dim=3
    )
    first_keys, first_values = (F.pad(first[:, :, :length], (0, 8, 0, 1)) for first in (key, value))
    first_keys[:, :, length, size : size + 2] = 1
    first_values[:, :, length, size] = 1
    out, _ = sdpa_attention_forward(
        module,
        wide_query,
        first_keys,
        first_values,
        F.pad(attention_mask, (0, 1), value=True),
        dropout,
        scale,
        **more,
    )
    return out[..., :size] + (out[..., size : size + 1] * mixed.transpose(1, 2)).to(out.dtype), None


AttentionInterface.register(DIAGONAL, attend)


class Unrolled(Distilled):
    """A head that reads its own states where the target's are not known yet: K passes in training,
    trees in decoding.

    Raises:
        DrafterError: `depth` is less than 1, or what Distilled raises.
    """

    midlayer: Any  # the decoder layer, named layers.0 in a `state`
    family: Family | None = None  # of the layer, if it is not of the target's class
    sparing = True  # skip slots that have no target in later passes

    def __init__(
        self,
        offsets: int,
        depth: int | None,
        weights: list[float] | None,
        default: list[float],
        weight: float,
        lr_scale: float,
        loss: str,
        eta: float,
    ):
        super().__init__(offsets, weights, default, weight, lr_scale, loss, eta)
        if depth is not None and depth < 1:
            raise DrafterError(f"drafter.depth={depth}, but a drafter proposes at least 1 token")
        self._depth = offsets if depth is None else depth

    @property
    def depth(self) -> int:
        return self._depth

    def around(self, target: Target) -> Any:
        """Return the model that gives the layer its masks, rotations and cache."""
        return target if self.family is None else self.family

    def first_input(
        self, hidden: Float[Tensor, "B T d"], features: Tensor | None
    ) -> Float[Tensor, "B T d"]:
        """Return the first pass's input, made from the target's states."""
        raise NotImplementedError

    def step(self, embedded: Tensor, hidden: Tensor, surroundings: Any) -> Float[Tensor, "B T d"]:
        """Run one pass of the layer."""
        raise NotImplementedError

    def head_input(self, out: Tensor) -> Tensor:
        """Return the output head's input, made from a pass's output."""
        return out

    def next_input(self, out: Tensor) -> Tensor:
        """Return the next pass's input, made from a pass's output."""
        return out

    def states(
        self, output: TargetOutput, target: Target, later: Bool[Tensor, "B T"] | None = None
    ) -> Iterator[Float[Tensor, "B T d"]]:
        """Yield the same as Drafter.states. From the second pass on only the slots `later`, a mask
        on the host, are computed, and others may hold any finite value; None computes all."""
        with autocast_like(output.hidden):
            hidden = self.first_input(
                self.in_own_dtype(output.hidden),
                None if output.features is None else self.in_own_dtype(output.features),
            )
        entries, positions, slots = Entries(), output.positions, None
        places = torch.arange(positions.shape[1], device=positions.device)
        row_starts = places - positions
        same_row = row_starts.unsqueeze(1) == row_starts.unsqueeze(2)
        causal = same_row & (places <= places.unsqueeze(1))
        distance = (places.unsqueeze(1) - places).expand_as(causal)
        reach = window(self.around(target))
        for k in range(self.offsets):
            embedded = embeddings_ahead(k + 1, output, target)
            if k == 1 and later is not None and (slots := _chosen(later, places)) is not None:
                hidden, positions, causal, distance = (
                    tensor[slots] for tensor in (hidden, positions, causal, distance)
                )
            if slots is not None:
                embedded = embedded[slots]
            mask = causal if reach is None else causal & (distance + k < reach)
            if self.midlayer.self_attn.config._attn_implementation != DIAGONAL or (
                reach is not None and reach <= k
            ):
                mask = torch.cat([mask, *_diagonals(k, positions, reach)], dim=2)
            embedded = self.in_own_dtype(embedded)
            inputs = self.layer_inputs(target, embedded, positions + k, mask, entries)
            with autocast_like(output.hidden):
                out = self.step(embedded, hidden, inputs)
                read, hidden = self.head_input(out), self.next_input(out)
            read = read.to(output.hidden.dtype)
            yield read if slots is None else torch.zeros_like(output.hidden).index_put(slots, read)

    def counted_states(
        self, output: TargetOutput, target: Target
    ) -> Iterator[Float[Tensor, "B T d"]]:
        if not self.sparing or self.offsets == 1:
            return self.states(output, target)
        host = output.on_host()
        counts = [offset_mask(k, host.labels, host.positions) for k in range(2, self.offsets + 1)]
        return self.states(output, target, torch.stack(counts).any(0))

    def layer_inputs(
        self,
        target: Target,
        hidden: Tensor,
        positions: Int[Tensor, "B T"],
        sees: Bool[Tensor, "B T S"],
        entries: Entries,
    ) -> dict[str, Any]:
        """Return the layer's inputs besides `hidden`. If `sees` covers the first pass's keys only,
        each place also sees its own keys of all later passes."""
        mask = sees.unsqueeze(1)
        if self.midlayer.self_attn.config._attn_implementation == "eager":
            mask = hidden.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return {
            "attention_mask": mask,
            "position_ids": positions,
            **layer_cache(self.around(target), entries),
            "position_embeddings": rotations(self.around(target), hidden, positions),
        }

    def start(self, target: Target) -> Entries:
        """Return keys and values for the target's features only."""
        return Entries()

    @torch.no_grad()
    def grow(self, memory: Entries, target: Target, update: TargetUpdate) -> UnrolledGrowth:
        known, count = memory.get_seq_length(), len(update.ids)
        places = torch.arange(known + count, device=update.ids.device)
        distance = places[known:].unsqueeze(1) - places
        reach = window(self.around(target))
        sees = (distance >= 0) if reach is None else (distance >= 0) & (distance < reach)
        embedded = self.in_own_dtype(target.embed(update.ids)).unsqueeze(0)
        with autocast_like(update.hidden):
            hidden = self.first_input(
                self.in_own_dtype(update.hidden).unsqueeze(0),
                self.in_own_dtype(update.features).unsqueeze(0),
            )
            inputs = self.layer_inputs(
                target, embedded, places[None, known:], sees.unsqueeze(0), memory
            )
            out = self.step(embedded, hidden, inputs)[:, -1:]
        return UnrolledGrowth(self, target, memory, out, update.hidden[:0])

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(1, count)

    def grow_batch(self, memory: Any, target: Target, updates: Sequence[TargetUpdate]) -> Any:
        return UnrolledBatch(self, target, memory, padded(updates))

    def in_own_dtype(self, states: Tensor) -> Tensor:
        """Cast to the dtype of this head's weights."""
        return states.to(next(self.parameters()).dtype)

    def state(self) -> dict[str, Tensor]:
        return {
            name.replace("midlayer.", "layers.0.", 1): tensor
            for name, tensor in super().state().items()
        }


def _diagonals(
    k: int, positions: Int[Tensor, "B T"], reach: int | None
) -> Iterator[Bool[Tensor, "B T T"]]:
    """Yield the masks of passes 2 .. k + 1: each place sees its own key, if the window reaches
    it."""
    eye = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device).expand(
        len(positions), -1, -1
    )
    for j in range(1, k + 1):
        yield eye if reach is None or k - j < reach else torch.zeros_like(eye)


def _chosen(
    where: Bool[Tensor, "B T"], like: Tensor
) -> tuple[Int[Tensor, "B 1"], Int[Tensor, "B n"]] | None:
    """Return an index of n slots of each row: those of `where`, which is on the host, and further
    ones until all rows have the same number. None if that would be all slots."""
    count = max(1, int(where.sum(1).max()))
    count += -count % 16  # matrix products are fastest with multiples of 16
    if count >= where.shape[1]:
        return None
    slots = where.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.arange(len(where), device=like.device).unsqueeze(1), sent(slots, like.device)


class UnrolledGrowth:
    """A trainer.drafters.Growth: nodes see the row, their ancestors and themselves."""

    branches = True
    confidence: Float[Tensor, " m"] | None = None

    def __init__(
        self,
        drafter: Unrolled,
        target: Target,
        memory: Entries,
        out: Float[Tensor, "1 1 d"],
        like: Tensor,
    ):
        self.drafter, self.target = drafter, target
        self.like = like  # has the dtype of the target's states
        self.depth, self.vocabulary = drafter.depth, drafter.vocabulary
        self.prefix = memory.get_seq_length()
        self.entries = Entries(memory.keys, memory.values)
        # which nodes each node sees
        self.above = torch.zeros(0, 0, dtype=torch.bool, device=out.device)
        # of the newest token, then of the nodes
        self.depths = torch.zeros(1, dtype=torch.long, device=out.device)
        # of the newest token, then of each node
        self.head_inputs = self._head_input(out)
        self.root = self._logits(self.head_inputs)[0]
        self.next_inputs = drafter.next_input(out)  # (1, 1 + nodes, d)

    def first(self) -> Float[Tensor, " v"]:
        return self.root

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
        drafter, target, old, new = self.drafter, self.target, len(self.above), len(tokens)
        above = torch.eye(new, old + new, dtype=torch.bool, device=tokens.device).roll(old, dims=1)
        child = parents >= 0
        above[child, :old] = self.above[parents[child]]
        depths = self.depths[parents + 1] + 1
        self.above = torch.cat([F.pad(self.above, (0, new)), above])
        self.depths = torch.cat([self.depths, depths])
        sees = torch.cat([above.new_ones(new, self.prefix), above], dim=1)
        if (reach := window(drafter.around(target))) is not None:
            at = torch.cat(
                [torch.arange(self.prefix, device=tokens.device), self.prefix - 1 + self.depths[1:]]
            )
            sees = sees & (self.prefix - 1 + depths.unsqueeze(1) - at < reach)
        embedded = drafter.in_own_dtype(target.embed(tokens)).unsqueeze(0)
        positions = (self.prefix - 1 + depths).unsqueeze(0)
        with autocast_like(self.like):
            inputs = drafter.layer_inputs(
                target, embedded, positions, sees.unsqueeze(0), self.entries
            )
            out = drafter.step(embedded, self.next_inputs[:, parents + 1], inputs)
            self.next_inputs = torch.cat([self.next_inputs, drafter.next_input(out)], dim=1)
        self.confidence = drafter.predicted(1, self.head_inputs[parents + 1])
        read = self._head_input(out)
        self.head_inputs = torch.cat([self.head_inputs, read])
        return self._logits(read)

    def _head_input(self, out: Float[Tensor, "1 m d"]) -> Float[Tensor, "m d"]:
        with autocast_like(self.like):
            return self.drafter.head_input(out)[0].to(self.like.dtype)

    def _logits(self, read: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        return self.drafter.draft_heads(self.target)[0](read)


def masked_layer(model: Any, init: str, back: int = 1) -> Any:
    """Return a `decoder_layer` that takes a mask for each position: with sdpa, or eager if the
    model is eager.

    Raises:
        DrafterError: its parts are not where transformers' layers have them.
    """
    layer: Any = decoder_layer(model, init, back)
    missing = [
        name
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        if not hasattr(layer, name)
    ]
    config = copy.deepcopy(getattr(getattr(layer, "self_attn", None), "config", None))
    if missing or config is None:
        raise DrafterError(
            f"{type(layer).__name__} has no {', '.join(missing) or 'self_attn.config'}, so EAGLE's"
            " head cannot be built from it: set drafter=mtp_medusa, whose heads do not need it, or"
            " drafter=none"
        )
    config._attn_implementation = "eager" if config._attn_implementation == "eager" else DIAGONAL
    layer.self_attn.config = config
    return layer
