"""Modules one after another, each given one more token (DeepSeek-V3, arXiv 2412.19437, section
2.2), and FastMTP's shared one.

    h'_k[i] = M_k [enorm_k(emb(x_{i+k})) ; hnorm_k(h_{k-1}[i])]        h_k = Block_k(h'_k)        k = 1 .. K
    logits_k[i] = head(norm_k(h_k[i])) predict x_{i+1+k}        L = Σ_k w_k Σ_i CE        w_k = β^(k-1) / Σ_j β^(j-1)

h_0 (B, T, d) are the hidden states that the target's output head reads, after its final norm;
Block_k is a decoder layer of the target's family, M_k (d, 2d) a projection without a bias of
embedding, then hidden state, as in transformers' MtpLayer, after whose parameters these are named.
Embedding and head are the target's and are not trained.

`shared` is FastMTP's form (arXiv 2509.18362): M, Block and all norms are the same for every k. β =
0.6 is FastMTP's, β = 1 gives the mean over depths of DeepSeek-V3, whose factor λ is `weight`.

What implementations differ in, and what holds here, in training and decoding alike:
    The next depth reads h_k as the block gives it, before norm_k, as DeepSeek-V3's equations have
    it; transformers' MtpModel hands on norm_k(h_k), which is the same with one depth only. Depth k
    attends to the depth-k states of earlier positions, h'_k[j] for j <= i, also where one block is
    shared: each depth has keys and values of its own. Position i keeps its own number at all
    depths. Rotary attention sees differences only, so that the shifted token's number, which
    transformers takes, gives the same. Where x_{i+k} is not of i's row, zeros stand for its
    embedding; no prediction that is trained depends on such a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import News, Seen, Target
from trainer.drafters.layers import (
    Heads,
    ahead,
    around,
    decayed,
    decoder_layer,
    final_norm,
    precision,
    projection,
    through,
)


class Module(nn.Module):
    """One depth: (embeddings, hidden states), both (B, T, d), to hidden states (B, T, d), in fp32.

    With `init` last_layer, block and norm are the target's last, and M = [0 | I]: it starts as the
    last layer run once more.
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
            with torch.no_grad():
                self.eh_proj.weight.copy_(torch.eye(size, 2 * size).roll(size, dims=1))

    def forward(self, embedded: Tensor, hidden: Tensor, surroundings: Any) -> Tensor:
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        return through(self.mtp_block, self.eh_proj(both), surroundings)


@dataclass
class Memory:
    """What is known of one sequence: `ids` are x_1 .. x_n, and the target's states at positions 0
    .. n-1 were seen.

    Depth k's cache holds positions from 0 on whose x_{i+k} is known, at most max(0, n + 1 - k) of
    them; `waiting[k - 1]` (m, d) is h_{k-1} from the first position on that depth k does not know
    yet.
    """

    caches: list[DynamicCache]
    ids: Int[Tensor, " n"]
    waiting: list[Float[Tensor, "m d"]]


class SequentialModules(Heads):
    """K depths of own modules, or of one `shared` module; conf/drafter/mtp_sequential.yaml says
    what the knobs mean.

    Raises:
        DrafterError: the weights are not of K offsets, or the model's decoder layers cannot be
        built.
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
        # Tensors are named as transformers' MtpModel names them; `layers` itself is the target's
        # states that a drafter reads.
        self._modules["layers"] = nn.ModuleList(
            Module(model, init) for _ in range(1 if shared else offsets)
        )

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        hidden = self._entering(seen.hidden)
        surroundings = around(target, hidden, seen.positions)
        for k in range(1, self.offsets + 1):
            module = self._module(k)
            embedded = self._entering(ahead(k, seen, target))
            with precision(seen.hidden):
                hidden = module(embedded, hidden, surroundings)
                read = module.post_norm(hidden)
            yield read.to(seen.hidden.dtype)

    def start(self, target: Target) -> Memory:
        some = next(self.parameters())
        none = some.new_empty(0, target.config.hidden_size)
        return Memory(
            [DynamicCache() for _ in range(self.offsets)], none[:, 0].long(), [none] * self.offsets
        )

    def grow(self, memory: Memory, target: Target, news: News) -> Growing:
        memory.ids = torch.cat([memory.ids, news.ids])
        memory.waiting[0] = torch.cat([memory.waiting[0], self._entering(news.hidden)])
        return Growing(self, memory, target, news.hidden)

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
        """Depth k after each of m paths of t = k - 1 drafted tokens: the logits of the token after
        each, in the dtype of `like`, and h_k at the last r = min(t, n) of the n positions. `below`
        is h_{k-1} at the last s = min(t - 1, n)."""
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
        """(h_k at the p positions up to `end` that depth k did not know, what the head reads at the
        last of them). Keeps those whose tokens are known."""
        module, cache, many = self._module(k), memory.caches[k - 1], len(tokens)
        settled = max(0, len(memory.ids) + 1 - k)
        known = cache.get_seq_length()
        if many > 1:
            cache = widened(cache, many)
        positions = torch.arange(known, end, device=tokens.device).expand(many, -1)
        embedded = self._entering(target.embed(tokens[:, known + k - 1 : end + k - 1]))
        waiting = memory.waiting[k - 1].expand(many, -1, -1)
        entering = torch.cat([waiting, below], dim=1)[:, : end - known]
        with precision(like):
            states = module(embedded, entering, around(target, entering, positions, cache))
            read = module.post_norm(states[:, -1])
        if many == 1:
            cache.crop(min(0, settled - end))
            if settled > known:
                memory.waiting[k - 1] = memory.waiting[k - 1][settled - known :]
                if k < self.offsets:
                    memory.waiting[k] = torch.cat([memory.waiting[k], states[0, : settled - known]])
        return states, read

    @property
    def depths(self) -> Any:
        """The modules: K of them, or the shared one."""
        return self._modules["layers"]

    def _module(self, k: int) -> Any:
        return self.depths[min(k, len(self.depths)) - 1]

    def _entering(self, hidden: Tensor) -> Tensor:
        return hidden.to(next(self.parameters()).dtype)


class Growing:
    """What the modules say over one tree; nodes of one depth are a batch, and each works on the
    positions that its own tokens change."""

    branches = True
    vocabulary: Tensor | None = None
    confidence: Tensor | None = None

    def __init__(self, drafter: SequentialModules, memory: Memory, target: Target, like: Tensor):
        self.depth = drafter.offsets
        self._rest = drafter, memory, target, like
        none = memory.waiting[0][:0]
        self._paths: list[Tensor] = []  # of the nodes, the tokens up to each (t,)
        # and h at the positions that they change, as `SequentialModules.run` gives it
        self._states: list[Tensor] = []
        self._root = memory.ids[:0], none

    def first(self) -> Float[Tensor, " V"]:
        return self._run(1, self._root[0][None], self._root[1][None])[0][0]

    def below(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
        above = parents.tolist() if self._paths else [-1] * len(tokens)
        paths = torch.stack([self._paths[i] if i >= 0 else self._root[0] for i in above])
        states = torch.stack([self._states[i] if i >= 0 else self._root[1] for i in above])
        paths = torch.cat([paths, tokens.unsqueeze(1)], dim=1)
        logits, states = self._run(paths.shape[1] + 1, paths, states)
        self._paths += paths.unbind()
        self._states += states.unbind()
        return logits

    def _run(self, k: int, paths: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        drafter, memory, target, like = self._rest
        return drafter.run(k, memory, target, paths, below, like)


def widened(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a cache of one layer and one row, for several rows."""
    wide = DynamicCache()
    layer: Any = cache.layers[0] if cache.layers else None
    if layer is not None and layer.is_initialized:
        wide.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), 0)
    return wide
