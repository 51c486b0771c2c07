"""Which tokens to verify next: trees grown from a drafter's distributions
(trainer.drafters.Growth).

    shape           a Growth, and a Drawing that says how its logits become nodes  ->  a Draft
    levels(paths)   a tree of a fixed form: node (0, 2) is the third child of the first child of the newest token; `chain` is one
    eagle2(..)      the `size` nodes of the largest product of draft probabilities, of those below the `top_k` best of each level
    dyspec(..)      the same with nothing left out

A policy ends a tree early. It is asked before each level but the first and sees only what was drawn
above it, so that what is written stays distributed as the target's: the tokens of a level are drawn
after the decision that there is one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.drafters import Draft, DrafterError, Growth

Chances = Callable[[Float[Tensor, "n v"]], Float[Tensor, "n v"]]  # logits to probabilities
Path = tuple[int, ...]

LONGEST = 32  # levels, where nothing else limits them

# EAGLE-1's tree (its reference's choices.py), 25 nodes in 5 levels.
EAGLE1: tuple[Path, ...] = (
    (0,),
    (1,),
    (2,),
    (3,),
    (0, 0),
    (0, 1),
    (0, 2),
    (1, 0),
    (1, 1),
    (2, 0),
    (2, 1),
    (3, 0),
    (0, 0, 0),
    (0, 0, 1),
    (0, 0, 2),
    (0, 1, 0),
    (0, 1, 1),
    (0, 2, 0),
    (0, 2, 1),
    (1, 0, 0),
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 0, 2),
    (0, 0, 0, 0, 0),
    (0, 0, 0, 0, 1),
)


@dataclass(frozen=True)
class Drawing:
    """How logits become nodes: drawn from `chances` of them, or without it the best ones. No node
    is deeper than `limit`."""

    size: int  # V, the target's
    limit: int
    chances: Chances | None = None
    generator: torch.Generator | None = None


class Shape(Protocol):
    """A way to grow trees; `branches` where a node may have several children."""

    branches: bool

    def __call__(self, growth: Growth, drawing: Drawing) -> Draft: ...


class Policy(Protocol):
    """Whether to go on by one more level."""

    def __call__(self, top: Callable[[], float], alive: Callable[[], float]) -> bool:
        """`top`: the largest probability of any token of that level, given its parent. `alive`: of
        all paths drawn, the largest chance that every token of it is taken, by the drafter's
        `confidence` or, without, by its own probabilities of them."""


def confident(threshold: float) -> Policy:
    """Go on while the next level's best token has at least that probability (Kangaroo, arXiv
    2404.18911, section 3.2: 0.6)."""
    return lambda top, alive: top() >= threshold


def hopeful(threshold: float) -> Policy:
    """Go on while the chance of a refusal, 1 - Π of the predicted acceptances, is at most
    `threshold` (SpecDec++, arXiv 2405.19715, section 3: 0.3 to 0.9). Of a drafter that predicts
    none the draft's own probability of its token stands for it."""
    return lambda top, alive: 1 - alive() <= threshold


class Levels:
    """A tree of a fixed form, given by its nodes' paths, level by level.

    Where a `Drawing` has chances and not `best`, the i-th child is the i-th draw, without
    replacement or, with `replaced`, with it; else it is the child of rank i. Tokens without any
    chance, of a draft vocabulary or after top-k and top-p, are drawn after all others, and
    verification never takes them.

    Raises:
        DrafterError: a node's parent is missing, a path is there twice; at a call, the drafter does
        not branch and the tree does, or a
            rank is beyond the drafter's vocabulary.
    """

    def __init__(
        self,
        paths: Sequence[Sequence[int]],
        policy: Policy | None = None,
        replaced: bool = False,
        best: bool = False,
    ):
        nodes = {tuple(path) for path in paths}
        if (
            not nodes
            or len(nodes) != len(paths)
            or any(rank < 0 for path in nodes for rank in path)
            or () in nodes
        ):
            raise DrafterError(
                "a tree is given by the paths of its nodes, each once, as [[0], [1], [0, 0]]: ranks"
                " count from 0"
            )
        if lone := sorted(path for path in nodes if len(path) > 1 and path[:-1] not in nodes):
            raise DrafterError(
                f"the tree's node {list(lone[0])} has no parent: add {list(lone[0][:-1])}"
            )
        self.policy, self.replaced, self.best = policy, replaced, best
        self.branches = len({path[:-1] for path in nodes}) < len(nodes)
        depth = max(map(len, nodes))
        self.levels = [
            sorted(path for path in nodes if len(path) == level) for level in range(1, depth + 1)
        ]

    def __call__(self, growth: Growth, drawing: Drawing) -> Draft:
        if self.branches and not growth.branches:
            raise DrafterError(
                "this drafter drafts one token after another, and the tree branches: use tree=chain"
            )
        depth = min(len(self.levels), growth.depth, drawing.limit)
        if depth < 1:
            return nothing()
        drawn = _Drawn(drawing, growth.vocabulary)
        logits = growth.first().unsqueeze(0)
        above: list[Path] = [()]  # the nodes that the rows of `logits` stand for
        added: dict[Path, int] = {(): -1}  # numbers in the growth
        alive: Float[Tensor, " m"] = logits.new_ones(1, dtype=torch.float32)
        number: dict[Path, int] = {(): -1}
        parents: list[int] = []
        for level, paths in enumerate(self.levels[:depth], 1):
            last = level == depth
            width = max(path[-1] for path in paths) + 1
            tokens = drawn.children(logits, width, self.best, self.replaced)  # (rows, width)
            rows = torch.tensor([above.index(path[:-1]) for path in paths])
            on = rows.to(tokens.device)
            nodes = tokens[on, torch.tensor([path[-1] for path in paths], device=tokens.device)]
            drawn.add(nodes, rows, len(above))
            parents += [number[path[:-1]] for path in paths]
            number |= {path: len(number) - 1 + i for i, path in enumerate(paths)}
            inner = set() if last else {path[:-1] for path in self.levels[level]}
            if not inner:
                break
            kept = [i for i, path in enumerate(paths) if path in inner]
            at = torch.tensor(kept, device=tokens.device)
            places, logits_above = on[at], logits
            logits = growth.below(
                drawn.ids(nodes[at]),
                torch.tensor([added[paths[i][:-1]] for i in kept], device=tokens.device),
            )
            above = [paths[i] for i in kept]
            added |= {path: len(added) - 1 + i for i, path in enumerate(above)}
            if self.policy is not None:
                own = growth.confidence
                if own is None:
                    own = logits_above.float().softmax(-1)[places, nodes[at]]
                alive = alive[places] * own
                # Only the chances of nodes that have children are kept; `places` counts in the rows
                # of the level before.
                if not self.policy(_largest(logits.float().softmax(-1)), _largest(alive)):
                    break
        return drawn.draft(parents, self.replaced and not self.best)


def chain(count: int, policy: Policy | None = None, best: bool = False) -> Levels:
    """One token after another, up to `count` of them.

    Raises:
        DrafterError: there is less than one.
    """
    return Levels([(0,) * length for length in range(1, count + 1)], policy, best=best)


class Best:
    """The `size` nodes of the largest product of draft probabilities, chosen without chance.

    Each level is grown below the `top_k` likeliest nodes of the one before (EAGLE-2, arXiv
    2406.16858, section 4), or with top_k=None below all that are among the `size` likeliest so far,
    which is greedy growth by estimated acceptance, node by node (DySpec, arXiv 2410.11744), in as
    many calls as there are levels.
    """

    branches = True

    def __init__(self, size: int, depth: int, top_k: int | None, policy: Policy | None = None):
        self.size, self.depth, self.top_k, self.policy = size, depth, top_k, policy

    def __call__(self, growth: Growth, drawing: Drawing) -> Draft:
        if not growth.branches:
            raise DrafterError(
                "this drafter drafts one token after another, and this tree branches: use"
                " tree=chain"
            )
        depth = min(self.depth, growth.depth, drawing.limit)
        if depth < 1:
            return nothing()
        drawn = _Drawn(drawing, growth.vocabulary)
        wide = self.size if self.top_k is None else self.top_k
        logits = growth.first().unsqueeze(0)
        device = logits.device
        # log-probabilities of the nodes that the rows of `logits` stand for
        above = torch.zeros(1, device=device)
        alive = torch.ones(1, device=device)
        in_pool = in_growth = torch.full((1,), -1, device=device)
        scores, tokens, parents, added = above[:0], in_pool[:0], in_pool[:0], 0
        for level in range(1, depth + 1):
            chances = logits.float().log_softmax(-1)
            children = chances.topk(min(wide, chances.shape[-1]), dim=-1)
            found = (above.unsqueeze(1) + children.values).flatten()
            rows = torch.arange(len(above), device=device).repeat_interleave(
                children.values.shape[1]
            )
            start = len(scores)
            scores, tokens = (
                torch.cat([scores, found]),
                torch.cat([tokens, children.indices.flatten()]),
            )
            parents = torch.cat([parents, in_pool[rows]])
            if level == depth:
                break
            order = found.sort(descending=True, stable=True).indices[:wide]
            if self.top_k is None and len(scores) > self.size:
                least = scores.topk(self.size).values[-1]
                order = order[: int((found >= least).sum())]
                if not len(order):
                    break
            next_logits = growth.below(drawn.ids(tokens[start + order]), in_growth[rows[order]])
            if self.policy is not None:
                own = growth.confidence
                alive = alive[rows[order]] * (
                    children.values.flatten()[order].exp() if own is None else own
                )
                if not self.policy(_largest(next_logits.float().softmax(-1)), _largest(alive)):
                    break
            logits, above, in_pool = next_logits, found[order], start + order
            in_growth = added + torch.arange(len(order), device=device)
            added += len(order)
        # Of equal ones those first drawn: a parent stands before its children, so that it is always
        # with them.
        kept = scores.sort(descending=True, stable=True).indices[: self.size].sort().values
        # the last for the newest token, which is -1
        numbers = torch.full((len(scores) + 1,), -1, device=device)
        numbers[kept] = torch.arange(len(kept), device=device)
        drawn.add(tokens[kept], None, 0)
        return drawn.draft(numbers[parents[kept]].tolist(), False)


def eagle2(top_k: int, depth: int, size: int, policy: Policy | None = None) -> Best:
    """EAGLE-2's dynamic tree; its reference has top_k=10, depth=8 (a first level and 7 more) and
    size=59."""
    return Best(size, depth, top_k, policy)


def dyspec(size: int, depth: int = LONGEST, policy: Policy | None = None) -> Best:
    """DySpec's tree, whose depth is what the drafter and `depth` allow."""
    return Best(size, depth, None, policy)


def search(
    acceptance: Sequence[Sequence[float]],
    cost: Sequence[float],
    tokens: Callable[[Sequence[Path]], float] | None = None,
) -> list[Path]:
    """The fixed tree of the most tokens for its cost.

    `acceptance[d][r]` is how often the child of rank r is right below a right node of depth d;
    cost[n] is what it takes, in any unit, to draft and verify n tokens beside the newest one, n = 0
    .. N. Nodes are added by their chance of being reached, at most N of them (Medusa, arXiv
    2401.10774, section 2.3.3); of these trees the one with the largest (1 + Σ chances) / cost is
    given, which may be empty: then drafting does not pay. `tokens` says what a tree gives where
    that is known better than by Σ chances.
    """
    nodes: list[Path] = []
    waiting: list[tuple[float, Path]] = [
        (-chance, (rank,)) for rank, chance in enumerate(acceptance[0])
    ]
    heapq.heapify(waiting)
    expected, best, size = 1.0, 1.0 / cost[0], 0
    while waiting and len(nodes) + 1 < len(cost):
        chance, path = heapq.heappop(waiting)
        nodes.append(path)
        expected -= chance
        if (rate := (expected if tokens is None else tokens(nodes)) / cost[len(nodes)]) > best:
            best, size = rate, len(nodes)
        if len(path) < len(acceptance):
            for rank, more in enumerate(acceptance[len(path)]):
                heapq.heappush(waiting, (chance * more, (*path, rank)))
    return sorted(nodes[:size], key=lambda path: (len(path), path))


TREES = ("chain", "static", "eagle2", "dyspec")
SIBLINGS = ("without", "with", "spectr", "best")
_POLICIES = {"confidence": confident, "refusal": hopeful}


def named(
    tree: str,
    count: int | None = None,
    top_k: int = 10,
    size: int = 59,
    policy: str = "fixed",
    siblings: str = "without",
    paths: Sequence[Sequence[int]] | None = None,
) -> Shape:
    """The shape that a verb's options describe; for static trees `paths`, or EAGLE-1's.

    Raises:
        DrafterError: an option is out of its range, with what is in it.
    """
    for name, value, known in (("tree", tree, TREES), ("siblings", siblings, SIBLINGS)):
        if value not in known:
            raise DrafterError(f"{name}={value}: one of {', '.join(known)}")
    for name, number in (
        ("count", 1 if count is None else count),
        ("top_k", top_k),
        ("size", size),
    ):
        if number < 1:
            raise DrafterError(f"{name}={number}: a number of at least 1")
    if paths is not None and tree != "static":
        raise DrafterError(
            f"paths are a static tree's, and tree={tree}: set tree=static, or leave paths out"
        )
    kind, _, threshold = policy.partition(":")
    goes_on = None
    if kind in _POLICIES:
        try:
            goes_on = _POLICIES[kind](float(threshold))
        except ValueError:
            raise DrafterError(
                f"policy={policy}: a threshold from 0 to 1 belongs to it, as {kind}:0.6"
            ) from None
        if not 0 <= float(threshold) <= 1:
            raise DrafterError(f"policy={policy}: its threshold is a probability, from 0 to 1")
    elif policy != "fixed":
        raise DrafterError(
            f"policy={policy}: one of fixed, {', '.join(f'{name}:THRESHOLD' for name in _POLICIES)}"
        )
    if tree == "eagle2":
        return eagle2(top_k, 8 if count is None else count, size, goes_on)
    if tree == "dyspec":
        return dyspec(size, LONGEST if count is None else count, goes_on)
    if tree == "static":
        nodes = [
            path
            for path in (EAGLE1 if paths is None else paths)
            if count is None or len(path) <= count
        ]
        return Levels(nodes, goes_on, siblings in ("with", "spectr"), siblings == "best")
    return chain(LONGEST if count is None else count, goes_on, siblings == "best")


def nothing() -> Draft:
    """The empty tree."""
    none = torch.zeros(0, dtype=torch.long)
    return Draft(none, none)


def _largest(values: Tensor) -> Callable[[], float]:
    return partial(lambda tensor: float(tensor.max()), values)


class _Drawn:
    """The nodes of a tree so far, whose tokens are places in the drafter's vocabulary until `ids`
    maps them."""

    def __init__(self, drawing: Drawing, vocabulary: Int[Tensor, " v"] | None):
        self.drawing, self.vocabulary = drawing, vocabulary
        self.tokens: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.q: Tensor | None = None
        self.count = 0

    def children(
        self, logits: Float[Tensor, "m v"], width: int, best: bool, replaced: bool
    ) -> Int[Tensor, "m width"]:
        """Places, `width` for each row; remembers what they were drawn from."""
        if width > logits.shape[-1]:
            raise DrafterError(
                f"the tree has {width} children of a node, and the drafter knows {logits.shape[-1]}"
                " tokens"
            )
        if self.drawing.chances is None or best:
            self.q = None
            return (
                logits.topk(width, dim=-1).indices
                if width > 1
                else logits.max(-1, keepdim=True).indices
            )
        self.q = self.drawing.chances(logits)
        if width > 1 and not replaced:
            # An exponential race gives the draws in their order, those of no chance last.
            race = (
                torch.empty_like(self.q)
                .exponential_(generator=self.drawing.generator)
                .clamp_min_(1e-30)
            )
            return (self.q / race).topk(width, dim=-1).indices
        return torch.multinomial(self.q, width, replacement=True, generator=self.drawing.generator)

    def add(self, places: Int[Tensor, " n"], rows: Int[Tensor, " n"] | None, many: int) -> None:
        self.tokens.append(places)
        if self.q is not None and rows is not None:
            self.rows.append(rows + self.count)
            self.probabilities.append(self.q)
            self.count += many

    def ids(self, places: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return places if self.vocabulary is None else self.vocabulary[places]

    def draft(self, parents: list[int], replaced: bool) -> Draft:
        tokens, above = self.ids(torch.cat(self.tokens)), torch.tensor(parents)
        if not self.rows:
            return Draft(tokens, above)
        q = torch.cat(self.probabilities)
        if self.vocabulary is not None:
            q = q.new_zeros(len(q), self.drawing.size).index_copy(1, self.vocabulary, q)
        return Draft(tokens, above, q, torch.cat(self.rows), replaced)
