"""What a target has read of one or several sequences, and how it reads a tree of further tokens in
one pass.

    a pass over n + 1 places (the newest token, then a tree's nodes) of a sequence of L tokens:
        position of a place  = L + its depth, 0 for the newest token
        a place sees         the L tokens before, its ancestors and itself; of those no further back than a sliding window reaches
    then the entries of the places that are kept move behind the L tokens, in order, and all others
    are dropped

A chain of one sequence needs none of it: it is read as any text, and its end is taken back. So
chains work with every model whose cache can be cropped. Trees, and several sequences, are read with
4-D masks (1 or B, 1, N, L + N), which need attention that takes them, and caches that keep all
entries, those behind a sliding window too.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trainer.drafters import DrafterError, Target
from trainer.models.heads import captured_hidden, captured_layers
from trainer.speed.fused import BLOCKED

States = tuple[
    Float[Tensor, "n d"], Float[Tensor, "n f"]
]  # what the output head reads, and further layers' states side by side

_KINDS = {"full_attention", "sliding_attention"}
# targets that read trees
_tried: weakref.WeakKeyDictionary[Target, None] = weakref.WeakKeyDictionary()


class Texts:
    """Sequences, as far as the target has read them. With `whole` the cache keeps all entries, so
    that trees can be read.

    Raises:
        DrafterError: where several sequences or a tree are asked for, the target's layers or
        attention do not allow it. The message
            says what does.
    """

    def __init__(self, target: Target, layers: tuple[int, ...] = (), whole: bool = False):
        self.target, self.layers, self.whole = target, layers, whole
        self.output = target.model.get_output_embeddings()
        self.model = target.model
        self.cache = DynamicCache() if whole else DynamicCache(config=target.config)
        self.lengths: list[int] = []  # L of each sequence, virtual tokens included
        self.parents: list[list[int]] = []  # of the last pass
        self.recording = self.masked = False

    def open(self, prompts: Sequence[Int[Tensor, " n"]]) -> list[States]:
        """Read the sequences' first tokens, one after another."""
        found: list[States] = []
        caches: list[DynamicCache] = []
        for ids in prompts:
            self.model = self.target.model
            if caches:
                self.cache = DynamicCache()
            found += self._pass(ids.unsqueeze(0))
            caches.append(self.cache)
            peft = getattr(self.model, "active_peft_config", None)
            if peft is not None and peft.is_prompt_learning:
                # virtual tokens stand before the first ones only
                self.model = self.model.get_base_model()
        self.lengths = [cache.get_seq_length() for cache in caches]
        if len(prompts) > 1:
            self._mask(caches)
        return found

    def may_forget(self) -> None:
        """From here on `keep` follows each `read`.

        Raises:
            DrafterError: some layer's state has no way back.
        """
        if not self.cache.is_croppable:
            raise DrafterError(no_way_back(self.target))
        self.recording = True
        # a sliding window keeps what it would have dropped until `keep`
        self.cache.activate_past_recording()

    def read(
        self, tokens: Sequence[Int[Tensor, " n+1"]], parents: Sequence[Sequence[int]]
    ) -> list[States]:
        """For each sequence the newest token and the nodes of a tree after it.

        Raises:
            DrafterError: a tree branches, and the target cannot read it.
        """
        self.parents = [list(above) for above in parents]
        if len(tokens) == 1 and is_chain(self.parents[0]):
            return self._pass(tokens[0].unsqueeze(0))
        if not self.masked:
            self._mask([self.cache])
        most, device = max(map(len, tokens)), tokens[0].device
        ids = torch.stack([torch.nn.functional.pad(one, (0, most - len(one))) for one in tokens])
        depths, sees = (part.to(device, non_blocking=True) for part in places(self.parents, most))
        lengths = torch.tensor(self.lengths).to(device, non_blocking=True).unsqueeze(1)
        before = torch.arange(self.cache.get_seq_length(), device=device).expand(len(tokens), -1)
        positions = lengths + depths
        mask = torch.cat([(before < lengths).unsqueeze(1).expand(-1, most, -1), sees], dim=2)
        masks = {}
        for kind in attention_kinds(self.target):
            near = mask
            if kind == "sliding_attention":
                distance = positions.unsqueeze(2) - torch.cat([before, positions], dim=1).unsqueeze(
                    1
                )
                near = mask & (distance < self.target.config.sliding_window)
            masks[kind] = _added(near, self.dtype)
        found = self._pass(
            ids,
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        )
        return [
            (hidden[: len(one)], features[: len(one)])
            for (hidden, features), one in zip(found, tokens, strict=True)
        ]

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Of each sequence's last pass, its newest token and these nodes, each the child of the one
        before; all others are unread."""
        if len(paths) == 1 and is_chain(self.parents[0]):
            refused = len(self.parents[0]) - len(paths[0])
            if self.recording or self.masked:
                self.cache.crop(-refused)
            self.lengths[0] += 1 + len(paths[0])
            return
        total = self.cache.get_seq_length()
        start = total - 1 - max(map(len, self.parents))
        if len(paths) == 1:
            self._keep_one(paths[0], start)
        else:
            self._keep_several(paths, start)
        self.cache.crop(max(self.lengths) - total)

    def _keep_one(self, path: Sequence[int], start: int) -> None:
        length = self.lengths[0]
        self.lengths[0] += 1 + len(path)
        # so many are where they belong
        same = next((i for i, node in enumerate(path) if node != i), len(path))
        if same == len(path):
            return  # the newest token always is, as there is no padding
        first, count = length + 1 + same, len(path) - same
        at = torch.tensor([start + 1 + node for node in path[same:]])
        layer: Any
        for layer in self.cache.layers:
            if layer.is_initialized:
                at = at.to(layer.keys.device, non_blocking=True)
                for entries in (layer.keys, layer.values):
                    entries.narrow(2, first, count).copy_(entries.index_select(2, at))

    def _keep_several(self, paths: Sequence[Sequence[int]], start: int) -> None:
        rows: list[int] = []
        places_from: list[int] = []
        places_to: list[int] = []
        for row, path in enumerate(paths):
            rows += [row] * (1 + len(path))
            places_from += [start, *(start + 1 + node for node in path)]
            places_to += range(self.lengths[row], self.lengths[row] + 1 + len(path))
            self.lengths[row] += 1 + len(path)
        at = torch.tensor([rows, places_from, places_to])
        layer: Any
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            row, source, goal = at.to(layer.keys.device, non_blocking=True)
            for entries in (layer.keys, layer.values):
                entries[row, :, goal] = entries[row, :, source]

    def only(self, rows: Sequence[int]) -> None:
        """Go on with these sequences."""
        longest = self.cache.get_seq_length()
        self.lengths = [self.lengths[row] for row in rows]
        if self.masked:
            self.cache.batch_select_indices(torch.tensor(rows, device=self.output.weight.device))
            self.cache.crop(max(self.lengths) - longest)

    def _mask(self, caches: Sequence[DynamicCache]) -> None:
        """From here on what is read may be trees, and all sequences are in one cache."""
        allow_trees(self.target)
        self.cache, self.masked = merged(caches, self.target), True

    def _pass(self, ids: Int[Tensor, "B n"], **where: object) -> list[States]:
        with (
            captured_hidden(self.output) as kept,
            captured_layers(self.target.decoder, self.layers) as between,
        ):
            self.cache = self.model(
                input_ids=ids, past_key_values=self.cache, use_cache=True, **where
            ).past_key_values
        hidden, count = kept[0][:, -ids.shape[1] :], ids.shape[1]
        self.dtype = hidden.dtype
        features = (
            torch.cat([layer[:, -count:] for layer in between], dim=-1)
            if between
            else hidden[..., :0]
        )
        return list(zip(hidden, features, strict=True))


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each node follows the one before."""
    return all(parent == node - 1 for node, parent in enumerate(parents))


def places(
    trees: Sequence[Sequence[int]], most: int
) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N N"]]:
    """(depths, who sees whom) of the newest token, N = `most` - 1 nodes and, in shorter trees,
    fillers that see themselves."""
    depths = [[0] * most for _ in trees]
    sees = [[[place == other for other in range(most)] for place in range(most)] for _ in trees]
    for depth, seen, parents in zip(depths, sees, trees, strict=True):
        for node, parent in enumerate(parents, 1):
            depth[node] = depth[parent + 1] + 1
            seen[node] = [*seen[parent + 1][:node], True, *seen[node][node + 1 :]]
    return torch.tensor(depths), torch.tensor(sees)


def merged(caches: Sequence[DynamicCache], target: Target) -> DynamicCache:
    """One cache of all sequences, each from its first place on, padded behind.

    Raises:
        DrafterError: a layer's state is not a key and a value for each token.
    """
    whole = DynamicCache()
    longest = max(cache.get_seq_length() for cache in caches)
    for i in range(len(caches[0].layers)):
        layers: list[Any] = [cache.layers[i] for cache in caches]
        if not all(layer.is_initialized for layer in layers):
            continue
        for layer, cache in zip(layers, caches, strict=True):
            if (
                type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
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
                [torch.nn.functional.pad(one, (0, 0, 0, longest - one.shape[-2])) for one in kind]
            )
            for kind in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        whole.update(keys, values, i)
    return whole


def attention_kinds(target: Target) -> list[str]:
    """The kinds of attention of the layers, as transformers' `layer_types` calls them, each
    once."""
    config = target.config
    found = getattr(config, "layer_types", None)
    return (
        sorted(set(found))
        if found
        else ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    )


def allow_trees(target: Target) -> None:
    """Raise DrafterError where the target cannot read trees, nor several sequences at once. It is
    tried on a few tokens, once."""
    if target in _tried:
        return
    config = target.config
    if (attention := config._attn_implementation) not in ("sdpa", "eager", BLOCKED):
        raise DrafterError(
            _no_trees(
                target,
                f"attn_implementation={attention} takes no mask of one's own, as sdpa and eager do",
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
    _tried[target] = None
    try:
        _probe(target)
    except BaseException:
        del _tried[target]
        raise


@torch.no_grad()
def _probe(target: Target) -> None:
    """Raise DrafterError unless the second of two children is to the target what it is without the
    first."""
    was_training = target.model.training
    target.model.eval()
    try:
        weight = target.model.get_output_embeddings().weight
        # Not the first ids: those of untrained special tokens, whose rounding grows in every layer.
        ids = torch.arange(1, 7, device=weight.device) * (target.config.vocab_size // 7)
        plain, tree = Texts(target), Texts(target, whole=True)
        wanted = plain.open([ids[:5]])[0][0][-1].float()
        tree.open([ids[:3]])
        try:
            found = tree.read([ids[[3, 5, 4]]], [[-1, -1]])[0][0][-1].float()
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise DrafterError(
                _no_trees(target, f"it does not take their masks ({error})")
            ) from None
    finally:
        target.model.train(was_training)
    half = weight.dtype in (torch.bfloat16, torch.float16)
    if not torch.allclose(
        found,
        wanted,
        rtol=0.1 if half else 1e-3,
        atol=(0.1 if half else 1e-3) * float(wanted.abs().max()),
    ):
        raise DrafterError(_no_trees(target, "a token does not stay apart from its sibling there"))


def no_way_back(target: Target) -> str:
    return (
        f"{type(target.model).__name__} has layers whose state cannot be taken back by some tokens"
        " (a recurrence), which every refused draft asks for. Decode it without its drafter:"
        " python -m trainer.generate"
    )


def _no_trees(target: Target, why: str) -> str:
    return (
        f"{type(target.model).__name__} cannot verify trees, nor several sequences at once: {why}. "
        "Use tree=chain with batch_size=1, which asks for nothing of the kind"
    )


def _added(mask: Bool[Tensor, "B N S"], dtype: torch.dtype) -> Float[Tensor, "B 1 N S"]:
    """What is added to attention scores."""
    there = mask.unsqueeze(1)
    return torch.zeros(there.shape, dtype=dtype, device=mask.device).masked_fill(
        ~there, torch.finfo(dtype).min
    )
