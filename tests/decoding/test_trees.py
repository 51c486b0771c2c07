"""Trees grown from a table of distributions, against ones that are made by trying all paths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trainer.decoding import trees
from trainer.decoding.drawing import Drawing
from trainer.decoding.policies import Level, confidence_policy, entropy_policy, refusal_policy
from trainer.decoding.trees import (
    EAGLE1,
    Levels,
    chain,
    dyspec,
    eagle2,
    named,
    search,
)
from trainer.drafters import DrafterError

V = 6


class Table:
    """The growth of a drafter whose logits depend on the whole path."""

    def __init__(self, depth=4, branches=True, vocabulary=None, confidence=None, seed=0):
        self.depth, self.branches, self.vocabulary, self.seed = depth, branches, vocabulary, seed
        self.predicts, self.confidence = confidence, None
        self.paths, self.calls = [], []

    def logits(self, path):
        draw = torch.Generator().manual_seed(hash((*path, self.seed)) % 2**31)
        return (
            torch.randn(V if self.vocabulary is None else len(self.vocabulary), generator=draw) * 2
        )

    def first(self):
        return self.logits(())

    def extend(self, tokens, parents):
        above = [self.paths[i] if i >= 0 else () for i in parents.tolist()]
        new = [(*path, token) for path, token in zip(above, tokens.tolist(), strict=True)]
        assert len({len(path) for path in new}) == 1
        assert max(map(len, new)) < self.depth
        self.paths += new
        self.calls.append(len(new))
        self.confidence = (
            None if self.predicts is None else torch.tensor([self.predicts(path) for path in new])
        )
        return torch.stack([self.logits(path) for path in new])


def paths_of(draft):
    """The tokens from the newest one to each node."""
    actual = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        assert parent < len(actual)
        actual.append((*(actual[parent] if parent >= 0 else ()), token))
    return actual


def everything(growth):
    """The log-probability of each path of up to `depth` tokens."""
    actual = {(): 0.0}
    for length in range(1, growth.depth + 1):
        for path in itertools.product(range(V), repeat=length):
            actual[path] = actual[path[:-1]] + float(
                growth.logits(path[:-1]).log_softmax(-1)[path[-1]]
            )
    del actual[()]
    return actual


def warm(logits):
    return logits.float().softmax(-1)


def test_a_chain_is_the_best_tokens_one_after_another():
    draft, path = chain(3)(Table(), Drawing(V, 9)), ()
    for token in draft.tokens.tolist():
        assert token == int(Table().logits(path).argmax())
        path = (*path, token)
    assert draft.parents.tolist() == [-1, 0, 1]
    assert draft.probabilities is None


@pytest.mark.parametrize(
    ("count", "limit", "depth", "length"), [(3, 9, 4, 3), (9, 9, 4, 4), (9, 2, 4, 2), (2, 0, 4, 0)]
)
def test_no_tree_is_deeper_than_wanted_known_and_allowed(count, limit, depth, length):
    for shape in (chain(count), eagle2(2, count, 20), dyspec(20, count)):
        actual = paths_of(shape(Table(depth), Drawing(V, limit)))
        assert max(map(len, actual), default=0) == length


def test_a_fixed_tree_has_the_tokens_of_its_ranks():
    growth = Table(5)
    actual = paths_of(Levels(EAGLE1)(growth, Drawing(V, 9)))
    assert len(actual) == 25
    expected = {(): ()}
    for ranks in sorted(EAGLE1, key=len):
        above = expected[ranks[:-1]]
        expected[ranks] = (*above, int(Table(5).logits(above).argsort(descending=True)[ranks[-1]]))
    assert sorted(actual) == sorted(expected[ranks] for ranks in EAGLE1)
    assert growth.calls == [4, 4, 1, 1]  # nodes without children are not asked about


@pytest.mark.parametrize("size", [1, 5, 17, 40])
@pytest.mark.parametrize("seed", range(3))
def test_dyspec_has_the_likeliest_nodes_of_all(size, seed):
    growth = Table(3, seed=seed)
    actual = paths_of(dyspec(size)(growth, Drawing(V, 9)))
    scores = everything(Table(3, seed=seed))
    assert set(actual) == set(sorted(scores, key=scores.get, reverse=True)[:size])
    assert sum(growth.calls) <= 2 * size


@pytest.mark.parametrize("seed", range(3))
def test_eagle2_has_the_likeliest_nodes_below_the_best_of_each_level(seed):
    scores = everything(Table(4, seed=seed))
    frontier, pool, levels = [()], [], []
    for _ in range(4):
        level = [
            path
            for above in frontier
            for path in sorted(
                [(*above, token) for token in range(V)], key=scores.get, reverse=True
            )[:3]
        ]
        pool += level
        frontier = sorted(level, key=scores.get, reverse=True)[:3]
        levels.append((frontier, list(pool)))
    for size in (2, 9, 20):
        growth = Table(4, seed=seed)
        actual = paths_of(eagle2(3, 4, size)(growth, Drawing(V, 9)))
        assert len(actual) == size
        assert set(actual) == set(sorted(pool, key=scores.get, reverse=True)[:size])
        # only nodes that may be chosen are grown
        counts = [
            len({*above} & {*sorted(upto, key=scores.get, reverse=True)[:size]})
            for above, upto in levels[:3]
        ]
        assert growth.calls == list(itertools.takewhile(bool, counts))


def test_parents_stay_with_children_of_the_same_chance():
    growth = Table(3)
    # a chance of one, as far as fp32 goes
    growth.logits = lambda path: torch.tensor([60.0] + [0.0] * (V - 1))
    actual = paths_of(eagle2(2, 3, 3)(growth, Drawing(V, 9)))
    assert actual == [(0,), (0, 0), (0, 0, 0)]


def test_draws_say_what_they_were_drawn_from():
    form = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0)]
    for with_replacement in (False, True):
        growth = Table(4)
        draft = Levels(form, with_replacement=with_replacement)(
            growth, Drawing(V, 9, warm, torch.Generator().manual_seed(3))
        )
        assert draft.with_replacement == with_replacement
        assert draft.parents.tolist() == [-1, -1, -1, 0, 0, 2]
        for node, path in enumerate(paths_of(draft)):
            torch.testing.assert_close(
                draft.probabilities[draft.rows[node]], warm(Table(4).logits(path[:-1]))
            )
        if not with_replacement:
            assert len(set(paths_of(draft))) == 6
    assert Levels(form, best=True)(Table(4), Drawing(V, 9, warm)).probabilities is None


@pytest.mark.long
def test_draws_without_replacement_come_in_their_order():
    q = torch.tensor([0.6, 0.3, 0.1])
    growth = Table(1)
    growth.logits = lambda path: q.log()
    generator, count = torch.Generator().manual_seed(0), 3000
    actual = torch.zeros(3, 3)
    for _ in range(count):
        first, second = Levels([(0,), (1,)])(growth, Drawing(3, 9, warm, generator)).tokens.tolist()
        actual[first, second] += 1 / count
    for i, j in itertools.permutations(range(3), 2):
        expected = float(q[i] * q[j] / (1 - q[i]))
        assert abs(float(actual[i, j]) - expected) < 4 * math.sqrt(
            expected * (1 - expected) / count
        )


def test_a_draft_vocabulary_is_spread_over_the_targets():
    growth = Table(2, vocabulary=torch.tensor([1, 4, 9]))
    draft = Levels([(0,), (1,), (0, 0)])(
        growth, Drawing(12, 9, warm, torch.Generator().manual_seed(1))
    )
    assert set(draft.tokens.tolist()) <= {1, 4, 9}
    assert draft.probabilities.shape == (2, 12)
    torch.testing.assert_close(draft.probabilities[0, [1, 4, 9]], warm(growth.logits(())))
    torch.testing.assert_close(draft.probabilities.sum(-1), torch.ones(2))
    for shape in (eagle2(5, 2, 6), dyspec(6)):
        actual = shape(Table(2, vocabulary=torch.tensor([1, 4, 9])), Drawing(12, 9))
        assert len(actual.tokens) == 6
        assert set(actual.tokens.tolist()) <= {1, 4, 9}


@pytest.mark.parametrize(("threshold", "length"), [(0.0, 6), (1.0, 1), (None, None)])
def test_a_confident_chain_ends_where_no_token_is_likely(threshold, length):
    path = chain(6)(Table(6), Drawing(V, 9)).tokens.tolist()
    tops = [float(warm(Table(6).logits(tuple(path[:k]))).max()) for k in range(6)]
    threshold = sorted(tops[1:])[2] + 1e-6 if threshold is None else threshold
    expected = next((k for k in range(1, 6) if tops[k] < threshold), 6)
    assert length in (None, expected)
    growth = Table(6)
    assert (
        chain(6, confidence_policy(threshold))(growth, Drawing(V, 9)).tokens.tolist()
        == path[:expected]
    )
    assert len(growth.calls) == min(5, expected)


@pytest.mark.parametrize("threshold", [0.0, None, 10.0])
def test_a_chain_ends_where_the_next_distribution_is_flat(threshold):
    path = chain(6)(Table(6), Drawing(V, 9)).tokens.tolist()
    each = [warm(Table(6).logits(tuple(path[:k]))).tolist() for k in range(6)]
    nats = [-sum(p * math.log(p) for p in q) for q in each]
    threshold = sorted(nats[1:])[2] + 1e-6 if threshold is None else threshold
    expected = next((k for k in range(1, 6) if nats[k] > threshold), 6)
    drafted = chain(6, entropy_policy(threshold))(Table(6), Drawing(V, 9)).tokens.tolist()
    assert drafted == path[:expected]
    named_alike = named("chain", 6, policy=f"entropy:{threshold}")
    assert named_alike(Table(6), Drawing(V, 9)).tokens.tolist() == drafted
    tree = eagle2(2, 3, 6, entropy_policy(0.0))(Table(6), Drawing(V, 9))
    assert (tree.parents == -1).all()  # the first level is never asked for


def test_a_hopeful_chain_ends_where_a_refusal_is_likely():
    # The chance that all are taken is 0.9, 0.72, 0.576, 0.4608 ..
    growth = Table(6, confidence=lambda path: 0.9 if len(path) == 1 else 0.8)
    assert len(chain(6, refusal_policy(0.3))(growth, Drawing(V, 9)).tokens) == 3
    assert (
        len(
            chain(6, refusal_policy(0.5))(
                Table(6, confidence=growth.predicts), Drawing(V, 9)
            ).tokens
        )
        == 4
    )
    path = chain(6)(Table(6), Drawing(V, 9)).tokens.tolist()
    alive, expected = 1.0, 6
    for k in range(1, 6):  # its own chances, where it predicts none
        alive *= float(warm(Table(6).logits(tuple(path[: k - 1])))[path[k - 1]])
        if 1 - alive > 0.8:
            expected = k
            break
    assert chain(6, refusal_policy(0.8))(Table(6), Drawing(V, 9)).tokens.tolist() == path[:expected]


@pytest.mark.parametrize(
    "shape",
    [
        Levels(EAGLE1, confidence_policy(1.0)),
        eagle2(3, 4, 30, confidence_policy(1.0)),
        dyspec(30, 4, refusal_policy(0.0)),
    ],
)
def test_a_policy_ends_trees_too(shape):
    assert set(map(len, paths_of(shape(Table(5), Drawing(V, 9))))) == {1}


def test_a_policy_sees_nothing_that_is_drawn_after_it():
    """A policy decides by the tokens above only: with the same ones the decision is the same."""
    decided = {}
    for seed in range(60):
        growth = Table(2)
        draft = chain(2, confidence_policy(0.55))(
            growth, Drawing(V, 9, warm, torch.Generator().manual_seed(seed))
        )
        first = draft.tokens.tolist()[0]
        assert decided.setdefault(first, len(draft.tokens)) == len(draft.tokens)
    assert set(decided.values()) == {1, 2}


def test_a_tree_of_a_drafter_that_does_not_branch_is_refused():
    for shape in (Levels(EAGLE1), eagle2(2, 2, 4), dyspec(4)):
        with pytest.raises(DrafterError, match="tree=chain"):
            shape(Table(branches=False), Drawing(V, 9))
    assert len(chain(2)(Table(branches=False), Drawing(V, 9)).tokens) == 2


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0, 0)], r"node \[0, 0\] has no parent: add \[0\]"),
        ([(0,), (0,)], "each once"),
        ([], "each once"),
        ([(-1,)], "count from 0"),
    ],
)
def test_a_tree_with_holes_is_refused(paths, message):
    with pytest.raises(DrafterError, match=message):
        Levels(paths)


def test_more_children_than_tokens_are_refused():
    with pytest.raises(
        DrafterError, match="the tree has 7 children of a node, and the drafter knows 6 tokens"
    ):
        Levels([(rank,) for rank in range(7)])(Table(), Drawing(V, 9))


def test_a_search_finds_the_tree_of_the_most_tokens_for_its_cost():
    acceptance = [[0.6, 0.2, 0.1], [0.5, 0.3], [0.4]]
    chances = {
        path: math.prod(acceptance[d][r] for d, r in enumerate(path))
        for length in (1, 2, 3)
        for path in itertools.product(*(range(len(row)) for row in acceptance[:length]))
    }
    ranked = sorted(chances, key=chances.get, reverse=True)

    def best(cost):
        sizes = {
            n: (1 + sum(chances[path] for path in ranked[:n])) / cost[n] for n in range(len(cost))
        }
        return max(sizes, key=sizes.get)

    for cost in (
        [1 + 0.12 * n for n in range(12)],
        [1.0] * 6,
        [1, 3, 9],
        [1 + max(0, n - 3) for n in range(12)],
    ):
        actual = search(acceptance, cost)
        assert set(actual) == set(ranked[: best(cost)])
    assert len(search(acceptance, [1.0] * 6)) == 5
    assert search(acceptance, [1, 3, 9]) == []
    Levels(search(acceptance, [1.0] * 9))  # closed under parents


def closed(paths):
    """All sets of these nodes that hold the parent of each."""
    for keep in itertools.product([False, True], repeat=len(paths)):
        tree = {path for path, stored in zip(paths, keep, strict=True) if stored}
        if all(len(path) == 1 or path[:-1] in tree for path in tree):
            yield tree


@pytest.mark.parametrize(
    "acceptance",
    [[[0.6, 0.2], [0.5, 0.3], [0.4]], [[0.3, 0.25], [0.9, 0.05]], [[0.7], [0.2], [0.9]]],
)
@pytest.mark.parametrize("slope", [0.02, 0.15, 0.3, 0.9])
def test_no_small_tree_is_better_than_the_one_found(acceptance, slope):
    ranks = [range(len(row)) for row in acceptance]
    paths = [
        path for length in range(1, len(ranks) + 1) for path in itertools.product(*ranks[:length])
    ]
    cost = [1 + slope * n for n in range(len(paths) + 1)]

    def rate(tree):
        return (
            1 + sum(math.prod(acceptance[d][r] for d, r in enumerate(path)) for path in tree)
        ) / cost[len(tree)]

    actual = search(acceptance, cost)
    assert rate(actual) == pytest.approx(max(map(rate, closed(paths))))
    assert bool(actual) == (rate(actual) > 1)
    assert not actual or slope < 0.9


def test_what_a_tree_gives_may_be_told():
    acceptance, cost = [[0.6, 0.2], [0.5]], [1 + 0.1 * n for n in range(5)]
    requested = []
    actual = search(
        acceptance,
        cost,
        lambda nodes: (requested.append(list(nodes)), 5.0 if len(nodes) == 3 else 1.0)[1],
    )
    assert requested == [[(0,)], [(0,), (0, 0)], [(0,), (0, 0), (1,)], [(0,), (0, 0), (1,), (1, 0)]]
    assert actual == [(0,), (1,), (0, 0)]


def test_options_make_the_shapes_they_name():
    assert len(paths_of(named("chain", 2)(Table(), Drawing(V, 9)))) == 2
    assert not named("chain").branches
    assert len(paths_of(named("static")(Table(5), Drawing(V, 9)))) == 25
    assert len(paths_of(named("static", 2)(Table(5), Drawing(V, 9)))) == 12
    assert len(paths_of(named("eagle2", None, 3, 7)(Table(), Drawing(V, 9)))) == 7
    assert len(paths_of(named("dyspec", size=7)(Table(), Drawing(V, 9)))) == 7
    assert named("static", siblings="spectr")(Table(5), Drawing(V, 9, warm)).with_replacement
    assert len(named("static", 1, paths=[[0], [1], [0, 0]])(Table(), Drawing(V, 9)).tokens) == 2
    level = Level(2, torch.tensor([[0.9, 0.1]]), torch.ones(1), torch.ones(1))
    assert named("chain", policy="confidence:1").policy(level) is False
    assert set(trees.TREES) == {"chain", "static", "eagle2", "dyspec"}
