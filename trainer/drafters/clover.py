"""Clover-2: a small recurrent head behind two decoder layers (Xiao et al. 2024, arXiv 2408.00264).

    s_t = RAB_1(h_t, e(x_{t+1}))       m_1 = norm(Layer_2(Layer_1(s_1 .. s_t)))
    m_k = RAB_2(m_{k-1}, e(x_{t+k}))                                                  k >= 2
    z_1 = norm_h(M_1 m_1)    z_k = norm_h(M_2 [m_k ; e(x_{t+k})])    head(z_k) predict x_{t+1+k}

    RAB(x, e) = x + V e ⊙ γ,   γ of a head's channels = cos(Q norm(x), K e) over these channels

    L = Σ_k w_k Σ_t ( v SmoothL1(z_k, f_{t+k}) + p CE(head(f_{t+k}), head(z_k)) )
    v = 10, p = 1, w_k = 0.7^(k-1)

h (B, T, d) is the output of the target's last layer before its final norm, f the state that its
output head reads. e(x) are rows of the output layer's weight, which is not trained here. Q, K, V
and M_1 are (d, d), M_2 is (d, 2d); RAB_2, M_2 and norm_h serve all k. SmoothL1 is the mean over d.
The layers read accepted tokens alone: a drafted token costs a few small products, and no attention.

At the start Q, K and M_1 are I + N, M_2 is [I 0] + N, V is N and biases are 0. The layers are
copies of the target's last one, and the norms of its final norm.

Differs from the paper:
    N is uniform in ±0.005. The authors' is in 0 .. 0.01, whose rows sum to 20 for d = 4096 and
    drown I.
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

from adapters.linear import is_packed
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate
from trainer.drafters.distilled import Distilled, taught_positions
from trainer.drafters.layers import (
    autocast_like,
    check_states,
    decoder_layer,
    final_norm,
    layer_inputs,
    layers_of,
    run_layer,
)
from trainer.drafters.ragged import RaggedMemory, padded, ragged_inputs
from trainer.models.on_host import picked
from trainer.speed.roomy_cache import roomy

NOISE = 0.005


class Regressive(nn.Module):
    """RAB: x with what a token's row e adds to it, (.., d) and (.., d) to (.., d), in fp32."""

    def __init__(self, model: Any, heads: int):
        super().__init__()
        self.heads, self.norm = heads, final_norm(model, "last_layer")
        self.q, self.k, self.v = (near_identity(model, 1, scale) for scale in (1.0, 1.0, 0.0))

    def forward(self, x: Float[Tensor, "*b d"], e: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        split = (self.heads, -1)
        q, k, v = (
            part.unflatten(-1, split) for part in (self.q(self.norm(x)), self.k(e), self.v(e))
        )
        return x + (v * F.cosine_similarity(q, k, dim=-1).unsqueeze(-1)).flatten(-2)


def near_identity(model: Any, count: int, scale: float) -> nn.Linear:
    """Return a linear layer from `count` concatenated vectors to one, [scale I | 0] + N."""
    size = model.config.get_text_config().hidden_size
    device = model.get_output_embeddings().weight.device
    layer = nn.Linear(count * size, size, device=device, dtype=torch.float32)
    with torch.no_grad():
        nn.init.zeros_(layer.bias)
        noise = torch.empty_like(layer.weight).uniform_(-NOISE, NOISE)
        layer.weight.copy_(noise + scale * torch.eye(size, count * size, device=device))
    return layer


@dataclass
class Memory:
    """Keys and values of each layer at the accepted tokens."""

    caches: list[DynamicCache]


class Clover(Distilled):
    """Clover-2's head; conf/drafter/clover.yaml documents the settings.

    Raises:
        DrafterError: a setting is out of its range, or the head cannot be built for the model.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        layers: int,
        feature_weight: float,
        token_weight: float,
        beta: float,
        weights: list[float] | None,
        weight: float,
        loss: str,
        eta: float,
        lr_scale: float,
    ):
        default = [beta**k for k in range(offsets)]
        super().__init__(offsets, weights, default, weight, lr_scale, loss, eta)
        self.feature_weight, self.token_weight = feature_weight, token_weight
        config = model.config.get_text_config()
        heads, size = config.num_attention_heads, config.hidden_size
        if size % heads:
            raise DrafterError(
                f"drafter=clover compares states by head, and {type(model).__name__}'s"
                f" hidden_size={size} is no multiple of its {heads} heads: train another drafter,"
                " such as eagle3"
            )
        if is_packed(model.get_output_embeddings()):
            raise DrafterError(
                "drafter=clover reads rows of the output layer's weight, and this one is quantised:"
                " train another drafter, such as eagle3"
            )
        self.layers = (len(layers_of(model)),)
        check_states(model, self.layers)
        self.before, self.after = Regressive(model, heads), Regressive(model, heads)
        self.blocks = nn.ModuleList(decoder_layer(model, "last_layer") for _ in range(layers))
        self.norm, self.head_norm = (final_norm(model, "last_layer") for _ in range(2))
        self.first_input = near_identity(model, 1, 1.0)
        self.later_input = near_identity(model, 2, 1.0)

    def rows(self, ids: Int[Tensor, "*b"], target: Target) -> Float[Tensor, "*b d"]:
        """Return e(x)."""
        weight = target.model.get_output_embeddings().weight.detach()
        return F.embedding(ids, weight).float()

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        assert output.features is not None, "the states of `layers` are missing"
        with autocast_like(output.hidden):
            m, e = output.features.float(), None
            for k in range(1, self.offsets + 1):
                # Tokens that wrap around have a smaller position.
                same = output.positions.roll(-k, dims=1) == output.positions + k
                e = self.rows(output.ids.roll(-k, dims=1), target)
                e = e.masked_fill(~same.unsqueeze(-1), 0.0)
                if k == 1:
                    s = self.before(m, e)
                    for block in self.blocks:
                        s = run_layer(block, s, layer_inputs(target, s, output.positions))
                    m = self.norm(s)
                else:
                    m = self.after(m, e)
                yield self.head_input(k, m, e).to(output.hidden.dtype)

    def head_input(
        self, k: int, m: Float[Tensor, "*b d"], e: Float[Tensor, "*b d"]
    ) -> Float[Tensor, "*b d"]:
        """Return z_k."""
        if k == 1:
            return self.head_norm(self.first_input(m))
        return self.head_norm(self.later_input(torch.cat([m, e.to(m.dtype)], dim=-1)))

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        total, _, numbers, drafts = self.distilled(
            output, target, chunk, self.counted_states(output, target)
        )
        taught, counts = taught_positions(output, self.offsets)
        states = picked(output.hidden.detach(), taught).float()
        distance = total.new_zeros(())
        for k, weight in enumerate(self.weights, 1):
            error = F.smooth_l1_loss(drafts[k - 1].float(), states, reduction="none").mean(-1)
            distance = distance + weight * (error * counts[k - 1]).sum()
        return self.feature_weight * distance + self.token_weight * total, numbers

    def start(self, target: Target) -> Memory:
        return Memory([roomy(DynamicCache()) for _ in self.blocks])

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> CloverGrowth:
        dtype = self.first_input.weight.dtype
        with autocast_like(update.hidden):
            e = self.rows(update.ids, target).to(dtype)
            s = self.before(update.features.to(dtype), e).unsqueeze(0)
            before = memory.caches[0].get_seq_length() if memory.caches else 0
            positions = torch.arange(before, before + len(e), device=e.device).unsqueeze(0)
            for block, cache in zip(self.blocks, memory.caches, strict=True):
                s = run_layer(block, s, layer_inputs(target, s, positions, cache))
            m = self.norm(s[0, -1:])
        return CloverGrowth(self, target, m, update.hidden)

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(len(self.blocks), count)

    @torch.no_grad()
    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> CloverBatch:
        read, dtype = padded(updates), self.first_input.weight.dtype
        with autocast_like(read.hidden):
            s = self.before(read.features.to(dtype), self.rows(read.ids, target).to(dtype))
            places = memory.read(read.counts, 0, s.device)
            for block, entries in zip(self.blocks, memory.layers, strict=True):
                s = run_layer(block, s, ragged_inputs(target, s, places, entries))
            m = self.norm(read.newest(s))
        return CloverBatch(self, target, m.unsqueeze(1), read.hidden)


class CloverGrowth:
    """The growth of Clover-2's head: a node carries m_k. The nodes of a call are a batch."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, " m"] | None = None

    def __init__(self, drafter: Clover, target: Target, m: Float[Tensor, "1 d"], like: Tensor):
        self.depth = drafter.offsets
        self._drafter, self._target, self._like = drafter, target, like
        self._m = m  # of the newest token, then of each node

    @torch.no_grad()
    def first(self) -> Float[Tensor, " V"]:
        return self.logits(1, self._m[:1], self._m[:1])[0]

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
        m, logits = self.further(tokens, self._m[parents.to(self._m.device) + 1])
        self._m = torch.cat([self._m, m.to(self._m.dtype)])
        return logits

    def further(
        self, tokens: Int[Tensor, " n"], above: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n V"]]:
        """Return m and the logits after tokens, from the m of their parents."""
        with autocast_like(self._like):
            e = self._drafter.rows(tokens, self._target).to(above.dtype)
            m = self._drafter.after(above, e)
        return m, self.logits(2, m, e)

    def logits(
        self, k: int, m: Float[Tensor, "n d"], e: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n V"]:
        """Return the logits of z_k."""
        with autocast_like(self._like):
            z = self._drafter.head_input(k, m, e)
        return self._target.head(z.to(self._like.dtype))


class CloverBatch:
    """A trainer.drafters.BatchGrowth, of CloverGrowth's numbers."""

    branches = True
    vocabulary: Int[Tensor, " v"] | None = None
    confidence: Float[Tensor, "B m"] | None = None

    def __init__(self, drafter: Clover, target: Target, m: Float[Tensor, "B 1 d"], like: Tensor):
        self.depth = drafter.offsets
        self._growth = CloverGrowth(drafter, target, m[0], like)
        self._m = m  # of the newest token, then of each node

    @torch.no_grad()
    def first(self) -> Float[Tensor, "B V"]:
        return self._growth.logits(1, self._m[:, 0], self._m[:, 0])

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        rows = (parents + 1).unsqueeze(2).expand(-1, -1, self._m.shape[2])
        above = self._m.gather(1, rows).flatten(0, 1)
        m, logits = self._growth.further(tokens.flatten(), above)
        self._m = torch.cat([self._m, m.to(self._m.dtype).unflatten(0, tokens.shape)], dim=1)
        return logits.unflatten(0, tokens.shape)
