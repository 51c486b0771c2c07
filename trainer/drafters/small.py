"""A small model with the target's vocabulary (Leviathan et al. 2023, arXiv 2211.17192): it reads
the same text as the target, and continues it.

Its own cache keeps the accepted tokens only. A tree's entries are dropped, and its accepted tokens
are read again in one pass with the newest token.

With a `context` it reads a part of a long text, at positions of its own from 0 on. When the cache
has twice as many tokens, that part is chosen and read again, so the cache stays bounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from trainer.drafters import DrafterError, Growth, Target, TargetUpdate, small_batch
from trainer.drafters.contexts import Context
from trainer.drafters.ragged import RaggedMemory
from trainer.drafters.tree_batch import TreeBatch
from trainer.drafters.untrained import Untrained
from trainer.models.base import Base
from trainer.models.cache_argument import model_with_cache, rolls_back
from trainer.speed.roomy_cache import roomy


@dataclass
class Memory:
    """The small model's keys and values at `length` tokens, followed by those of the last tree.
    With a context, `text` has all tokens so far."""

    cache: DynamicCache
    length: int = 0
    text: Int[Tensor, " t"] | None = None


class SmallModel(Untrained):
    """A causal model of transformers, up to `depth` tokens ahead. Its trees branch if all its
    layers have full attention. It reads the part of a text that `context` chooses.

    Raises:
        DrafterError: `depth` is less than 1, or the model's state cannot be rolled back.
    """

    def __init__(self, model: Any, depth: int = 5, context: str = "all"):
        if depth < 1:
            raise DrafterError(f"depth={depth}: a small model drafts at least 1 token")
        super().__init__(depth)
        if (
            not rolls_back(model)
            or not DynamicCache(config=model.config.get_text_config()).is_croppable
        ):
            raise DrafterError(
                f"{type(model).__name__} has layers whose state cannot be rolled back, which"
                " refused drafts need"
            )
        self.model = model.eval().requires_grad_(False)
        self.context = Context(context)
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self.branches = not getattr(config, "sliding_window", None) and kinds <= {"full_attention"}

    def start(self, target: Target) -> Memory:
        return Memory(self._cache())

    @functools.cached_property
    def _several(self) -> Target | None:
        """The model as it reads several texts at once, if it can."""
        return None if self.context.kind != "all" else small_batch.as_batch(self.model)

    def start_batch(self, target: Target, count: int) -> RaggedMemory | None:
        return None if self._several is None else small_batch.memory_of(self._several, count)

    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> TreeBatch:
        assert self._several is not None  # start_batch gave a memory
        growth = small_batch.tree_batch(
            self._several, self.depth, memory, updates, target.config.vocab_size
        )
        growth.branches = self.branches
        return growth

    def _cache(self) -> DynamicCache:
        cache = roomy(DynamicCache(config=self.model.config.get_text_config()))
        cache.activate_past_recording()
        return cache

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> Growth:
        if memory.length:
            memory.cache.crop(memory.length - memory.cache.get_seq_length())
        ids = update.ids if update.first is None else torch.cat([update.first.view(1), update.ids])
        if self.context.kind != "all":
            memory.text = ids if memory.text is None else torch.cat([memory.text, ids])
            if memory.length + len(ids) > 2 * self.context.size or not memory.length:
                memory.cache, memory.length = self._cache(), 0
                ids = self.context.of(memory.text)
        logits = self.model(
            input_ids=ids.unsqueeze(0),
            logits_to_keep=1,
            **model_with_cache(self.model, memory.cache),
        ).logits[0, -1]
        memory.length += len(ids)
        return SmallModelGrowth(self, memory, logits, target.config.vocab_size)


@dataclass
class SmallModelGrowth:
    """The growth of the small model over one tree."""

    drafter: Any  # a SmallModel, or one that drafts as it does
    memory: Any
    newest: Float[Tensor, " v"]
    size: int  # of the target's vocabulary, which may have other padding
    confidence: Tensor | None = None
    ancestors: Tensor = field(init=False)  # (n, n): node i sees node j
    depths: Tensor = field(init=False)  # (n,) from 0

    def __post_init__(self) -> None:
        self.depth, self.branches = self.drafter.depth, self.drafter.branches
        size = len(self.newest)
        self.vocabulary = (
            torch.arange(size, device=self.newest.device) if size < self.size else None
        )
        self.ancestors = torch.zeros(0, 0, dtype=torch.bool, device=self.newest.device)
        self.depths = torch.zeros(0, dtype=torch.long, device=self.newest.device)

    def first(self) -> Float[Tensor, " v"]:
        return self.newest[: self.size]

    @torch.no_grad()
    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
        before, more = len(self.depths), len(tokens)
        inherited = torch.zeros(more, before + more, dtype=torch.bool, device=tokens.device)
        under = parents >= 0
        inherited[under, :before] = self.ancestors[parents[under]]
        depths = torch.zeros_like(tokens)
        depths[under] = self.depths[parents[under]] + 1
        visible = inherited | torch.eye(
            more, before + more, dtype=torch.bool, device=tokens.device
        ).roll(before, dims=1)
        self.ancestors = torch.cat([torch.nn.functional.pad(self.ancestors, (0, more)), visible])
        self.depths = torch.cat([self.depths, depths])
        return self.logits_of(tokens, depths, visible)[:, : self.size]

    def logits_of(
        self, tokens: Int[Tensor, " m"], depths: Int[Tensor, " m"], visible: Bool[Tensor, "m n"]
    ) -> Float[Tensor, "m v"]:
        """Return the logits after m further nodes, given which of all nodes each of them sees."""
        model, length = self.drafter.model, self.memory.length
        return model(
            input_ids=tokens.unsqueeze(0),
            position_ids=(length + depths).unsqueeze(0),
            attention_mask=self._mask(visible, model.dtype),
            **model_with_cache(model, self.memory.cache),
        ).logits[0]

    def _mask(self, visible: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to attention scores (1, 1, m, length + n); None if each node follows
        the one before."""
        if len(visible) == 1 and bool(visible.all()):
            return None
        mask = torch.zeros(
            len(visible), self.memory.length + visible.shape[1], dtype=dtype, device=visible.device
        )
        mask[:, self.memory.length :].masked_fill_(~visible, torch.finfo(dtype).min)
        return mask[None, None]


def small_model(
    path: str,
    base: Base,
    dtype: torch.dtype,
    device: torch.device | str,
    depth: int = 5,
    context: str = "all",
) -> SmallModel:
    """Load a drafter from a model's folder, or by its name on the hub.

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
    expected, actual = base.tokenizer.get_vocab(), described.tokenizer.get_vocab()
    different = [token for token, number in expected.items() if actual.get(token) != number]
    if different or len(expected) != len(actual):
        reason = (
            f"{different[0]!r} is {expected[different[0]]} of the target and"
            f" {actual.get(different[0])} of it"
            if different
            else "it has more"
        )
        raise DrafterError(
            f"{path} cannot draft for {base.path}: its {len(actual)} tokens are not the same as the"
            f" target's {len(expected)} ({reason}). Use a small model with the target's tokenizer"
        )
    return SmallModel(described.load(dtype, None, device), depth, context)
