"""Traversal verification, by counting every way in which drafts can be drawn and verified."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from trainer.decoding import traversal, verify
from trainer.drafters import Draft, chain

SIZE = 3  # V


@cache
def table(kind, prefix, seed):
    """Return the distribution after a prefix, of the target or of the drafter."""
    draw = torch.Generator().manual_seed(hash((kind == "p", prefix, seed)) % 2**31)
    weights = torch.randn(SIZE, generator=draw, dtype=torch.float64).mul(1.3).softmax(-1)
    return weights


def families(q, count, replacement):
    """Yield ((tokens, chance) of all ordered draws of `count` siblings."""
    for tokens in itertools.product(range(SIZE), repeat=count):
        chance, now = 1.0, q.clone()
        for token in tokens:
            chance *= float(now[token])
            if not replacement:
                now[token] = 0
                now = now / now.sum() if now.sum() > 0 else now
        if chance > 1e-15:
            yield tokens, chance


def drafts(shape, replacement, seed, chosen=None, exists=None):
    """Yield (tokens, parents, rows, prefixes, chance) of all ways to draw a tree. `shape` says how
    many children each node of a level has; `chosen` adds to each place with children one child that
    is a function of its prefix; `exists` decides from all tokens so far if a level is drawn."""

    def grow(level, nodes, frontier, chance):
        if level == len(shape) or (exists and level and not exists(level, nodes)):
            yield nodes, chance
            return
        options = [
            list(families(table("q", prefix, seed), shape[level], replacement))
            for _, prefix in frontier
        ]
        for choice in itertools.product(*options):
            more, below, weight = list(nodes), [], chance
            for (node, prefix), (tokens, part) in zip(frontier, choice, strict=True):
                weight *= part
                siblings = [(token, True) for token in tokens]
                if chosen is not None and (extra := chosen(prefix)) not in tokens:
                    siblings.append((extra, False))
                for token, drawn in siblings:
                    below.append((len(more), (*prefix, token)))
                    more.append((token, node, prefix, drawn))
            yield from grow(level + 1, more, below, weight)

    yield from grow(0, [], [(-1, ())], 1.0)


def as_draft(nodes, replacement, seed):
    """Return (the Draft, p of its places) of a list of (token, parent, prefix, drawn)."""
    prefixes = sorted({prefix for _, _, prefix, _ in nodes})
    draft = Draft(
        torch.tensor([token for token, *_ in nodes]),
        torch.tensor([parent for _, parent, *_ in nodes]),
        torch.stack([table("q", prefix, seed) for prefix in prefixes]),
        torch.tensor([prefixes.index(prefix) if drawn else -1 for *_, prefix, drawn in nodes]),
        replacement,
    )
    places = [()] + [(*prefix, token) for token, _, prefix, _ in nodes]
    return draft, torch.stack([table("p", place, seed) for place in places])


def naive(nodes, replacement, seed):
    """Yield (path's prefix, distribution of the next token, chance): the recursion of the paper's
    walk, one node at a time."""
    children = {}
    for number, (_, parent, *_) in enumerate(nodes):
        children.setdefault(parent, []).append(number)

    def visit(node, prefix, budget):
        """Return (ends below or here, the chance that there is none)."""
        p, q = table("p", prefix, seed), table("q", prefix, seed).clone()
        ends, free = [], 1.0
        for child in children.get(node, []):
            token, _, _, drawn = nodes[child]
            here = q if drawn else torch.nn.functional.one_hot(torch.tensor(token), SIZE).double()
            ratio = float(budget * p[token] / here[token])
            below, left = visit(child, (*prefix, token), min(1.0, ratio))
            ends += [(path, rest, free * chance) for path, rest, chance in below]
            free *= left
            excess = (budget * p - here).clamp_min(0)
            mass = float(excess.sum())
            if node >= 0:
                budget = mass / (mass + 1 - budget) if mass + 1 - budget > 0 else 1.0
            p = excess / mass if mass > 0 else p
            if drawn and not replacement:
                q[token] = 0
                q = q / q.sum() if q.sum() > 0 else q
        ends.append((prefix, p, free * budget))
        return ends, free * (1 - budget)

    ends, free = visit(-1, (), 1.0)
    assert abs(free) < 1e-12
    yield from ends


def ways(nodes, replacement, seed):
    """The same as `naive`, from the budgets of the code."""
    draft, p = as_draft(nodes, replacement, seed)
    budget, rest = traversal.budgets(p, [draft])
    _, last, _, _ = traversal._post_order([draft])
    prefixes = [()] + [(*prefix, token) for token, _, prefix, _ in nodes]
    free = 1.0
    for place in sorted(range(len(last)), key=lambda place: last[place]):
        yield prefixes[place], rest[place], free * float(budget[place])
        free *= 1 - float(budget[place])


def law(shape, replacement, seed, **kind):
    """Return (the law of len(shape) + 1 tokens, the mean number of tokens of a step)."""
    length = len(shape) + 1
    joint, mean = torch.zeros((SIZE,) * length, dtype=torch.float64), 0.0
    for nodes, chance in drafts(shape, replacement, seed, **kind):
        for prefix, rest, way in ways(nodes, replacement, seed):
            mean += chance * way * (len(prefix) + 1)
            for token in range(SIZE):
                start = (*prefix, token)
                add(joint, start, chance * way * float(rest[token]), seed, length)
    return joint, mean


def add(joint, start, weight, seed, length):
    """Spread a weight over all texts that begin with `start`, as the target writes them."""
    for more in itertools.product(range(SIZE), repeat=length - len(start)):
        text, chance = start, weight
        for token in more:
            chance *= float(table("p", text, seed)[token])
            text = (*text, token)
        joint[text] += chance


def targets(length, seed):
    joint = torch.zeros((SIZE,) * length, dtype=torch.float64)
    add(joint, (), 1.0, seed, length)
    return joint


SHAPES = [(1,), (1, 1), (1, 1, 1), (2,), (2, 1), (1, 2), (2, 2)]


@pytest.mark.long
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_have_the_targets_law(shape, replacement):
    for seed in range(1 if len(shape) * max(shape) > 2 else 3):
        joint, _ = law(shape, replacement, seed)
        assert float((joint - targets(len(shape) + 1, seed)).abs().max()) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_drawn_and_chosen_siblings_keep_the_law(shape):
    for seed in range(3):
        joint, _ = law(shape, False, seed, chosen=lambda prefix: (1 + sum(prefix)) % SIZE)
        assert float((joint - targets(len(shape) + 1, seed)).abs().max()) < 1e-12


@pytest.mark.long
def test_a_policy_that_looks_at_all_tokens_drawn_so_far_keeps_the_law():
    def exists(level, nodes):
        return sum(token for token, *_ in nodes) % 2 == level % 2

    for seed in range(1):
        joint, _ = law((2, 1, 1), True, seed, exists=exists)
        assert float((joint - targets(4, seed)).abs().max()) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("replacement", [False, True])
def test_budgets_are_those_of_the_recursion(replacement):
    compared = 0
    for shape in ((1, 1, 1), (2, 2), (2, 1)):
        for nodes, _ in itertools.islice(drafts(shape, replacement, 5), 40):
            expected = list(naive(nodes, replacement, 5))
            for (path, rest, chance), (place, left, way) in zip(
                expected, ways(nodes, replacement, 5), strict=True
            ):
                assert path == place
                assert abs(chance - way) < 1e-12
                if chance > 1e-12:
                    assert float((rest - left).abs().max()) < 1e-9
                compared += 1
    assert compared > 300


def test_a_chain_is_block_verification():
    """Its closed form (arXiv 2403.10444): h_K = s_K, h_j = R_j / (R_j + 1 - s_j), and the largest
    j with u_j < h_j is the number of accepted tokens."""
    for nodes, _ in drafts((1, 1, 1), True, 2):
        text = [token for token, *_ in nodes]
        p = [table("p", tuple(text[:j]), 2) for j in range(4)]
        q = [table("q", tuple(text[:j]), 2) for j in range(3)]
        s, h = 1.0, [1.0]
        for j in range(1, 4):
            s = min(1.0, s * float(p[j - 1][text[j - 1]] / q[j - 1][text[j - 1]]))
            residual = float((s * p[j] - q[j]).clamp_min(0).sum()) if j < 3 else 0.0
            h.append(s if j == 3 else residual / (residual + 1 - s) if residual + 1 - s else 1.0)
        draft, places = as_draft(nodes, True, 2)
        budget, _ = traversal.budgets(places, [draft])
        torch.testing.assert_close(budget, torch.tensor(h, dtype=budget.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("replacement", [False, True])
def test_one_level_is_the_recursive_rule(replacement):
    rule = verify.with_replacement if replacement else verify.without_replacement
    for nodes, _ in drafts((3,), replacement, 3):
        draft, p = as_draft(nodes, replacement, 3)
        budget, rest = traversal.budgets(p, [draft])
        chances, left = rule(p[:1], draft.probabilities, draft.tokens[None], [3])
        torch.testing.assert_close(budget[1:], chances[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(rest[0], left[0], rtol=0, atol=1e-12)


def recursive_mean(shape, replacement, seed):
    """The mean number of tokens of a step by the recursive rule."""
    rule = verify.with_replacement if replacement else verify.without_replacement
    mean = 0.0
    for nodes, chance in drafts(shape, replacement, seed):
        children = {}
        for number, (_, parent, *_) in enumerate(nodes):
            children.setdefault(parent, []).append(number)

        def length(node, prefix, nodes=nodes, children=children):
            if node not in children:
                return 1.0
            tokens = [nodes[child][0] for child in children[node]]
            chances, _ = rule(
                table("p", prefix, seed)[None],
                table("q", prefix, seed)[None],
                torch.tensor([tokens]),
                [len(tokens)],
            )
            total, free = 1.0, 1.0
            for child, token, taken in zip(
                children[node], tokens, chances[0].tolist(), strict=True
            ):
                total += free * taken * length(child, (*prefix, token))
                free *= 1 - taken
            return total

        mean += chance * length(-1, ())
    return mean


@pytest.mark.long
@pytest.mark.parametrize("replacement", [False, True])
def test_a_step_is_never_shorter_than_by_the_recursive_rule(replacement):
    gains = []
    for shape in ((1, 1), (2, 1), (1, 2)):
        for seed in range(10, 13):
            _, mean = law(shape, replacement, seed)
            gains.append(mean / recursive_mean(shape, replacement, seed))
    assert min(gains) > 1 - 1e-12
    assert max(gains) > 1.01


def test_drafts_that_are_verified_together_are_as_alone(monkeypatch):
    trees = [next(itertools.islice(drafts((2, 2), False, 7), 5, None))[0]]
    trees.append(next(itertools.islice(drafts((1, 1, 1), True, 8), 3, None))[0])
    pairs = [as_draft(trees[0], False, 7), as_draft(trees[1], True, 8)]
    none, plain = chain(torch.tensor([], dtype=torch.long)), chain(torch.tensor([2, 1]))
    after = torch.stack([table("p", (n,), 9) for n in range(4)])
    pairs = [pairs[0], (none, after[:1]), pairs[1], (plain, after[1:])]
    p = torch.cat([p for _, p in pairs])
    uniform = torch.rand(len(p), generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    uniform = uniform**4  # so that paths go deep
    monkeypatch.setattr(torch, "multinomial", lambda left, *_, **__: left.argmax(-1, keepdim=True))

    def verdict(p, drafts, first):
        monkeypatch.setattr(torch, "rand", lambda size, **_: uniform[first : first + size])
        return traversal.traversal(p, drafts)

    together = verdict(p, [draft for draft, _ in pairs], 0)
    place = node = 0
    for draft, rows in pairs:
        alone = verdict(rows, [draft], place)
        count = len(draft.tokens)
        assert together.taken[node : node + count].tolist() == alone.taken.tolist()
        assert together.next_tokens[place : place + len(rows)].equal(alone.next_tokens)
        place, node = place + len(rows), node + count
    assert together.taken.any()


@pytest.mark.long
def test_the_random_numbers_are_used_as_the_law_says():
    """10,000 steps of a chain of two drawn with torch's generator, against the target's pairs."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    steps = 10_000
    for _ in range(steps // 500):
        many, places = [], []
        for _ in range(500):
            first = int(torch.multinomial(table("q", (), 4), 1, generator=generator))
            second = int(torch.multinomial(table("q", (first,), 4), 1, generator=generator))
            nodes = [(first, -1, (), True), (second, 0, (first,), True)]
            draft, p = as_draft(nodes, True, 4)
            many.append(draft)
            places.append(p)
        verdict = traversal.traversal(torch.cat(places), many, generator)
        for number, draft in enumerate(many):
            taken = verdict.taken[2 * number : 2 * number + 2].tolist()
            path = verify.walk([-1, 0], taken)
            own = int(verdict.next_tokens[3 * number + len(path)])
            text = [*draft.tokens[path].tolist(), own]
            if len(text) == 1:
                counts[text[0]] += table("p", (text[0],), 4)
            else:
                counts[text[0], text[1]] += 1
    expected = targets(2, 4) * steps
    # 8 degrees of freedom: the chance to be above 26 is 1 in 1,000, and the seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 26
