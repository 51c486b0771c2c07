"""Modules one after another, each reading one more token (DeepSeek-V3, arXiv 2412.19437, section
2.2), and FastMTP's shared one.

    h'_k[i] = M_k [enorm_k(emb(x_{i+k})) ; hnorm_k(h_{k-1}[i])]
    h_k = Block_k(h'_k)        k = 1 .. K
    logits_k[i] = head(norm_k(h_k[i])) predict x_{i+1+k}
    L = Σ_k w_k Σ_i CE        w_k = β^(k-1) / Σ_j β^(j-1)

h_0 (B, T, d) are the hidden states that the target's output head reads, after its final norm.
Block_k is a decoder layer of the target's family; M_k (d, 2d) is a projection without a bias, of
embedding, then hidden state, as in transformers' MtpLayer, whose parameter names are used.
Embedding and head are the target's and are not trained.

`shared` is FastMTP's form (arXiv 2509.18362): M, Block and all norms are the same for every k. β =
0.6 is FastMTP's; β = 1 gives the mean over depths of DeepSeek-V3, whose factor λ is `weight`.

Implementations differ in the following; training and decoding here do the same:
    The next depth reads h_k as the block returns it, before norm_k, as in DeepSeek-V3's equations.
    transformers' MtpModel passes on norm_k(h_k), which is the same with one depth only.
    Depth k attends to the depth-k states of earlier positions, h'_k[j] for j <= i, also if one
    block is shared: each depth has its own keys and values.
    Position i keeps its number at all depths. Rotary attention depends on differences only, so the
    shifted token's number, which transformers uses, gives the same.
    If x_{i+k} is not in i's row, its embedding is zero; no trained prediction depends on such a
    position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import Target, TargetOutput, TargetUpdate
from trainer.drafters.layers import (
    Heads,
    autocast_like,
    decayed,
    decoder_layer,
    embeddings_ahead,
    final_norm,
    layer_inputs,
    projection,
    run_layer,
)
from trainer.drafters.ragged import RaggedMemory
from trainer.drafters.sequential_batch import SequentialBatch, SequentialMemory
from trainer.drafters.starts import pass_last
from trainer.speed.roomy_cache import roomy


class Module(nn.Module):
    """One depth: (embeddings, hidden states), both (B, T, d), to hidden states (B, T, d), in fp32.

    With `init` last_layer, block and norm are copies of the target's last, and M = [0 | I]: at the
    start it runs the last layer once more.
    """

    def __init__(self, model: Any, init: str):
        super().__init__()
        size = model.config.get_text_config().hidden_size
        self.enorm = final_norm(model, "random")
        self.hnorm = final_norm(model, "random")
        self.eh_proj = projection(model, 2 * size, size)
        self.mtp_block = decoder_layer(model, init)
        self.post_norm = final_norm(model, init)
        if init == "last_layer":
            pass_last(self.eh_proj)

    def forward(self, embedded: Tensor, hidden: Tensor, inputs: Any) -> Tensor:
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        return run_layer(self.mtp_block, self.eh_proj(both), inputs)


@dataclass
class Memory:
    """The state of one sequence: `ids` are x_1 .. x_n, and the target's states at positions 0 ..
    n-1 have been read.

    Depth k's cache holds positions from 0 on whose x_{i+k} is known, at most max(0, n + 1 - k) of
    them. `waiting[k - 1]` (m, d) is h_{k-1} from the first position that depth k has not read.
    """

    caches: list[DynamicCache]
    ids: Int[Tensor, " n"]
    waiting: list[Float[Tensor, "m d"]]


class SequentialModules(Heads):
    """K depths with a module each, or with one `shared` module; conf/drafter/mtp_sequential.yaml
    documents the settings.

    Raises:
        DrafterError: there is not one weight for each offset, or the model's decoder layers cannot
        be built.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        shared: bool,
        weights: list[float] | None,
        beta: float,
        weight: float,
        init: str,
        detach: bool,
        lr_scale: float,
    ):
        super().__init__(offsets, weights, decayed(beta, offsets), weight, detach, lr_scale)
        # transformers' MtpModel names the tensors layers.*; the attribute `layers` of a drafter is
        # the list of the target's states that it reads.
        self._modules["layers"] = nn.ModuleList(
            Module(model, init) for _ in range(1 if shared else offsets)
        )

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        hidden = self.in_own_dtype(output.hidden)
        inputs = layer_inputs(target, hidden, output.positions)
        for k in range(1, self.offsets + 1):
            module = self.module(k)
            embedded = self.in_own_dtype(embeddings_ahead(k, output, target))
            with autocast_like(output.hidden):
                hidden = module(embedded, hidden, inputs)
                read = module.post_norm(hidden)
            yield read.to(output.hidden.dtype)

    def start(self, target: Target) -> Memory:
        some = next(self.parameters())
        none = some.new_empty(0, target.config.hidden_size)
        return Memory(
            [roomy(DynamicCache()) for _ in range(self.offsets)],
            none[:, 0].long(),
            [none] * self.offsets,
        )

    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> SequentialGrowth:
        memory.ids = torch.cat([memory.ids, update.ids])
        memory.waiting[0] = torch.cat([memory.waiting[0], self.in_own_dtype(update.hidden)])
        return SequentialGrowth(self, memory, target, update.hidden)

    @torch.no_grad()
    def run(
        self,
        k: int,
        memory: Memory,
        target: Target,
        paths: Int[Tensor, "m t"],
        below: Float[Tensor, "m s d"],
        like: Tensor,
    ) -> tuple[Float[Tensor, "m V"], Float[Tensor, "m r d"]]:
        """Run depth k after each of m paths of t = k - 1 drafted tokens. Return the logits of the
        token after each, in the dtype of `like`, and h_k at the last r = min(t, n) of the n
        positions. `below` is h_{k-1} at the last s = min(t - 1, n)."""
        length, many = len(memory.ids), len(paths)
        settled = max(0, length + 1 - k)  # positions whose x_{i+k} is known
        if many > 1 and memory.caches[k - 1].get_seq_length() < settled:
            self._step(k, memory, target, settled, memory.ids[None], below[:1, :0], like)
        tokens = torch.cat([memory.ids.expand(many, -1), paths], dim=1)
        states, read = self._step(k, memory, target, length, tokens, below, like)
        return target.head(read.to(like.dtype)), states[:, states.shape[1] - (length - settled) :]

    def _step(
        self,
        k: int,
        memory: Memory,
        target: Target,
        end: int,
        tokens: Tensor,
        below: Tensor,
        like: Tensor,
    ) -> tuple[Float[Tensor, "m p d"], Float[Tensor, "m d"]]:
        """Return (h_k at the p positions up to `end` that depth k has not read, the head's input at
        the last of them). Keep those whose tokens are known."""
        module, cache, many = self.module(k), memory.caches[k - 1], len(tokens)
        settled = max(0, len(memory.ids) + 1 - k)
        known = cache.get_seq_length()
        if many > 1:
            cache = widened(cache, many)
        positions = torch.arange(known, end, device=tokens.device).expand(many, -1)
        embedded = self.in_own_dtype(target.embed(tokens[:, known + k - 1 : end + k - 1]))
        waiting = memory.waiting[k - 1].expand(many, -1, -1)
        hidden = torch.cat([waiting, below], dim=1)[:, : end - known]
        with autocast_like(like):
            states = module(embedded, hidden, layer_inputs(target, hidden, positions, cache))
            read = module.post_norm(states[:, -1])
        if many == 1:
            cache.crop(min(0, settled - end))
            if settled > known:
                memory.waiting[k - 1] = memory.waiting[k - 1][settled - known :]
                if k < self.offsets:
                    memory.waiting[k] = torch.cat([memory.waiting[k], states[0, : settled - known]])
        return states, read

    def start_batch(self, target: Target, count: int) -> SequentialMemory:
        none = next(self.parameters()).new_empty(0, target.config.hidden_size)
        return SequentialMemory(
            [RaggedMemory.empty(1, count) for _ in range(self.offsets)],
            [none[:, 0].long() for _ in range(count)],
            [[none] * count for _ in range(self.offsets)],
        )

    def grow_batch(
        self, memory: SequentialMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> SequentialBatch:
        for row, update in enumerate(updates):
            memory.ids[row] = torch.cat([memory.ids[row], update.ids])
            states = self.in_own_dtype(update.hidden)
            memory.waiting[0][row] = torch.cat([memory.waiting[0][row], states])
        return SequentialBatch(self, memory, target, updates[0].hidden[:0])

    @property
    def depths(self) -> Any:
        """The modules: K of them, or the shared one."""
        return self._modules["layers"]

    def module(self, k: int) -> Any:
        return self.depths[min(k, len(self.depths)) - 1]

    def in_own_dtype(self, hidden: Tensor) -> Tensor:
        return hidden.to(next(self.parameters()).dtype)


class SequentialGrowth:
    """The growth of the modules over one tree. Nodes of one depth are a batch, and each computes
    the positions that its own tokens change."""

    branches = True
    vocabulary: Tensor | None = None
    confidence: Tensor | None = None

    def __init__(self, drafter: SequentialModules, memory: Memory, target: Target, like: Tensor):
        self.depth = drafter.offsets
        self._context = drafter, memory, target, like
        none = memory.waiting[0][:0]
        self._paths: list[Tensor] = []  # for each node, the tokens up to it (t,)
        # and h at the positions that these change, from `SequentialModules.run`
        self._states: list[Tensor] = []
        self._root = memory.ids[:0], none

    def first(self) -> Float[Tensor, " V"]:
        return self._run(1, self._root[0][None], self._root[1][None])[0][0]

    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
        above = parents.tolist() if self._paths else [-1] * len(tokens)
        paths = torch.stack([self._paths[i] if i >= 0 else self._root[0] for i in above])
        states = torch.stack([self._states[i] if i >= 0 else self._root[1] for i in above])
        paths = torch.cat([paths, tokens.unsqueeze(1)], dim=1)
        logits, states = self._run(paths.shape[1] + 1, paths, states)
        self._paths += paths.unbind()
        self._states += states.unbind()
        return logits

    def _run(self, k: int, paths: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        drafter, memory, target, like = self._context
        return drafter.run(k, memory, target, paths, below, like)


def widened(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a copy of a cache of one layer and one row, repeated for several rows."""
    wide = roomy(DynamicCache())
    layer: Any = cache.layers[0] if cache.layers else None
    if layer is not None and layer.is_initialized:
        wide.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), 0)
    return wide
