"""Rules of acceptance, by counting every way in which drafts can be drawn and verified: what comes
out is the target's, to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from trainer.decoding import verify
from trainer.drafters import Draft, chain


def rows(count, size, seed, zeros=False):
    draw = torch.Generator().manual_seed(seed)
    p = torch.randn(count, size, generator=draw, dtype=torch.float64).mul(1.5).softmax(-1)
    if zeros:  # as top-k and top-p leave them
        p = p * (torch.rand(count, size, generator=draw) < 0.6)
        p[:, 0] += 0.05
    return p / p.sum(-1, keepdim=True)


def draws(q, k, replacement):
    """((tokens, their chance) of all ordered draws of k tokens."""
    for tokens in itertools.product(range(len(q)), repeat=k):
        chance, now = 1.0, q.tolist()
        for token in tokens:
            chance *= now[token]
            if not replacement:
                now[token] = 0.0
                left = sum(now)
                now = [each / left for each in now] if left > 0 else now
        if chance > 0:
            yield tokens, chance


def outcome(steps, p, q, tokens):
    """(what is written after a place with these children: which child, or -1 and a distribution) as
    chances."""
    chances, left = steps(p[None], q[None], torch.tensor([tokens]), [len(tokens)])
    reached, actual = 1.0, []
    for chance in chances[0].tolist():
        actual.append(reached * chance)
        reached *= 1 - chance
    return actual, reached * left[0]


def outcomes(steps, p, q, tokens):
    """`outcome` of several families of as many children: (families, children) chances, and
    (families, tokens) of the distribution times the chance of -1."""
    count = len(tokens)
    chances, left = steps(
        p.expand(count, -1), q.expand(count, -1), torch.tensor(tokens), [len(tokens[0])] * count
    )
    refused = (1 - chances).cumprod(1)
    before = torch.cat([torch.ones_like(refused[:, :1]), refused[:, :-1]], 1)
    return before * chances, refused[:, -1:] * left


STEPS = {
    "with replacement": (verify.with_replacement, True),
    "without replacement": (verify.without_replacement, False),
    "spectr": (verify.spectr, True),
}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rule", STEPS)
def test_a_token_is_distributed_as_the_targets(rule, zeros):
    steps, replacement = STEPS[rule]
    for seed in range(8):
        size, k = 3 + seed % 4, 1 + seed % 3
        p, q = rows(2, size, seed, zeros)
        tokens, drawn = zip(*draws(q, k, replacement), strict=True)
        chance, total = torch.tensor(drawn, dtype=torch.float64)[:, None], sum(drawn)
        taken, left = outcomes(steps, p, q, tokens)
        written = (chance * left).sum(0)
        written.index_add_(0, torch.tensor(tokens).flatten(), (chance * taken).flatten())
        # Where fewer tokens than k have a chance, the draws without replacement end with tokens
        # that have none.
        if total > 1 - 1e-9:
            assert float((written - p).abs().max()) < 1e-12
        else:
            assert zeros


def test_the_first_child_is_taken_as_often_as_p_and_q_share():
    p, q = rows(2, 5, 3)
    for steps, replacement in STEPS.values():
        actual = sum(
            chance * outcome(steps, p, q, tokens)[0][0]
            for tokens, chance in draws(q, 1, replacement)
        )
        assert abs(actual - float(torch.minimum(p, q).sum())) < 1e-12


def test_more_children_are_taken_more_often_and_without_replacement_most():
    p, q = rows(2, 5, 8)
    taken = {}
    for rule, (steps, replacement) in STEPS.items():
        for k in (1, 2, 3):
            tokens, chance = zip(*draws(q, k, replacement), strict=True)
            accepted, _ = outcomes(steps, p, q, tokens)
            taken[rule, k] = float(accepted.sum(1) @ torch.tensor(chance, dtype=torch.float64))
    for rule in STEPS:
        assert taken[rule, 1] < taken[rule, 2] < taken[rule, 3]
    assert taken["without replacement", 2] > taken["with replacement", 2]


def test_children_that_have_no_chance_are_not_taken_and_change_nothing():
    p, q = rows(2, 4, 1)
    q[2] = q[3] = 0
    q = q / q.sum()
    one = outcome(verify.without_replacement, p, q, [0, 1])
    more = outcome(verify.without_replacement, p, q, [0, 1, 2, 3])
    assert more[0] == [*one[0], 0.0, 0.0]
    assert torch.equal(one[1], more[1])


def test_families_together_have_the_outcomes_of_each_alone():
    p, q = rows(2, 5, 8)
    for steps, replacement in STEPS.values():
        tokens, _ = zip(*draws(q, 3, replacement), strict=True)
        taken, left = outcomes(steps, p, q, tokens[::7])
        for row, family in enumerate(tokens[::7]):
            alone, rest = outcome(steps, p, q, family)
            assert taken[row].tolist() == pytest.approx(alone, abs=1e-12)
            torch.testing.assert_close(left[row], rest, rtol=0, atol=1e-12)


def test_parents_with_few_children_do_not_feel_those_with_many():
    p, q = rows(3, 5, 2), rows(3, 5, 9)
    children = torch.tensor([[4, 1, 0], [2, 3, 2], [1, 1, 1]])
    for steps, _ in STEPS.values():
        chances, left = steps(p, q, children, [3, 2, 1])
        for row, width in enumerate([3, 2, 1]):
            alone, rest = steps(
                p[row : row + 1], q[row : row + 1], children[row : row + 1, :width], [width]
            )
            torch.testing.assert_close(chances[row, :width], alone[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(left[row], rest[0], rtol=0, atol=1e-12)


def steps_of(monkeypatch, p, draft, rule):
    """(path, what the token after it is drawn from, chance) of all ways in which a drawn tree may
    be verified: every comparison of a uniform number with a chance goes both ways."""
    events = []

    class Uniform:
        def __init__(self, shape, **_):
            self.shape = shape

        def __lt__(self, chances):
            events[:] = [*chances.flatten().tolist()]
            return torch.tensor(answers).view(self.shape)

    lefts = []
    monkeypatch.setattr(torch, "rand", Uniform)
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda left, *_, **__: (lefts.append(left), torch.zeros(len(left), 1, dtype=torch.long))[1],
    )
    parents = draft.parents.tolist()
    # padded to the widest
    families = len(set(parents)) * max(parents.count(parent) for parent in parents)
    for answers in itertools.product([False, True], repeat=families):
        path = verify.walk(parents, verify.sampled(p, [draft], None, rule).taken.tolist())
        chance = 1.0
        for event, answer in zip(events, answers, strict=True):
            chance *= event if answer else 1 - event
        yield path, lefts[-1][path[-1] + 1 if path else 0], chance


# A tree of two levels over three tokens: two children of the newest one, one child of the first of
# them.
ABOVE = [-1, -1, 0]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["without replacement", "with replacement", "spectr", "chain"])
def test_a_tree_of_two_levels_writes_pairs_as_the_target_does(kind, monkeypatch):
    size = 3
    # after the newest token, and after each token that may follow it
    p, q = rows(size + 1, size, 4), rows(size + 1, size, 5)
    above = [-1, 0] if kind == "chain" else ABOVE
    replacement = kind in ("with replacement", "spectr")
    actual = torch.zeros(size, size, dtype=torch.float64)
    for first, chance in draws(q[0], 1 if kind == "chain" else 2, replacement):
        for second, more in draws(q[1 + first[0]], 1, True):
            tokens = (*first, *second)
            rows_of = torch.tensor([0] * len(first) + [1])
            draft = Draft(
                torch.tensor(tokens),
                torch.tensor(above),
                torch.stack([q[0], q[1 + first[0]]]),
                rows_of,
                replacement,
            )
            places = p[[0, *(1 + token for token in tokens)]]
            for path, left, way in steps_of(
                monkeypatch, places, draft, "spectr" if kind == "spectr" else "recursive"
            ):
                weight = chance * more * way
                if not path:  # the second token is the next step's
                    actual += weight * left.unsqueeze(1) * p[1:]
                elif len(path) == 1:
                    actual[tokens[path[0]]] += weight * left
                else:
                    actual[tokens[path[0]], tokens[path[1]]] += weight
    assert float((actual - p[0].unsqueeze(1) * p[1:]).abs().max()) < 1e-12


def test_children_that_are_chosen_without_chance_write_as_the_target_does(monkeypatch):
    p = rows(4, 3, 4)
    draft = Draft(torch.tensor([2, 0, 1]), torch.tensor(ABOVE))
    places, actual = p[[0, 3, 1, 2]], torch.zeros(3, 3, dtype=torch.float64)
    for own in itertools.product(range(3), repeat=4):
        monkeypatch.setattr(
            torch, "multinomial", lambda *_, own=own, **__: torch.tensor(own).unsqueeze(1)
        )
        path = verify.walk(ABOVE, verify.sampled(places, [draft]).taken.tolist())
        text = [*draft.tokens[path].tolist(), own[path[-1] + 1 if path else 0]]
        chance = float(places[range(4), list(own)].prod())
        if len(text) == 1:
            actual[text[0]] += chance * p[1 + text[0]]
        else:
            actual[text[0], text[1]] += chance
    assert float((actual - p[0].unsqueeze(1) * p[1:]).abs().max()) < 1e-12


def test_typical_acceptance_is_not_the_targets():
    p = torch.tensor([[0.6, 0.3, 0.1]] * 2, dtype=torch.float64)
    counts = torch.zeros(3)
    generator = torch.Generator().manual_seed(0)
    draft = chain(torch.tensor([1]))
    for _ in range(300):
        verdict = verify.typical_lossy(p, [draft], generator)
        path = verify.walk([-1], verdict.taken.tolist())
        counts[1 if path else int(verdict.next_tokens[0])] += 1
    # 0.3 is enough, so that the target's best token is never written
    assert counts.tolist() == [0, 300, 0]


def test_typical_acceptance_takes_the_longest_path_and_of_those_the_likeliest():
    p = torch.tensor([[0.5, 0.3, 0.2]] * 6, dtype=torch.float64)
    draft = Draft(torch.tensor([0, 1, 2, 0, 2]), torch.tensor([-1, -1, 0, 1, 1]))
    verdict = verify.typical_lossy(p, [draft], torch.Generator().manual_seed(0))
    assert verdict.taken.all()
    assert verify.walk([-1, -1, 0, 1, 1], verdict.taken.tolist(), verdict.weights.tolist()) == [
        1,
        3,
    ]
    assert verify.walk([-1, -1, 0, 1, 1], verdict.taken.tolist()) == [0, 2]
    refused = verify.typical_lossy(
        torch.tensor([[0.96, 0.04, 0.0]] * 6, dtype=torch.float64), [draft]
    ).taken
    assert refused.tolist() == [True, False, False, True, False]


def test_greedy_follows_the_best_guesses():
    best = torch.tensor([3, 1, 4, 0, 2, 2])
    logits = torch.nn.functional.one_hot(best, 5).float()
    draft = Draft(torch.tensor([3, 2, 1, 4, 1]), torch.tensor([-1, -1, 0, 2, 1]))
    verdict = verify.greedy(logits, [draft])
    assert verdict.next_tokens.tolist() == best.tolist()
    assert verify.walk(draft.parents.tolist(), verdict.taken.tolist()) == [0, 2]
    none = Draft(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))
    assert verify.walk([], verify.greedy(logits[:1], [none]).taken.tolist()) == []


def test_drafts_that_are_verified_together_are_as_alone(monkeypatch):
    p = rows(10, 4, 7).float()
    q = rows(3, 4, 8).float()
    drafts = [
        Draft(torch.tensor([1, 0, 2]), torch.tensor([-1, -1, 1]), q[:2], torch.tensor([0, 0, 1])),
        chain(torch.tensor([], dtype=torch.long)),
        Draft(torch.tensor([3, 3]), torch.tensor([-1, -1]), q[2:], torch.tensor([0, 0]), True),
        chain(torch.tensor([2])),
    ]
    lefts = []
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda left, *_, **__: (lefts.append(left), torch.zeros(len(left), 1, dtype=torch.long))[1],
    )
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.4))
    together = verify.sampled(p, drafts)
    place = node = 0
    for draft in drafts:
        n = len(draft.tokens)
        alone = verify.sampled(p[place : place + n + 1], [draft])
        torch.testing.assert_close(lefts[0][place : place + n + 1], lefts[-1], rtol=1e-6, atol=1e-7)
        assert together.taken[node : node + n].tolist() == alone.taken.tolist()
        place, node = place + n + 1, node + n
    assert together.taken.any()
