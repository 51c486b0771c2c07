"""A small model of the target's vocabulary (Leviathan et al. 2023, arXiv 2211.17192): it reads the
text beside the target, and writes on.

It has a cache of its own, which keeps the accepted tokens only: a tree's entries are dropped with
it, and what was accepted of it is read again in one pass with the newest token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from trainer.drafters import DrafterError, Growth, News, Target
from trainer.drafters.untrained import Untrained
from trainer.models.base import Base


@dataclass
class Memory:
    """The small model's keys and values at the first `length` tokens, and behind them those of the
    last tree."""

    cache: DynamicCache
    length: int = 0


class SmallModel(Untrained):
    """Whatever a causal model of transformers says, up to `depth` tokens ahead; trees branch where
    all its layers attend to everything.

    Raises:
        DrafterError: `depth` is less than 1, or the model's state cannot be taken back by some
        tokens.
    """

    def __init__(self, model: Any, depth: int = 5):
        if depth < 1:
            raise DrafterError(f"depth={depth}: a small model drafts at least 1 token")
        super().__init__(depth)
        if (
            getattr(model, "_is_stateful", False)
            or not DynamicCache(config=model.config.get_text_config()).is_croppable
        ):
            raise DrafterError(
                f"{type(model).__name__} has layers whose state cannot be taken back, which refused"
                " drafts ask for"
            )
        self.model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self.branches = not getattr(config, "sliding_window", None) and kinds <= {"full_attention"}

    def start(self, target: Target) -> Memory:
        cache = DynamicCache(config=self.model.config.get_text_config())
        cache.activate_past_recording()
        return Memory(cache)

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, news: News) -> Growth:
        if memory.length:
            memory.cache.crop(memory.length - memory.cache.get_seq_length())
        ids = news.ids if news.first is None else torch.cat([news.first.view(1), news.ids])
        logits = self.model(
            input_ids=ids.unsqueeze(0), past_key_values=memory.cache, logits_to_keep=1
        ).logits[0, -1]
        memory.length += len(ids)
        return Writing(self, memory, logits, target.config.vocab_size)


@dataclass
class Writing:
    """What the small model says over one tree."""

    drafter: SmallModel
    memory: Memory
    newest: Float[Tensor, " v"]
    size: int  # of the target's vocabulary, which may be padded otherwise
    confidence: Tensor | None = None
    ancestors: Tensor = field(init=False)  # (n, n): node i sees node j
    depths: Tensor = field(init=False)  # (n,) from 0

    def __post_init__(self) -> None:
        self.depth, self.branches = self.drafter.offsets, self.drafter.branches
        own = len(self.newest)
        self.vocabulary = torch.arange(own, device=self.newest.device) if own < self.size else None
        self.ancestors = torch.zeros(0, 0, dtype=torch.bool, device=self.newest.device)
        self.depths = torch.zeros(0, dtype=torch.long, device=self.newest.device)

    def first(self) -> Float[Tensor, " v"]:
        return self.newest[: self.size]

    @torch.no_grad()
    def below(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
        before, more = len(self.depths), len(tokens)
        inherited = torch.zeros(more, before + more, dtype=torch.bool, device=tokens.device)
        under = parents >= 0
        inherited[under, :before] = self.ancestors[parents[under]]
        depths = torch.zeros_like(tokens)
        depths[under] = self.depths[parents[under]] + 1
        seen = inherited | torch.eye(
            more, before + more, dtype=torch.bool, device=tokens.device
        ).roll(before, dims=1)
        self.ancestors = torch.cat([torch.nn.functional.pad(self.ancestors, (0, more)), seen])
        self.depths = torch.cat([self.depths, depths])
        model, length = self.drafter.model, self.memory.length
        logits = model(
            input_ids=tokens.unsqueeze(0),
            position_ids=(length + depths).unsqueeze(0),
            past_key_values=self.memory.cache,
            attention_mask=self._mask(seen, model.dtype),
        ).logits[0]
        return logits[:, : self.size]

    def _mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention scores (1, 1, m, length + n); None where each node follows the
        one before."""
        if len(seen) == 1 and bool(seen.all()):
            return None
        mask = torch.zeros(
            len(seen), self.memory.length + seen.shape[1], dtype=dtype, device=seen.device
        )
        mask[:, self.memory.length :].masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[None, None]


def small_model(
    path: str, base: Base, dtype: torch.dtype, device: torch.device | str, depth: int = 5
) -> SmallModel:
    """The drafter that a model's folder, or its name on the hub, is.

    Raises:
        BaseError: it cannot be loaded.
        DrafterError: its tokens are not those of `base`.
    """
    described = Base(
        path,
        "auto",
        base.attn_implementation,
        "none",
        False,
        trust_remote_code=base.trust_remote_code,
    )
    own, other = base.tokenizer.get_vocab(), described.tokenizer.get_vocab()
    different = [token for token, number in own.items() if other.get(token) != number]
    if different or len(own) != len(other):
        said = (
            f"{different[0]!r} is {own[different[0]]} of the target and {other.get(different[0])}"
            " of it"
            if different
            else "it has more"
        )
        raise DrafterError(
            f"{path} cannot draft for {base.path}: its {len(other)} tokens are not the same as the"
            f" target's {len(own)} ({said}). A small model of the target's own tokenizer is needed"
        )
    return SmallModel(described.load(dtype, None, device), depth)
