"""The tokens to verify next: trees grown from a drafter's distributions
(trainer.drafters.Growth).

    shape           a callable (Growth, Drawing) -> Draft; with `together`, several at once
    Levels(paths)   a tree of fixed form: node (0, 2) is the third child of the first child of the
                    newest token; `chain` is one
    eagle2(..)      the `size` nodes with the largest product of draft probabilities, among those
                    below the `top_k` best of each level
    dyspec(..)      the same, with no node left out

A policy (trainer.decoding.policies) ends a tree early.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer.decoding.drawing import Drawing, DrawnNodes, empty_draft
from trainer.decoding.growing import Alone, Ends, Shape
from trainer.decoding.policies import Policy, named_policy
from trainer.drafters import BatchGrowth, Draft, DrafterError, Growth

Path = tuple[int, ...]

LONGEST = 32  # levels, if nothing else limits them

# EAGLE-1's tree (its reference's choices.py), 25 nodes in 5 levels; each digit is a rank.
EAGLE1: tuple[Path, ...] = tuple(
    tuple(map(int, path))
    for path in [
        "0",
        "1",
        "2",
        "3",
        "00",
        "01",
        "02",
        "10",
        "11",
        "20",
        "21",
        "30",
        "000",
        "001",
        "002",
        "010",
        "011",
        "020",
        "021",
        "100",
        "0000",
        "0001",
        "0002",
        "00000",
        "00001",
    ]
)


class Levels:
    """A tree of fixed form, given by its nodes' paths, level by level.

    If a `Drawing` has `to_probabilities` and `best` is False, the i-th child is the i-th draw:
    without replacement or, with `with_replacement`, with it. Otherwise the i-th child is the token
    of rank i. Tokens of probability 0 (outside a draft vocabulary, or cut by top-k and top-p) are
    drawn after all others, and verification never accepts them.

    Raises:
        DrafterError: a node's parent is missing, or a path occurs twice; in a call, the tree
        branches and the drafter does not, or a rank exceeds the drafter's vocabulary.
    """

    def __init__(
        self,
        paths: Sequence[Sequence[int]],
        policy: Policy | None = None,
        with_replacement: bool = False,
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
        if orphans := sorted(path for path in nodes if len(path) > 1 and path[:-1] not in nodes):
            raise DrafterError(
                f"the tree's node {list(orphans[0])} has no parent: add {list(orphans[0][:-1])}"
            )
        self.policy, self.with_replacement, self.best = policy, with_replacement, best
        self.branches = len({path[:-1] for path in nodes}) < len(nodes)
        depth = max(map(len, nodes))
        self.levels = [
            sorted(path for path in nodes if len(path) == level) for level in range(1, depth + 1)
        ]

    def __call__(self, growth: Growth, drawing: Drawing) -> Draft:
        return self.together(Alone(growth), drawing, [drawing.limit])[0]

    def together(self, growth: BatchGrowth, drawing: Drawing, limits: Sequence[int]) -> list[Draft]:
        depth = _depth(self, growth, len(self.levels), limits)
        if depth < 1:
            return [empty_draft() for _ in limits]
        drawn, ends = DrawnNodes(drawing, growth.vocabulary), Ends(limits, self.policy)
        logits = growth.first().unsqueeze(1)
        above: list[Path] = [()]  # the nodes of the rows of `logits`
        in_growth: dict[Path, int] = {(): -1}  # numbers of the nodes, as the growth counts them
        in_draft: dict[Path, int] = {(): -1}
        alive: Float[Tensor, "B m"] = logits.new_ones(len(limits), 1, dtype=torch.float32)
        parents: list[int] = []
        upto = [0]  # the number of nodes down to each level
        for level, paths in enumerate(self.levels[:depth], 1):
            width = max(path[-1] for path in paths) + 1
            tokens = drawn.children(logits, width, self.best, self.with_replacement)
            rows = torch.tensor([above.index(path[:-1]) for path in paths])
            device_rows = rows.to(tokens.device)
            ranks = torch.tensor([path[-1] for path in paths], device=tokens.device)
            nodes = tokens[:, device_rows, ranks]
            drawn.add(nodes, rows, len(above))
            parents += [in_draft[path[:-1]] for path in paths]
            in_draft |= {path: len(in_draft) - 1 + i for i, path in enumerate(paths)}
            upto.append(len(parents))
            if level == depth:
                break
            inner = {path[:-1] for path in self.levels[level]}
            chosen = [i for i, path in enumerate(paths) if path in inner]
            at = torch.tensor(chosen, device=tokens.device)
            chosen_rows, logits_above, grown = device_rows[at], logits, nodes[:, at]
            numbers = [in_growth[paths[i][:-1]] for i in chosen]
            logits = growth.extend(
                drawn.ids(grown), torch.tensor(numbers, device=at.device).expand(len(grown), -1)
            )
            above = [paths[i] for i in chosen]
            in_growth |= {path: len(in_growth) - 1 + i for i, path in enumerate(above)}
            if self.policy is not None:
                confidence = growth.confidence
                if confidence is None:
                    q_above = logits_above.float().softmax(-1)[:, chosen_rows]
                    confidence = q_above.gather(2, grown.unsqueeze(2))[..., 0]
                # Only nodes that have children keep their probability; `chosen_rows` are rows of
                # the level above.
                alive = alive[:, chosen_rows] * confidence
                ends.ask(level + 1, logits.float().softmax(-1), confidence, alive)
            if not ends.going(level + 1):
                break
        trees = [parents[: upto[min(max(0, end), len(upto) - 1)]] for end in ends.depths]
        return drawn.drafts(trees, self.with_replacement and not self.best)


def _depth(shape: Shape, growth: BatchGrowth, depth: int, limits: Sequence[int]) -> int:
    if shape.branches and not growth.branches:
        raise DrafterError(
            "this drafter drafts one token after another, and the tree branches: use tree=chain"
        )
    return min(depth, growth.depth, max(limits))


def chain(count: int, policy: Policy | None = None, best: bool = False) -> Levels:
    """Return the tree of one token after another, at most `count` of them.

    Raises:
        DrafterError: `count` is less than 1.
    """
    return Levels([(0,) * length for length in range(1, count + 1)], policy, best=best)


class Best:
    """The `size` nodes with the largest product of draft probabilities, chosen without chance.

    Each level is grown below the `top_k` most likely nodes of the level above (EAGLE-2, arXiv
    2406.16858, section 4), as far as they can be chosen. With top_k=None it is grown below all
    that are among the `size` most likely so far: greedy growth by estimated acceptance, node by
    node (DySpec, arXiv 2410.11744), in one call per level.
    """

    branches = True

    def __init__(self, size: int, depth: int, top_k: int | None, policy: Policy | None = None):
        self.size, self.depth, self.top_k, self.policy = size, depth, top_k, policy

    def __call__(self, growth: Growth, drawing: Drawing) -> Draft:
        return self.together(Alone(growth), drawing, [drawing.limit])[0]

    def together(self, growth: BatchGrowth, drawing: Drawing, limits: Sequence[int]) -> list[Draft]:
        depth = _depth(self, growth, self.depth, limits)
        if depth < 1:
            return [empty_draft() for _ in limits]
        drawn, ends = DrawnNodes(drawing, growth.vocabulary), Ends(limits, self.policy)
        width = self.size if self.top_k is None else self.top_k
        logits = growth.first().unsqueeze(1)
        device = logits.device
        # log-probabilities of the nodes of `logits`' rows; -inf for one that gets no children
        above = torch.zeros(len(limits), 1, device=device)
        alive = torch.ones_like(above)
        in_pool = in_growth = torch.full_like(above, -1, dtype=torch.long)
        scores, tokens, parents, added = above[:, :0], in_pool[:, :0], in_pool[:, :0], 0
        for level in range(1, depth + 1):
            if min(ends.depths) < level:
                over = torch.tensor([end < level for end in ends.depths], device=device)
                above = above.masked_fill(over.unsqueeze(1), -math.inf)
            log_q = logits.float().log_softmax(-1)
            children = log_q.topk(min(width, log_q.shape[-1]), dim=-1)
            products = (above.unsqueeze(2) + children.values).flatten(1)
            rows = torch.arange(above.shape[1], device=device).repeat_interleave(
                children.values.shape[2]
            )
            start = scores.shape[1]
            scores = torch.cat([scores, products], dim=1)
            tokens = torch.cat([tokens, children.indices.flatten(1)], dim=1)
            parents = torch.cat([parents, in_pool[:, rows]], dim=1)
            if level == depth or not ends.going(level + 1):
                break
            order, grows = self._grown(products, scores, width)
            if not order.shape[1]:
                break
            next_logits = growth.extend(
                drawn.ids(tokens.gather(1, start + order)), in_growth.gather(1, rows[order])
            )
            if self.policy is not None:
                confidence = growth.confidence
                if confidence is None:
                    confidence = children.values.flatten(1).gather(1, order).exp()
                alive = (alive.gather(1, rows[order]) * confidence).masked_fill(~grows, -math.inf)
                ends.ask(level + 1, next_logits.float().softmax(-1), confidence, alive)
            logits, in_pool = next_logits, start + order
            above = products.gather(1, order).masked_fill(~grows, -math.inf)
            in_growth = (added + torch.arange(order.shape[1], device=device)).expand_as(order)
            added += order.shape[1]
        chosen, chosen_parents = self._chosen(scores, parents)
        drawn.add(tokens.gather(1, chosen), None, 0)
        return drawn.drafts(chosen_parents, False)

    def _grown(
        self, products: Tensor, scores: Tensor, width: int
    ) -> tuple[Int[Tensor, "B m"], Bool[Tensor, "B m"]]:
        """Return (which of a level's nodes get children, the most likely first; False for those
        that only fill up a sequence that has fewer of them)."""
        likely, order = products.sort(dim=1, descending=True, stable=True)
        likely, order = likely[:, :width], order[:, :width]
        grows = likely > -math.inf
        # Children are no likelier than their parent, so that of one that is not among the `size`
        # likeliest none is chosen. On a GPU leaving such nodes out costs a wait for it.
        prunes = self.top_k is None or likely.device.type == "cpu"
        if prunes and scores.shape[1] > self.size:
            grows &= likely >= scores.topk(self.size, dim=1).values[:, -1:]
        most = int(grows.sum(1).max()) if prunes or len(products) > 1 else width
        return order[:, :most], grows[:, :most]

    def _chosen(
        self, scores: Tensor, parents: Tensor
    ) -> tuple[Int[Tensor, "B n"], list[list[int]]]:
        """Return the nodes with the highest scores, and their parents' numbers among them. Nodes
        that a sequence does not have come last, without a parent."""
        count = scores.shape[1]
        # The sort is stable, so of equal scores the first drawn wins: a parent stands before its
        # children and is always chosen with them.
        values, chosen = scores.sort(dim=1, descending=True, stable=True)
        chosen = chosen[:, : self.size].masked_fill(values[:, : self.size] == -math.inf, count)
        chosen = chosen.sort(dim=1).values
        # The last entry is that of no node.
        numbers = scores.new_full((len(scores), count + 1), -1, dtype=torch.long)
        new = torch.arange(chosen.shape[1], device=scores.device)
        numbers.scatter_(1, chosen, new.expand_as(chosen))
        real, chosen = chosen < count, chosen.clamp_max(count - 1)
        own = parents.gather(1, chosen)
        numbers = numbers.gather(1, own.clamp_min(0)).masked_fill(own < 0, -1)
        many = real.sum(1, keepdim=True)
        lists = torch.cat([many, numbers], dim=1).tolist()
        return chosen, [row[1 : 1 + row[0]] for row in lists]


def eagle2(top_k: int, depth: int, size: int, policy: Policy | None = None) -> Best:
    """Return EAGLE-2's dynamic tree. Its reference has top_k=10, depth=8 (a first level and 7 more)
    and size=59."""
    return Best(size, depth, top_k, policy)


def dyspec(size: int, depth: int = LONGEST, policy: Policy | None = None) -> Best:
    """Return DySpec's tree, as deep as the drafter and `depth` allow."""
    return Best(size, depth, None, policy)


def search(
    acceptance: Sequence[Sequence[float]],
    cost: Sequence[float],
    tokens: Callable[[Sequence[Path]], float] | None = None,
) -> list[Path]:
    """Find the fixed tree with the most tokens for its cost.

    `acceptance[d][r]` is how often the child of rank r is right below a right node of depth d.
    cost[n], for n = 0 .. N, is the cost in any unit of drafting and verifying n tokens besides the
    newest one. Nodes are added by their probability of being reached, at most N of them (Medusa,
    arXiv 2401.10774, section 2.3.3). Of these trees the one with the largest (1 + Σ probabilities)
    / cost is returned. It is empty if drafting does not pay. `tokens` returns a tree's tokens per
    step, if that is known better than by Σ probabilities.
    """
    nodes: list[Path] = []
    waiting: list[tuple[float, Path]] = [
        (-share, (rank,)) for rank, share in enumerate(acceptance[0])
    ]
    heapq.heapify(waiting)
    expected, best, size = 1.0, 1.0 / cost[0], 0
    while waiting and len(nodes) + 1 < len(cost):
        reached, path = heapq.heappop(waiting)  # the probability, negated
        nodes.append(path)
        expected -= reached
        if (rate := (expected if tokens is None else tokens(nodes)) / cost[len(nodes)]) > best:
            best, size = rate, len(nodes)
        if len(path) < len(acceptance):
            for rank, share in enumerate(acceptance[len(path)]):
                heapq.heappush(waiting, (reached * share, (*path, rank)))
    return sorted(nodes[:size], key=lambda path: (len(path), path))


TREES = ("chain", "static", "eagle2", "dyspec")
SIBLINGS = ("without", "with", "spectr", "best")


def named(
    tree: str,
    count: int | None = None,
    top_k: int = 10,
    size: int = 59,
    policy: str = "fixed",
    siblings: str = "without",
    paths: Sequence[Sequence[int]] | None = None,
) -> Shape:
    """Return the shape that a command's options describe. A static tree is that of `paths`, or
    EAGLE-1's.

    Raises:
        DrafterError: an option is out of its range; the message says what the range is.
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
    if policy.startswith("profitable") and tree != "chain":
        raise DrafterError(f"policy={policy} is for chains: set tree=chain, or another policy")
    stop = named_policy(policy)
    if tree == "eagle2":
        return eagle2(top_k, 8 if count is None else count, size, stop)
    if tree == "dyspec":
        return dyspec(size, LONGEST if count is None else count, stop)
    if tree == "static":
        nodes = [
            path
            for path in (EAGLE1 if paths is None else paths)
            if count is None or len(path) <= count
        ]
        return Levels(nodes, stop, siblings in ("with", "spectr"), siblings == "best")
    return chain(LONGEST if count is None else count, stop, siblings == "best")
