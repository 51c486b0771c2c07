"""Modules one after another, each given one more token (DeepSeek-V3, arXiv 2412.19437, section 2.2), and FastMTP's shared one.

    h'_k[i] = M_k [enorm_k(emb(x_{i+k})) ; hnorm_k(h_{k-1}[i])]        h_k = Block_k(h'_k)        k = 1 .. K
    logits_k[i] = head(norm_k(h_k[i])) predict x_{i+1+k}        L = Σ_k w_k Σ_i CE        w_k = β^(k-1) / Σ_j β^(j-1)

h_0 (B, T, d) are the hidden states that the target's output head reads, after its final norm; Block_k is a decoder layer of the
target's family, M_k (d, 2d) a projection without a bias of embedding, then hidden state, as in transformers' MtpLayer, after whose
parameters these are named. Embedding and head are the target's and are not trained.

`shared` is FastMTP's form (arXiv 2509.18362): M, Block and all norms are the same for every k. β = 0.6 is FastMTP's, β = 1 gives the
mean over depths of DeepSeek-V3, whose factor λ is `weight`.

What implementations differ in, and what holds here, in training and decoding alike:
    The next depth reads h_k as the block gives it, before norm_k, as DeepSeek-V3's equations have it; transformers' MtpModel hands on
    norm_k(h_k), which is the same with one depth only.
    Depth k attends to the depth-k states of earlier positions, h'_k[j] for j <= i, also where one block is shared: each depth has
    keys and values of its own.
    Position i keeps its own number at all depths. Rotary attention sees differences only, so that the shifted token's number,
    which transformers takes, gives the same.
    Where x_{i+k} is not of i's row, zeros stand for its embedding; no prediction that is trained depends on such a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import Draft, Seen, Target
from trainer.drafters.layers import (
    Heads,
    around,
    decayed,
    decoder_layer,
    drafted,
    final_norm,
    precision,
    projection,
    through,
)


class Module(nn.Module):
    """One depth: (embeddings, hidden states), both (B, T, d), to hidden states (B, T, d), in fp32.

    With `init` last_layer, block and norm are the target's last, and M = [0 | I]: it starts as the last layer run once more.
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
    """What is known of one sequence of which the target's states at `length` positions were seen.

    Depth k's cache holds the positions whose x_{i+k} is known, max(0, length + 1 - k) of them; `last[k]` (0 or 1, d) is h_k at those
    of them that depth k + 1 does not know yet.
    """

    caches: list[DynamicCache]
    last: list[Tensor | None]
    length: int = 0


class SequentialModules(Heads):
    """K depths of own modules, or of one `shared` module; conf/drafter/mtp_sequential.yaml says what the knobs mean.

    Raises:
        DrafterError: the weights are not of K offsets, or the model's decoder layers cannot be built.
    """

    def __init__(
        self, model: Any, offsets: int, shared: bool, weights: list[float] | None, beta: float, weight: float, init: str,
        detach: bool, lr_scale: float,
    ):  # fmt: skip
        super().__init__(offsets, weights, decayed(beta, offsets), weight, detach, lr_scale)
        self.layers = nn.ModuleList(Module(model, init) for _ in range(1 if shared else offsets))

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        hidden = self._entering(seen.hidden)
        surroundings = around(target, hidden, seen.positions)
        for k in range(1, self.offsets + 1):
            module = self._module(k)
            embedded = self._entering(_ahead(k, seen, target))
            with precision(seen.hidden):
                hidden = module(embedded, hidden, surroundings)
                read = module.post_norm(hidden)
            yield read.to(seen.hidden.dtype)

    def start(self, target: Target) -> Memory:
        return Memory([DynamicCache() for _ in range(self.offsets)], [None] * self.offsets)

    @torch.no_grad()
    def propose(
        self, memory: Memory, target: Target, hidden: Float[Tensor, "n d"], ids: Int[Tensor, " n"], count: int,
        choose: Callable[[Float[Tensor, " V"]], tuple[Tensor, Tensor | None]],
    ) -> Draft:  # fmt: skip
        old, new = memory.length, memory.length + len(hidden)
        tokens, picks = ids, []  # x_{old+1} ..: those known, then those drafted
        below = self._entering(hidden)  # h_{k-1} from position old + 1 - (k - 1), or 0, on
        for k in range(1, self.offsets + 1):
            module, cache = self._module(k), memory.caches[k - 1]
            known, settled = max(0, old + 1 - k), max(0, new + 1 - k)  # positions whose x_{i+k} is known, before and now
            end = new if k <= count else settled  # a depth that drafts also needs those with drafted tokens
            states = below[:0]
            if end > known:
                positions = torch.arange(known, end, device=hidden.device).unsqueeze(0)
                embedded = self._entering(target.embed(tokens[known + k - old - 1 : end + k - old - 1])).unsqueeze(0)
                entering = below[: end - known].unsqueeze(0)
                with precision(hidden):
                    states = module(embedded, entering, around(target, entering, positions, cache))[0]
                    read = module.post_norm(states[-1:])
                cache.crop(settled - end)
            if k <= count:
                pick = choose(target.head(read.to(hidden.dtype))[0])
                picks.append(pick)
                tokens = torch.cat([tokens, pick[0].reshape(1).to(tokens)])
            held = memory.last[k - 1]
            states = states if held is None else torch.cat([held, states])
            first = known if held is None else known - len(held)  # the position of states[0]
            below = states
            memory.last[k - 1] = states[max(0, new - k) - first : settled - first]
        memory.length = new
        return drafted(picks, ids)

    def _module(self, k: int) -> Any:
        return self.layers[min(k, len(self.layers)) - 1]

    def _entering(self, hidden: Tensor) -> Tensor:
        return hidden.to(next(self.parameters()).dtype)


def _ahead(k: int, seen: Seen, target: Target) -> Float[Tensor, "B T d"]:
    """The embeddings of x_{i+k}, zeros where that is not of i's row."""
    same = seen.positions.roll(-k, dims=1) == seen.positions + k  # what rolls over has too small a position
    with torch.no_grad():
        embedded = target.embed(seen.ids.roll(-k, dims=1))
    return embedded.masked_fill(~same.unsqueeze(-1), 0.0)
