"""Measurements for the search of a static tree (trees.search): a drafter's acceptance on some
texts, and the costs of this machine.

    texts         what the target writes greedily without a drafter, once, and its states at all
                  tokens, from one further pass
    ranks         a draft begins after each token of a text and follows the text: at each depth the
                  rank of the text's next token among the drafter's best ones, until the token is
                  not among the `width` best
    acceptance    how often each rank is right, by depth
    costs         seconds of the target's pass over 1 .. N tokens, and of growing a tree

Ranks are taken without a tree, so they favour none, and a draft begins at every token. In decoding
a draft begins where the last one ended, which depends on the tree. `replay` goes through a text as
decoding would, and returns the exact number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.decoding import profit
from trainer.decoding.clock import working
from trainer.decoding.drawing import Drawing
from trainer.decoding.speculative import generate
from trainer.decoding.target_cache import TargetCache
from trainer.decoding.trees import LONGEST, Levels, Path, search
from trainer.drafters import Drafter, DrafterError, Growth, Target, TargetUpdate
from trainer.speed.quick_passes import quick

# Tokens of a pass; costs between them are interpolated.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 15  # the shortest one counts

# For each newest token of a text, the ranks of the tokens that follow. The rank `width` means "not
# among the best", and is the last one.
Ranks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Text:
    """A prompt of `start` tokens and what the target wrote after it."""

    ids: Int[Tensor, " T"]
    start: int
    hidden: Float[Tensor, "T d"]  # what the output head reads
    features: Float[Tensor, "T f"]  # the states of `Drafter.layers`, concatenated

    def update(self, first: int, end: int) -> TargetUpdate:
        """Return the states at positions first .. end - 1."""
        ids = self.ids[first + 1 : end + 1]
        return TargetUpdate(
            self.hidden[first:end], self.features[first:end], ids, None if first else self.ids[0]
        )


@torch.no_grad()
def greedy_text(
    target: Target,
    drafter: Drafter,
    prompt: Int[Tensor, " n"],
    max_new_tokens: int,
    stops: Iterable[int],
) -> Text:
    """Let the target continue a prompt greedily."""
    tokens = generate(target, None, prompt, max_new_tokens, stops).tokens
    ids = torch.cat([prompt, torch.tensor(tokens, device=prompt.device)])
    hidden, features = TargetCache(target, drafter.layers).open([ids])[0]
    return Text(ids, len(prompt), hidden, features)


def refuse_own_trees(drafter: Drafter) -> None:
    """Raise DrafterError if the drafter builds its trees itself and takes no other."""
    if type(drafter).propose is not Drafter.propose:
        raise DrafterError(
            f"{type(drafter).__name__} builds its own trees: there is none to search. "
            "tree=search is for drafters that a run has trained, and for drafter=small"
        )


def can_branch(target: Target, drafter: Drafter, text: Text) -> bool:
    """Return whether a node may have several children."""
    return drafter.grow(drafter.start(target), target, text.update(0, text.start)).branches


@torch.no_grad()
def ranks(target: Target, drafter: Drafter, text: Text, width: int, depth: int) -> list[list[int]]:
    """Return the ranks of what follows each token of the text, 0 the best: at most `depth` of them,
    and no further than the end of the text."""
    memory, drafts, read = drafter.start(target), [], 0
    for newest in range(text.start, len(text.ids) - 1):
        growth = drafter.grow(memory, target, text.update(read, newest))
        following = text.ids[newest + 1 : newest + 1 + depth]
        drafts.append(list(_along(growth, following, width)))
        read = newest
    return drafts


def _along(growth: Growth, following: Int[Tensor, " m"], width: int) -> Iterator[int]:
    for depth, token in enumerate(following):
        if depth == growth.depth:
            yield width
            return
        if depth:
            parents = torch.tensor([depth - 2], device=following.device)
            logits = growth.extend(following[depth - 1 : depth], parents)[0]
        else:
            logits = growth.first()
        best = logits.topk(min(width, len(logits))).indices
        best = best if growth.vocabulary is None else growth.vocabulary[best]
        rank = next(iter((best == token).nonzero()[:, 0].tolist()), width)
        yield rank
        if rank == width:
            return


@torch.no_grad()
def observed(
    target: Target, drafter: Drafter, text: Text, depth: int
) -> list[list[tuple[float, bool]]]:
    """Return, for a greedy chain of at most `depth` tokens after each token of the text, the logit
    of each drafted token's predicted acceptance, and whether it and all before it are the text's.
    The last token that the drafter can draft is left out: nothing asks for its prediction."""
    memory, drafts, read = drafter.start(target), [], 0
    for newest in range(text.start, len(text.ids) - 1):
        growth = drafter.grow(memory, target, text.update(read, newest))
        following = text.ids[newest + 1 : newest + 1 + depth].tolist()
        logits, right, draft = growth.first(), True, []
        for k, token in enumerate(following[: growth.depth - 1]):
            q = logits.float().softmax(-1)
            best = q.argmax()
            known = best if growth.vocabulary is None else growth.vocabulary[best]
            logits = growth.extend(known[None], torch.tensor([k - 1], device=known.device))[0]
            own = q[best] if growth.confidence is None else growth.confidence[0]
            right = right and int(known) == token
            draft.append((profit.logit(float(own)), right))
        drafts.append(draft)
        read = newest
    return drafts


def acceptance(texts: Iterable[Ranks], width: int) -> list[list[float]]:
    """Return a table: of the drafts whose first d tokens were among the `width` best, entry [d][r]
    is how often the next token is the child of rank r. The table ends before the first depth that
    no draft reaches."""
    drafts = [draft for text in texts for draft in text]
    table: list[list[float]] = []
    while reached := [
        draft[len(table)]
        for draft in drafts
        if len(draft) > len(table) and max(draft[: len(table)], default=0) < width
    ]:
        table.append([reached.count(rank) / len(reached) for rank in range(width)])
    return table


def replay(texts: Iterable[Ranks], paths: Iterable[Path]) -> float:
    """Return the tokens per step of greedy decoding with a static tree on these texts, after each
    one's first token."""
    nodes = {tuple(path) for path in paths}
    tokens = steps = 0
    for text in texts:
        position = 0
        tokens += len(text)
        while position < len(text):
            draft, taken = text[position], 0
            while taken < len(draft) and tuple(draft[: taken + 1]) in nodes:
                taken += 1
            position += taken + 1
            steps += 1
    return tokens / steps if steps else 1.0


@torch.no_grad()
def time_verification(
    target: Target,
    context: Int[Tensor, " L"],
    widths: Sequence[int],
    repeats: int = REPEATS,
    trees: bool = True,
    layers: tuple[int, ...] = (),
) -> dict[str, dict[int, list[float]]]:
    """Measure seconds of passes over `widths` tokens after `context`, as a chain and, with `trees`,
    as siblings, in turns. A pass computes the target's states, reads its best tokens back, and
    rolls its cache back to the newest token.

    Raises:
        DrafterError: `trees` is True, and the target cannot read trees.
    """
    shapes: dict[str, Callable[[int], list[int]]] = {"chain": lambda n: list(range(-1, n - 2))}
    if trees:
        shapes["tree"] = lambda n: [-1] * (n - 1)
    with quick(target.model):
        return _timed_passes(target, context, widths, repeats, shapes, layers)


def _timed_passes(
    target: Target,
    context: Int[Tensor, " L"],
    widths: Sequence[int],
    repeats: int,
    shapes: Mapping[str, Callable[[int], list[int]]],
    layers: tuple[int, ...],
) -> dict[str, dict[int, list[float]]]:
    caches = {}
    for shape in shapes:
        caches[shape] = TargetCache(target, layers, whole=shape == "tree")
        caches[shape].open([context])
        caches[shape].start_rollback()
    tokens = context.repeat(1 + max(widths) // len(context))
    seconds: dict[str, dict[int, list[float]]] = {
        shape: {n: [] for n in widths} for shape in shapes
    }
    for repeat in range(-2, repeats):  # the first two warm up
        for shape, parents in shapes.items():
            cache = caches[shape]
            for n in widths:
                started = working(context.device)
                hidden, _ = cache.read([tokens[:n]], [parents(n)])[0]
                target.head(hidden).max(-1).indices.tolist()  # as decoding does
                cache.commit([[]])
                if repeat >= 0:
                    seconds[shape][n].append(working(context.device) - started)
                # The next pass reads the newest token again, so all passes have the same context.
                cache.cache.crop(-1)
                cache.lengths[0] -= 1
    return seconds


def least_seconds(
    passes: Mapping[str, Mapping[int, Sequence[float]]], most: int
) -> dict[str, list[float]]:
    """Return the least seconds of each shape's passes over the newest token and n further ones,
    n = 0 .. most, from `time_verification`.

    Other programs on the machine can only add time, and neither more tokens nor a tree's mask save
    any. So a pass that took longer than a larger one was disturbed, and gets the shorter time.
    """
    least: dict[str, list[float]] = {}
    bound: np.ndarray | float = float("inf")
    for shape in sorted(passes, reverse=True):  # trees, then chains
        widths = sorted(passes[shape])
        times = np.minimum.accumulate([min(passes[shape][n]) for n in reversed(widths)])[::-1]
        bound = np.minimum(np.interp(np.arange(1, most + 2), widths, times), bound)
        least[shape] = bound.tolist()
    return least


@torch.no_grad()
def time_drafting(
    target: Target,
    drafter: Drafter,
    text: Text,
    trees: Sequence[Sequence[Path]],
    repeats: int = REPEATS,
) -> list[float]:
    """Measure the least seconds that the drafter takes to read two tokens' states and grow each of
    the trees, in turns.

    Raises:
        DrafterError: the text is too short.
    """
    drawing, shapes = Drawing(target.config.vocab_size, LONGEST), [Levels(paths) for paths in trees]
    # The first two tokens warm up.
    repeats = min(repeats, (len(text.ids) - 1 - text.start) // 2 - 1)
    if repeats < 1:
        raise DrafterError(
            "the texts are too short to measure a drafter on: at least 5 new tokens are needed. Use"
            " other prompts"
        )
    memories = [drafter.start(target) for _ in shapes]
    for memory in memories:
        drafter.grow(memory, target, text.update(0, text.start))
    least = [float("inf")] * len(shapes)
    with quick(target.model, drafter):
        for repeat in range(1 + repeats):
            start = text.start + 2 * repeat
            for i, (shape, memory) in enumerate(zip(shapes, memories, strict=True)):
                started = working(text.ids.device)
                draft = drafter.propose(
                    memory, target, text.update(start, start + 2), partial(shape, drawing=drawing)
                )
                draft.tokens.tolist()
                if repeat:
                    least[i] = min(least[i], working(text.ids.device) - started)
    return least


@dataclass(frozen=True)
class Step:
    """A static tree and a step of decoding with it. Without paths it is plain decoding."""

    paths: list[Path]
    tokens: float  # from `replay`
    verify: float  # seconds
    draft: float

    @property
    def seconds(self) -> float:
        return self.verify + self.draft


def fastest_tree(
    texts: Sequence[Ranks],
    widths: Mapping[str, int],
    verify: Mapping[str, Sequence[float]],
    draft: Callable[[list[list[Path]]], Sequence[float]],
) -> Step:
    """Return the tree with the most tokens per second, or none if drafting does not pay.

    `widths` is the largest number of a node's children for each shape that `verify` has seconds of,
    for n = 0 .. N drafted tokens; `draft` measures the drafter's seconds for some trees. Depths are
    tried from 1 on, since each level costs the drafter a pass: the tree found for a depth shows
    what drafting to that depth costs, and the search is repeated with that cost.
    """
    plain = verify["chain"][0]
    tables = {shape: acceptance(texts, width) for shape, width in widths.items()}
    seconds = {
        (shape, depth): 0.0 for shape, table in tables.items() for depth in range(1, len(table) + 1)
    }
    best: dict[tuple[str, int], list[Path]] = {}
    for _ in range(2):
        best = {}
        for (shape, depth), cost in seconds.items():
            costs = [plain, *(passes + cost for passes in verify[shape][1:])]
            if paths := search(tables[shape][:depth], costs, partial(replay, texts)):
                best[shape, depth] = paths
        trees = list({tuple(paths): paths for paths in best.values()}.values())
        measured = draft(trees) if trees else []
        by_tree = {tuple(paths): spent for paths, spent in zip(trees, measured, strict=True)}
        seconds |= {key: by_tree[tuple(paths)] for key, paths in best.items()}
    steps = [Step([], 1.0, plain, 0.0)]
    steps += [
        Step(paths, replay(texts, paths), verify[key[0]][len(paths)], seconds[key])
        for key, paths in best.items()
    ]
    return max(steps, key=lambda step: step.tokens / step.seconds)
