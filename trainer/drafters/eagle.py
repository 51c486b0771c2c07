"""EAGLE's head: one decoder layer that goes on from the target's features instead of from tokens
(Li et al. 2024, arXiv 2401.15077).

    slot t:  f̂_{t+1} = Block(fc [emb(x_{t+1}) ; f_t])        logits = head(f̂_{t+1}) predict x_{t+2}

    L = Σ_k w_k Σ_t ( v SmoothL1(f̂_{t+k}, f_{t+k}) + p CE(head(f_{t+k}), head(f̂_{t+k})) )        v = 1, p = 0.1

f (B, T, d) are the hidden states that the target's output head reads, after its final norm; fc (d,
2d); Block is a decoder layer of the target's family without its input_layernorm, so that it reads
what fc gives. SmoothL1 is the mean over d, CE is against the target's whole distribution. EAGLE-2
(arXiv 2406.16858) has the same weights and grows its trees by confidence while decoding.

The paper trains k = 1 only, and drafts further tokens by putting f̂ in the place of f. With K > 1
these passes are trained too, as in HASS (arXiv 2408.15766), without its top-k loss: pass k gets the
features that pass k - 1 predicted, cut off from their gradient.

How the passes of a row are computed at once, here and in trainer.drafters.eagle3 ("training-time
test", arXiv 2503.01840): pass k of slot t has the token x_{t+k}, the place t + k - 1, and what pass
k - 1 of slot t gave. It sees the first pass's slots up to t, which are made of the target's own
features, and the later passes of slot t: keys [K_1 | K_2 | .. | K_k] under the mask [causal | I |
.. | I]. That is what a draft of k tokens after x_{t+1} sees while decoding. A pass costs the
attention of one over the row (`attend`). No slot but t itself sees the later passes of slot t, so
that a loss has them only for slots that count from the second pass on (`counted_states`).

What differs from the reference: noise on the features is uniform in ±std/2 at every length, where
the reference multiplies it by 512 over the row's length, which drowns short rows; fc has no bias
unless `bias` says so, since engines disagree on one (vLLM drops it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.drafters import DrafterError, News, Seen, Target, targets_of
from trainer.drafters.distilled import Distilled, where_taught
from trainer.drafters.layers import (
    ahead,
    decoder_layer,
    precision,
    projection,
    rotations,
    through,
    window,
)


class Entries:
    """Keys and values (B, H, S, c) of one attention layer, to which each pass adds its own: what
    transformers calls a cache."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


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
    """transformers' sdpa attention where the mask is of all keys, M = S. Else S = M + n T: place t
    of T sees the first M keys by the mask, and M + t, M + T + t, .. besides, without the cost of
    all S keys.

    Those n keys of a place are summed up as one with the score s = log Σ exp(q·k): all places see
    one key more, whose value is zero, and whose score is s since queries carry s in channels that
    only this key reads. A channel of the values that only this key has brings out its weight w, and
    w Σ softmax(q·k) v is added.
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
    # In half precision one channel would round the score by more than the scores themselves are
    # off.
    total = scores.logsumexp(2, keepdim=True).transpose(2, 3) / scale
    high = total.to(query.dtype)
    wide = torch.cat(
        [query, high, (total - high).to(query.dtype), query.new_zeros(*query.shape[:3], 6)], dim=3
    )
    first_keys, first_values = (F.pad(first[:, :, :length], (0, 8, 0, 1)) for first in (key, value))
    first_keys[:, :, length, size : size + 2] = 1
    first_values[:, :, length, size] = 1
    out, _ = sdpa_attention_forward(
        module,
        wide,
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
    """A head that is given its own states where the target's are not known yet: K passes while
    training, trees while decoding.

    Raises:
        DrafterError: `depth` is less than 1, or what Distilled raises.
    """

    midlayer: Any  # what holds the decoder layer, called layers.0 in a `state`
    sparing = True  # whether a loss leaves slots that count for no later pass out of those passes

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

    def entering(
        self, hidden: Float[Tensor, "B T d"], features: Tensor | None
    ) -> Float[Tensor, "B T d"]:
        """What the first pass reads of the target's states."""
        raise NotImplementedError

    def step(self, embedded: Tensor, hidden: Tensor, surroundings: Any) -> Float[Tensor, "B T d"]:
        """One pass of the layer."""
        raise NotImplementedError

    def read(self, out: Tensor) -> Tensor:
        """What the head is given of a pass's output."""
        return out

    def handed(self, out: Tensor) -> Tensor:
        """What the next pass is given of it."""
        return out

    def states(
        self, seen: Seen, target: Target, later: Bool[Tensor, "B T"] | None = None
    ) -> Iterator[Float[Tensor, "B T d"]]:
        """As Drafter.states; from the second pass on only at the slots `later`, and anything finite
        at others. None is all."""
        with precision(seen.hidden):
            hidden = self.entering(
                self.own(seen.hidden), None if seen.features is None else self.own(seen.features)
            )
        entries, known, slots = Entries(), seen.positions, None
        at = torch.arange(known.shape[1], device=known.device)
        first = at - known  # where each position's row begins
        same = (first.unsqueeze(1) == first.unsqueeze(2)) & (at <= at.unsqueeze(1))
        back = (at.unsqueeze(1) - at).expand_as(same)
        reach = window(target)
        for k in range(self.offsets):
            embedded = ahead(k + 1, seen, target)
            if k == 1 and later is not None and (slots := _chosen(later)) is not None:
                hidden, known, same, back = (one[slots] for one in (hidden, known, same, back))
            if slots is not None:
                embedded = embedded[slots]
            sees = same if reach is None else same & (back + k < reach)
            if self.midlayer.self_attn.config._attn_implementation != DIAGONAL or (
                reach is not None and reach <= k
            ):
                eye = torch.eye(known.shape[1], dtype=torch.bool, device=at.device).expand(
                    len(known), -1, -1
                )
                near = [
                    eye if reach is None or k - j < reach else torch.zeros_like(eye)
                    for j in range(1, k + 1)
                ]
                sees = torch.cat([sees, *near], dim=2)
            embedded = self.own(embedded)
            around = self.around(target, embedded, known + k, sees, entries)
            with precision(seen.hidden):
                out = self.step(embedded, hidden, around)
                read, hidden = self.read(out), self.handed(out)
            read = read.to(seen.hidden.dtype)
            yield read if slots is None else torch.zeros_like(seen.hidden).index_put(slots, read)

    def counted_states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        if not self.sparing or self.offsets == 1:
            return self.states(seen, target)
        counts = [targets_of(k, seen.labels, seen.positions)[0] for k in range(2, self.offsets + 1)]
        return self.states(seen, target, torch.stack(counts).any(0))

    def around(
        self,
        target: Target,
        hidden: Tensor,
        positions: Int[Tensor, "B T"],
        sees: Bool[Tensor, "B T S"],
        entries: Entries,
    ) -> dict[str, Any]:
        """What the layer is given beside its input. Where `sees` is of the first pass's keys only,
        each place sees all later ones of its own."""
        mask = sees.unsqueeze(1)
        if self.midlayer.self_attn.config._attn_implementation == "eager":
            mask = hidden.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": entries,
            "use_cache": True,
            "position_embeddings": rotations(target, hidden, positions),
        }

    def start(self, target: Target) -> Entries:
        """Keys and values made of the target's features only."""
        return Entries()

    @torch.no_grad()
    def grow(self, memory: Entries, target: Target, news: News) -> Tree:
        known, count = memory.get_seq_length(), len(news.ids)
        places = torch.arange(known + count, device=news.ids.device)
        back = places[known:].unsqueeze(1) - places
        reach = window(target)
        sees = (back >= 0) if reach is None else (back >= 0) & (back < reach)
        embedded = self.own(target.embed(news.ids)).unsqueeze(0)
        with precision(news.hidden):
            hidden = self.entering(
                self.own(news.hidden).unsqueeze(0), self.own(news.features).unsqueeze(0)
            )
            around = self.around(target, embedded, places[None, known:], sees.unsqueeze(0), memory)
            out = self.step(embedded, hidden, around)[:, -1:]
        return Tree(self, target, memory, out, news.hidden[:0])

    def own(self, states: Tensor) -> Tensor:
        """In the dtype of this head's weights."""
        return states.to(next(self.parameters()).dtype)

    def state(self) -> dict[str, Tensor]:
        return {
            name.replace("midlayer.", "layers.0.", 1): tensor
            for name, tensor in super().state().items()
        }


def _chosen(where: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, "B 1"], Int[Tensor, "B n"]] | None:
    """The index of n slots of each row: its own of `where`, and further ones until all rows have
    the same number. None where that would be all."""
    count = max(1, int(where.sum(1).max()))
    count += -count % 16  # what matrix products are quickest with
    if count >= where.shape[1]:
        return None
    slots = where.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.arange(len(where), device=where.device).unsqueeze(1), slots


class Tree:
    """A trainer.drafters.Growth: nodes see the row, the nodes above them and themselves."""

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
        self.like = like  # of the dtype of the target's states
        self.depth, self.vocabulary = drafter.depth, drafter.vocabulary
        self.prefix = memory.get_seq_length()
        self.entries = Entries(memory.keys, memory.values)
        # which nodes each node sees
        self.above = torch.zeros(0, 0, dtype=torch.bool, device=out.device)
        # the newest token's, then the nodes'
        self.depths = torch.zeros(1, dtype=torch.long, device=out.device)
        self.read = self._read(out)  # what the head reads for the newest token, then for each node
        self.root = self._logits(self.read)[0]
        self.given = drafter.handed(out)  # (1, 1 + nodes, d)

    def first(self) -> Float[Tensor, " v"]:
        return self.root

    @torch.no_grad()
    def below(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
        drafter, target, old, new = self.drafter, self.target, len(self.above), len(tokens)
        above = torch.eye(new, old + new, dtype=torch.bool, device=tokens.device).roll(old, dims=1)
        child = parents >= 0
        above[child, :old] = self.above[parents[child]]
        depths = self.depths[parents + 1] + 1
        self.above = torch.cat([F.pad(self.above, (0, new)), above])
        self.depths = torch.cat([self.depths, depths])
        sees = torch.cat([above.new_ones(new, self.prefix), above], dim=1)
        if (reach := window(target)) is not None:
            at = torch.cat(
                [torch.arange(self.prefix, device=tokens.device), self.prefix - 1 + self.depths[1:]]
            )
            sees = sees & (self.prefix - 1 + depths.unsqueeze(1) - at < reach)
        embedded = drafter.own(target.embed(tokens)).unsqueeze(0)
        positions = (self.prefix - 1 + depths).unsqueeze(0)
        with precision(self.like):
            around = drafter.around(target, embedded, positions, sees.unsqueeze(0), self.entries)
            out = drafter.step(embedded, self.given[:, parents + 1], around)
            self.given = torch.cat([self.given, drafter.handed(out)], dim=1)
        self.confidence = drafter.predicted(1, self.read[parents + 1])
        read = self._read(out)
        self.read = torch.cat([self.read, read])
        return self._logits(read)

    def _read(self, out: Float[Tensor, "1 m d"]) -> Float[Tensor, "m d"]:
        with precision(self.like):
            return self.drafter.read(out)[0].to(self.like.dtype)

    def _logits(self, read: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        return self.drafter.draft_heads(self.target)[0](read)


class Eagle(Unrolled):
    """EAGLE-1's head, which is EAGLE-2's; conf/drafter/eagle.yaml says what the knobs mean.

    Raises:
        DrafterError: the weights are not of K offsets, a knob is out of its range, or the model's
        decoder layers cannot be built.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        depth: int | None,
        init: str,
        bias: bool,
        noise: float,
        feature_weight: float,
        token_weight: float,
        weights: list[float] | None,
        weight: float,
        loss: str,
        eta: float,
        confidence: float | None,
        lr_scale: float,
    ):
        super().__init__(offsets, depth, weights, [1.0] * offsets, weight, lr_scale, loss, eta)
        self.noise, self.feature_weight, self.token_weight = noise, feature_weight, token_weight
        size = model.config.get_text_config().hidden_size
        self.fc = projection(model, 2 * size, size)
        self.midlayer = masked_layer(model, init)
        self.midlayer.input_layernorm = nn.Identity()
        with torch.no_grad():
            if bias:
                self.fc.bias = nn.Parameter(torch.zeros_like(self.fc.weight[:, 0]))
            if init == "last_layer":
                self.fc.weight.copy_(torch.eye(size, 2 * size).roll(size, dims=1))
        self.predict_acceptance(model, confidence, 1)

    def entering(self, hidden: Tensor, features: Tensor | None) -> Tensor:
        if self.training and self.noise:
            # Drawn on the CPU, so that a device does not change it.
            hidden = hidden + ((torch.rand(hidden.shape) - 0.5) * self.noise).to(hidden)
        return hidden

    def step(self, embedded: Tensor, hidden: Tensor, surroundings: Any) -> Tensor:
        return through(
            self.midlayer, self.fc(torch.cat([embedded, hidden.to(embedded)], dim=-1)), surroundings
        )

    def handed(self, out: Tensor) -> Tensor:
        return out.detach()

    def loss(self, seen: Seen, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        total, beside, numbers, drafts = self.distilled(
            seen, target, chunk, self.counted_states(seen, target)
        )
        taught = where_taught(seen)
        wanted = seen.hidden.detach()[taught].float()
        features = total.new_zeros(())
        for k, weight in enumerate(self.weights, 1):
            where, _ = targets_of(k, seen.labels, seen.positions)
            counts = where.roll(k, dims=1)[taught]
            apart = F.smooth_l1_loss(drafts[k - 1].float(), wanted, reduction="none").mean(-1)
            features = features + weight * (apart * counts).sum()
        return self.feature_weight * features + self.token_weight * total + beside, numbers


def masked_layer(model: Any, init: str) -> Any:
    """A `decoder_layer` that takes a mask of one's own for each position: by sdpa, or as the model
    itself where that is eager.

    Raises:
        DrafterError: its parts are not where transformers' layers have them.
    """
    layer: Any = decoder_layer(model, init)
    missing = [
        name
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        if not hasattr(layer, name)
    ]
    config = copy.deepcopy(getattr(getattr(layer, "self_attn", None), "config", None))
    if missing or config is None:
        raise DrafterError(
            f"{type(layer).__name__} has no {', '.join(missing) or 'self_attn.config'}, so EAGLE's"
            " head cannot be built of it: set drafter=mtp_medusa, whose heads need none of it, or"
            " drafter=none"
        )
    config._attn_implementation = "eager" if config._attn_implementation == "eager" else DIAGONAL
    layer.self_attn.config = config
    return layer
