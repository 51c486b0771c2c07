"""What the search for a static tree (trees.search) is given, measured: a drafter's acceptance on
some texts, and this machine's costs.

    texts         what the target writes greedily, once and without a draft, and its states there in one further pass
    ranks         a draft begins after each token of a text and grows along the text itself: at each depth the rank of the text's next
                  token among the drafter's best ones, until it is not among the `width` best
    acceptance    of these, by depth and rank
    costs         seconds of the target's pass over 1 .. N tokens, and of the drafter's growing a tree

No tree is there while ranks are taken, so that they favour none, and drafts begin everywhere alike.
Decoding begins them where the last one ended, which depends on the tree: `replay` goes through a
text as decoding would, and gives the steps that it would take, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.decoding.speculative import generate, now
from trainer.decoding.texts import Texts
from trainer.decoding.trees import LONGEST, Drawing, Levels, Path, search
from trainer.drafters import Drafter, DrafterError, Growth, News, Target

# tokens of a pass; between them costs are taken as linear
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 15  # of which the least counts

# Of a text, for each newest token, the ranks of what follows; `width` says that it is not among
# them, and is the last.
Ranks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Text:
    """A prompt of `start` tokens and what the target wrote after it."""

    ids: Int[Tensor, " T"]
    start: int
    hidden: Float[Tensor, "T d"]  # what the output head reads
    features: Float[Tensor, "T f"]  # the states of `Drafter.layers`, side by side

    def news(self, first: int, end: int) -> News:
        """The states at positions first .. end - 1."""
        ids = self.ids[first + 1 : end + 1]
        return News(
            self.hidden[first:end], self.features[first:end], ids, None if first else self.ids[0]
        )


@torch.no_grad()
def written(
    target: Target,
    drafter: Drafter,
    prompt: Int[Tensor, " n"],
    max_new_tokens: int,
    stops: Iterable[int],
) -> Text:
    """The target's own greedy text."""
    said = generate(target, None, prompt, max_new_tokens, stops).tokens
    ids = torch.cat([prompt, torch.tensor(said, device=prompt.device)])
    hidden, features = Texts(target, drafter.layers).open([ids])[0]
    return Text(ids, len(prompt), hidden, features)


def growing(drafter: Drafter) -> None:
    """Raise DrafterError where the drafter makes trees of its own, and takes none that is
    searched."""
    if type(drafter).propose is not Drafter.propose:
        raise DrafterError(
            f"{type(drafter).__name__} makes trees of its own: there is none to search. "
            "tree=search is for drafters that a run has trained, and for drafter=small"
        )


def branching(target: Target, drafter: Drafter, text: Text) -> bool:
    """Whether a node may have several children."""
    return drafter.grow(drafter.start(target), target, text.news(0, text.start)).branches


@torch.no_grad()
def ranks(target: Target, drafter: Drafter, text: Text, width: int, depth: int) -> list[list[int]]:
    """Of the text after each of its newest tokens the ranks, 0 the best, up to `depth` of them and
    no further than the text goes."""
    memory, found, read = drafter.start(target), [], 0
    for newest in range(text.start, len(text.ids) - 1):
        growth = drafter.grow(memory, target, text.news(read, newest))
        found.append(list(_along(growth, text.ids[newest + 1 : newest + 1 + depth], width)))
        read = newest
    return found


def _along(growth: Growth, following: Int[Tensor, " m"], width: int) -> Iterator[int]:
    for depth, token in enumerate(following):
        if depth == growth.depth:
            yield width
            return
        if depth:
            parents = torch.tensor([depth - 2], device=following.device)
            logits = growth.below(following[depth - 1 : depth], parents)[0]
        else:
            logits = growth.first()
        best = logits.topk(min(width, len(logits))).indices
        best = best if growth.vocabulary is None else growth.vocabulary[best]
        rank = next(iter((best == token).nonzero()[:, 0].tolist()), width)
        yield rank
        if rank == width:
            return


def acceptance(found: Iterable[Ranks], width: int) -> list[list[float]]:
    """acceptance[d][r]: of the places of the texts where the tokens of d depths were among the
    `width` best of each, how often the next one is the child of rank r. It ends before the first
    depth that no text comes to."""
    places = [place for text in found for place in text]
    table: list[list[float]] = []
    while at := [
        p[len(table)]
        for p in places
        if len(p) > len(table) and max(p[: len(table)], default=0) < width
    ]:
        table.append([at.count(rank) / len(at) for rank in range(width)])
    return table


def replay(found: Iterable[Ranks], paths: Iterable[Path]) -> float:
    """Tokens of a step of greedy decoding with a static tree on these texts, after each one's first
    token."""
    nodes = {tuple(path) for path in paths}
    tokens = steps = 0
    for text in found:
        place = 0
        tokens += len(text)
        while place < len(text):
            taken = 0
            while taken < len(text[place]) and tuple(text[place][: taken + 1]) in nodes:
                taken += 1
            place += taken + 1
            steps += 1
    return tokens / steps if steps else 1.0


@torch.no_grad()
def verifying(
    target: Target,
    context: Int[Tensor, " L"],
    widths: Sequence[int],
    repeats: int = REPEATS,
    trees: bool = True,
    layers: tuple[int, ...] = (),
) -> dict[str, dict[int, list[float]]]:
    """Seconds of passes over so many tokens after `context`, as a chain and, with `trees`, as
    siblings, all in turns: the target's states, its best tokens read back, and its cache brought
    back to the newest one.

    Raises:
        DrafterError: the target cannot read trees, and they are asked for.
    """
    shapes: dict[str, Callable[[int], list[int]]] = {"chain": lambda n: list(range(-1, n - 2))}
    if trees:
        shapes["tree"] = lambda n: [-1] * (n - 1)
    texts = {}
    for shape in shapes:
        texts[shape] = Texts(target, layers, whole=shape == "tree")
        texts[shape].open([context])
        texts[shape].may_forget()
    tokens = context.repeat(1 + max(widths) // len(context))
    took: dict[str, dict[int, list[float]]] = {shape: {n: [] for n in widths} for shape in shapes}
    for repeat in range(-2, repeats):  # the first two warm up
        for shape, parents in shapes.items():
            text = texts[shape]
            for n in widths:
                started = now(context.device)
                hidden, _ = text.read([tokens[:n]], [parents(n)])[0]
                target.head(hidden).argmax(-1).tolist()
                text.keep([[]])
                if repeat >= 0:
                    took[shape][n].append(now(context.device) - started)
                # The newest token is read anew by the next pass, so that all passes come after the
                # same context.
                text.cache.crop(-1)
                text.lengths[0] -= 1
    return took


def least(passes: Mapping[str, Mapping[int, Sequence[float]]], most: int) -> dict[str, list[float]]:
    """Of what `verifying` gives, the least seconds of each shape's passes over the newest token and
    n further ones, n = 0 .. most.

    What else runs on the machine only adds time, and neither more tokens nor a tree's mask take
    less: where they did, the longer time is not a pass's own.
    """
    found: dict[str, list[float]] = {}
    below: np.ndarray | float = float("inf")
    for shape in sorted(passes, reverse=True):  # trees, then chains
        widths = sorted(passes[shape])
        times = np.minimum.accumulate([min(passes[shape][n]) for n in reversed(widths)])[::-1]
        below = np.minimum(np.interp(np.arange(1, most + 2), widths, times), below)
        found[shape] = below.tolist()
    return found


@torch.no_grad()
def drafting(
    target: Target,
    drafter: Drafter,
    text: Text,
    trees: Sequence[Sequence[Path]],
    repeats: int = REPEATS,
) -> list[float]:
    """The least seconds that the drafter takes to read two tokens' states and grow each of the
    trees, in turns.

    Raises:
        DrafterError: the text is too short.
    """
    drawing, shapes = Drawing(target.config.vocab_size, LONGEST), [Levels(paths) for paths in trees]
    # the first two tokens warm up
    repeats = min(repeats, (len(text.ids) - 1 - text.start) // 2 - 1)
    if repeats < 1:
        raise DrafterError(
            "the texts are too short to measure a drafter on, which asks for 5 new tokens: give"
            " other prompts"
        )
    memories = [drafter.start(target) for _ in shapes]
    for memory in memories:
        drafter.grow(memory, target, text.news(0, text.start))
    least = [float("inf")] * len(shapes)
    for repeat in range(1 + repeats):
        start = text.start + 2 * repeat
        for i, (shape, memory) in enumerate(zip(shapes, memories, strict=True)):
            started = now(text.ids.device)
            draft = drafter.propose(
                memory,
                target,
                text.news(start, start + 2),
                lambda growth, one=shape: one(growth, drawing),
            )  # type: ignore[misc]
            draft.tokens.tolist()
            if repeat:
                least[i] = min(least[i], now(text.ids.device) - started)
    return least


@dataclass(frozen=True)
class Step:
    """A static tree, and a step of decoding with it; without paths it is plain decoding."""

    paths: list[Path]
    tokens: float  # `replay`ed
    verify: float  # seconds
    draft: float

    @property
    def seconds(self) -> float:
        return self.verify + self.draft


def fastest(
    found: Sequence[Ranks],
    widths: Mapping[str, int],
    verify: Mapping[str, Sequence[float]],
    draft: Callable[[list[list[Path]]], Sequence[float]],
) -> Step:
    """The tree of the most tokens a second, or none where drafting does not pay.

    `widths` says how many children a node may have in each of the shapes that `verify` has seconds
    of, for n = 0 .. N drafted tokens; `draft` gives the drafter's seconds for some trees. How deep
    a tree may be is tried from 1 on, as each level costs the drafter a pass: the tree searched for
    a depth tells what drafting to it costs, and is searched again with that.
    """
    plain = verify["chain"][0]
    tables = {shape: acceptance(found, width) for shape, width in widths.items()}
    seconds = {
        (shape, depth): 0.0 for shape, table in tables.items() for depth in range(1, len(table) + 1)
    }
    tried: dict[tuple[str, int], list[Path]] = {}
    for _ in range(2):
        tried = {
            (shape, depth): paths
            for (shape, depth), more in seconds.items()
            if (
                paths := search(
                    tables[shape][:depth],
                    [plain, *(one + more for one in verify[shape][1:])],
                    partial(replay, found),
                )
            )
        }
        trees = list({tuple(paths): paths for paths in tried.values()}.values())
        took = (
            {tuple(paths): spent for paths, spent in zip(trees, draft(trees), strict=True)}
            if trees
            else {}
        )
        seconds |= {key: took[tuple(paths)] for key, paths in tried.items()}
    steps = [Step([], 1.0, plain, 0.0)]
    steps += [
        Step(paths, replay(found, paths), verify[key[0]][len(paths)], seconds[key])
        for key, paths in tried.items()
    ]
    return max(steps, key=lambda step: step.tokens / step.seconds)
