"""The cache of a target for one or several sequences, and passes over trees of further tokens.

    a pass over n + 1 places (the newest token, then a tree's nodes) of a sequence of L tokens:
        position of a place   L + its depth, 0 for the newest token
        a place sees          the L tokens before, its ancestors and itself, of those only what a
                              sliding window reaches
    afterwards the entries of accepted places move behind the L tokens, in order, and all others are
    dropped

A chain of one sequence needs none of this: it is read as ordinary text, and its end is rolled back.
So chains work with every model whose cache can be cropped. Trees and several sequences are read
with 4-D masks (1 or B, 1, N, L + N). They need attention that takes such masks, and caches that
keep all entries, including those outside a sliding window.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trainer.decoding.layout import is_chain, tree_positions
from trainer.drafters import DrafterError, Target
from trainer.models.cache_argument import cache_of, makes_its_own, model_with_cache, takes_a_cache
from trainer.models.heads import captured_hidden, captured_layers
from trainer.speed.attention import BLOCKED
from trainer.speed.roomy_cache import RoomyLayer, roomy

# The states that the output head reads, and those of further layers, concatenated.
States = tuple[Float[Tensor, "n d"], Float[Tensor, "n f"]]

_KINDS = {"full_attention", "sliding_attention"}
# Targets that can read trees.
_reads_trees: weakref.WeakKeyDictionary[Target, None] = weakref.WeakKeyDictionary()

CANNOT_ROLL_BACK = "layers whose state cannot be rolled back"


class TargetCache:
    """The target's cache for several sequences, with rollback. With `whole` it keeps all entries,
    so that trees can be read.

    Raises:
        DrafterError: several sequences or a tree are read, and the target's layers or attention do
        not allow it. The message says what does.
    """

    def __init__(self, target: Target, layers: tuple[int, ...] = (), whole: bool = False):
        self.target, self.layers, self.whole = target, layers, whole
        self.output = target.model.get_output_embeddings()
        self.model, self.bare = target.model, not takes_a_cache(target.model)
        self.cache = self._empty()
        self.lengths: list[int] = []  # L of each sequence, including virtual tokens
        self.parents: list[list[int]] = []  # of the last pass
        self.recording = self.masked = False

    def _empty(self) -> Any:
        if self.bare or makes_its_own(self.model):
            return None
        return roomy(DynamicCache() if self.whole else DynamicCache(config=self.target.config))

    def read_again(self, ids: Int[Tensor, " n"]) -> list[States]:
        """Read the whole text of one sequence, its newest token included, in place of what was read
        of it. Return the states of the newest token; `commit` follows as after `read`."""
        self.cache, self.masked, self.parents = self._empty(), False, [[]]
        states = self.open([ids])
        self.lengths[0] -= 1  # `commit` counts the newest token
        if self.recording:
            self.cache.activate_past_recording()
        return [(hidden[-1:], features[-1:]) for hidden, features in states]

    def open(self, prompts: Sequence[Int[Tensor, " n"]]) -> list[States]:
        """Read the prompts, one after another."""
        states: list[States] = []
        caches: list[DynamicCache] = []
        for ids in prompts:
            self.model = self.target.model
            self.text = ids[None, :0]  # of a model without a cache
            if caches:
                self.cache = roomy(DynamicCache())
            states += self._pass(ids.unsqueeze(0))
            caches.append(self.cache)
            peft = getattr(self.model, "active_peft_config", None)
            if peft is not None and peft.is_prompt_learning:
                # Virtual tokens come before the first pass's tokens only.
                self.model = self.model.get_base_model()
        self.lengths = [
            length_of(cache, len(ids)) for cache, ids in zip(caches, prompts, strict=True)
        ]
        if len(prompts) > 1:
            self._allow_trees(caches)
        return states

    def start_rollback(self) -> None:
        """Enable rollback: every `read` must now be followed by `commit`.

        Raises:
            DrafterError: some layer's state cannot be rolled back.
        """
        if not self.cache.is_croppable:
            raise DrafterError(cannot_roll_back(self.target))
        self.recording = True
        # A sliding window keeps what it would have dropped until `commit`.
        self.cache.activate_past_recording()

    def read(
        self, tokens: Sequence[Int[Tensor, " n+1"]], parents: Sequence[Sequence[int]]
    ) -> list[States]:
        """Read, for each sequence, the newest token and the nodes of a tree after it.

        Raises:
            DrafterError: a tree branches, and the target cannot read it.
        """
        self.parents = [list(above) for above in parents]
        if len(tokens) == 1 and is_chain(self.parents[0]):
            return self._pass(tokens[0].unsqueeze(0))
        if not self.masked:
            self._allow_trees([self.cache])
        most, device = max(map(len, tokens)), tokens[0].device
        ids = torch.stack([torch.nn.functional.pad(row, (0, most - len(row))) for row in tokens])
        positions, masks = self._positions_and_masks(most, device)
        states = self._pass(
            ids,
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        )
        return [
            (hidden[: len(row)], features[: len(row)])
            for (hidden, features), row in zip(states, tokens, strict=True)
        ]

    def _positions_and_masks(
        self, most: int, device: torch.device
    ) -> tuple[Int[Tensor, "B N"], dict[str, Tensor]]:
        """Return the positions of `most` places of each sequence, and the mask of each kind of
        attention."""
        depths, sees = (
            part.to(device, non_blocking=True) for part in tree_positions(self.parents, most)
        )
        lengths = torch.tensor(self.lengths).to(device, non_blocking=True).unsqueeze(1)
        before = torch.arange(self.cache.get_seq_length(), device=device).expand(len(sees), -1)
        positions = lengths + depths
        mask = torch.cat([(before < lengths).unsqueeze(1).expand(-1, most, -1), sees], dim=2)
        masks = {}
        for kind in attention_kinds(self.target):
            within = mask
            if kind == "sliding_attention":
                keys = torch.cat([before, positions], dim=1).unsqueeze(1)
                distance = positions.unsqueeze(2) - keys
                within = mask & (distance < self.target.config.sliding_window)
            masks[kind] = _added(within, self.dtype)
        return positions, masks

    def inputs(self, ids: Int[Tensor, "B n"]) -> dict[str, Tensor]:
        """Return a pass's tokens as the model takes them."""
        return {"input_ids": ids}

    def after(self, row: int, path: Sequence[int]) -> Float[Tensor, "E K d"] | None:
        """Return the states of what the last pass put after the end of a path; see
        trainer.decoding.prompted_cache."""
        return None

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of each sequence's last pass, the newest token and these nodes, each the child of
        the one before. All others are rolled back."""
        if len(paths) == 1 and is_chain(self.parents[0]):
            refused = len(self.parents[0]) - len(paths[0])
            if self.recording or self.masked:
                self.cache.crop(-refused)
            self.lengths[0] += 1 + len(paths[0])
            return
        total = self.cache.get_seq_length()
        start = total - 1 - max(map(len, self.parents))
        if len(paths) == 1:
            self._commit_one(paths[0], start)
        else:
            self._commit_several(paths, start)
        self.cache.crop(max(self.lengths) - total)

    def _commit_one(self, path: Sequence[int], start: int) -> None:
        length = self.lengths[0]
        self.lengths[0] += 1 + len(path)
        # The newest token and the first nodes are in place already: one sequence has no padding.
        same = next((i for i, node in enumerate(path) if node != i), len(path))
        if same == len(path):
            return
        first, count = length + 1 + same, len(path) - same
        at = torch.tensor([start + 1 + node for node in path[same:]])
        layer: Any
        for layer in self.cache.layers:
            if layer.is_initialized:
                at = at.to(layer.keys.device, non_blocking=True)
                for entries in (layer.keys, layer.values):
                    entries.narrow(2, first, count).copy_(entries.index_select(2, at))

    def _commit_several(self, paths: Sequence[Sequence[int]], start: int) -> None:
        rows: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        for row, path in enumerate(paths):
            rows += [row] * (1 + len(path))
            sources += [start, *(start + 1 + node for node in path)]
            targets += range(self.lengths[row], self.lengths[row] + 1 + len(path))
            self.lengths[row] += 1 + len(path)
        at = torch.tensor([rows, sources, targets])
        layer: Any
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            row, source, target = at.to(layer.keys.device, non_blocking=True)
            for entries in (layer.keys, layer.values):
                entries[row, :, target] = entries[row, :, source]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop all sequences but these."""
        longest = self.cache.get_seq_length()
        self.lengths = [self.lengths[row] for row in rows]
        if self.masked:
            self.cache.batch_select_indices(torch.tensor(rows, device=self.output.weight.device))
            self.cache.crop(max(self.lengths) - longest)

    def _allow_trees(self, caches: Sequence[DynamicCache]) -> None:
        """Put all sequences into one cache, from which trees can be read."""
        if self.bare:
            raise DrafterError(_no_trees(self.target, "it takes no cache"))
        allow_trees(self.target)
        self.cache, self.masked = merge_caches(caches, self.target), True

    def _pass(self, ids: Int[Tensor, "B n"], **inputs: object) -> list[States]:
        reads = not self.target.gives_logits
        reading: contextlib.AbstractContextManager[Any] = (
            captured_hidden(self.output) if reads else contextlib.nullcontext([])
        )
        with (
            reading as captured,
            captured_layers(self.target.decoder, self.layers) as between,
        ):
            if self.bare:
                self.text = torch.cat([self.text, ids], dim=1)
                inputs |= {"input_ids": self.text}
            else:
                inputs |= self.inputs(ids) | {"use_cache": True}
                inputs |= model_with_cache(self.model, self.cache)
            out = self.model(**inputs)
        self.cache, count = cache_of(out, self.cache), ids.shape[1]
        hidden = (captured[0] if reads else out.logits)[:, -count:]
        self.dtype = hidden.dtype
        features = (
            torch.cat([layer[:, -count:] for layer in between], dim=-1)
            if between
            else hidden[..., :0]
        )
        return list(zip(hidden, features, strict=True))


def length_of(cache: DynamicCache, tokens: int) -> int:
    """Return how many tokens a cache has read. One of recurrent layers alone, as Mamba's, does not
    count them, and RWKV's is no cache; then it is `tokens`."""
    try:
        return cache.get_seq_length()
    except (ValueError, AttributeError):  # it has no layer of attention
        return tokens


def merge_caches(caches: Sequence[DynamicCache], target: Target) -> DynamicCache:
    """Return one cache of all sequences, padded at the end.

    Raises:
        DrafterError: a layer's state is not a key and a value for each token.
    """
    merged = roomy(DynamicCache())
    longest = max(cache.get_seq_length() for cache in caches)
    for i in range(len(caches[0].layers)):
        layers: list[Any] = [cache.layers[i] for cache in caches]
        if not all(layer.is_initialized for layer in layers):
            continue
        for layer, cache in zip(layers, caches, strict=True):
            if (
                type(layer) not in (RoomyLayer, DynamicLayer, DynamicSlidingWindowLayer)
                or layer.keys.shape[-2] != cache.get_seq_length()
            ):
                raise DrafterError(
                    _no_trees(
                        target,
                        f"its cache ({type(layer).__name__}) does not keep all tokens' entries",
                    )
                )
        keys, values = (
            torch.cat(
                [torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[-2])) for x in entries]
            )
            for entries in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        merged.update(keys, values, i)
    return merged


def attention_kinds(target: Target) -> list[str]:
    """Return the layers' kinds of attention, as transformers' `layer_types` calls them, each
    once."""
    if kinds := getattr(target.config, "layer_types", None):
        return sorted(set(kinds))
    sliding = getattr(target.config, "sliding_window", None)
    return ["sliding_attention" if sliding else "full_attention"]


def allow_trees(target: Target) -> None:
    """Raise DrafterError if the target cannot read trees and several sequences at once. It is tried
    on a few tokens, once."""
    if target in _reads_trees:
        return
    config = target.config
    if (attention := config._attn_implementation) not in ("sdpa", "eager", BLOCKED):
        raise DrafterError(
            _no_trees(
                target,
                f"attn_implementation={attention} takes no 4-D mask, as sdpa and eager do",
            )
        )
    if other := set(attention_kinds(target)) - _KINDS:
        raise DrafterError(
            _no_trees(target, f"it has layers of the kind {', '.join(sorted(other))}")
        )
    model = (
        target.model.get_base_model() if hasattr(target.model, "get_base_model") else target.model
    )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise DrafterError(_no_trees(target, "it takes no position_ids"))
    _reads_trees[target] = None
    try:
        _probe(target)
    except BaseException:
        del _reads_trees[target]
        raise


@torch.no_grad()
def _probe(target: Target) -> None:
    """Raise DrafterError unless the second of two siblings gives the target the same states as
    without the first."""
    was_training = target.model.training
    target.model.eval()
    try:
        weight = target.model.get_output_embeddings().weight
        # Not the first ids: those of untrained special tokens, whose rounding grows in every layer.
        ids = torch.arange(1, 7, device=weight.device) * (target.config.vocab_size // 7)
        plain, tree = TargetCache(target), TargetCache(target, whole=True)
        expected = plain.open([ids[:5]])[0][0][-1].float()
        tree.open([ids[:3]])
        try:
            state = tree.read([ids[[3, 5, 4]]], [[-1, -1]])[0][0][-1].float()
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise DrafterError(
                _no_trees(target, f"it does not take their masks ({error})")
            ) from None
    finally:
        target.model.train(was_training)
    half = weight.dtype in (torch.bfloat16, torch.float16)
    tolerance = 0.1 if half else 1e-3
    if not torch.allclose(
        state, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        raise DrafterError(_no_trees(target, "a token's siblings change what it computes"))


def cannot_roll_back(target: Target) -> str:
    return (
        f"{type(target.model).__name__} has {CANNOT_ROLL_BACK} by some tokens"
        " (a recurrence), which every refused draft needs. Decode it without its drafter:"
        " graft generate"
    )


def _no_trees(target: Target, why: str) -> str:
    return (
        f"{type(target.model).__name__} cannot verify trees, nor several sequences at once: {why}. "
        "Use tree=chain with batch_size=1, which needs neither"
    )


def _added(mask: Bool[Tensor, "B N S"], dtype: torch.dtype) -> Float[Tensor, "B 1 N S"]:
    """Return what is added to attention scores."""
    mask = mask.unsqueeze(1)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )
