"""Token Recycling: its table is that of the target's last word on each token, its trees are those
read from it by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.toys import adapters as toys
from trainer.decoding.speculative import generate_batch
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.drafters.recycling import TokenRecycling, levels

V = 23


def update(newest, tried=None):
    nothing = torch.zeros(1, 0)
    return TargetUpdate(nothing, nothing, torch.tensor([newest]), tried=tried)


def paths(shape):
    """The ranks that lead to each node, level by level."""
    above, actual = [()], []
    for level in shape:
        above = [(*above[parent], rank) for parent, rank in level]
        actual += above
    return actual


@pytest.mark.parametrize(
    ("nodes", "candidates", "depth"),
    [(1, 1, 1), (7, 3, 4), (20, 2, 6), (80, 8, 6), (9, 8, 1), (5, 1, 3)],
)
def test_the_tree_holds_the_likeliest_paths(nodes, candidates, depth):
    actual = paths(levels(nodes, candidates, depth))

    def chance(path):
        product = 1.0
        for rank in path:
            product *= 0.45 * (rank + 1) ** -1.3
        return product

    everything = (
        p
        for d in range(1, depth + 1)
        for p in itertools.product(range(min(candidates, 8)), repeat=d)
        if d < 4 or sum(p) < 9
    )
    expected = sorted((chance(path) for path in everything), reverse=True)[:nodes]
    assert sorted(map(chance, actual), reverse=True) == pytest.approx(expected)
    assert len(set(actual)) == len(actual)
    assert all(path[:-1] in actual for path in actual if len(path) > 1)


def table(passes, candidates):
    """What the target last said, token by token."""
    stored = {}
    for tokens, logits in passes:
        for token, row in zip(tokens.tolist(), logits.tolist(), strict=True):
            stored[token] = sorted(range(V), key=lambda v: -row[v])[:candidates]
    return stored


def test_trees_are_read_from_the_targets_last_words():
    draw = torch.Generator().manual_seed(1)
    drafter = TokenRecycling(V, nodes=14, candidates=3, depth=4)
    shape, passes, sizes = paths(drafter.levels), [], []
    assert len(drafter.propose(None, None, update(4), None).tokens) == 0
    for _ in range(25):
        tried = torch.randint(0, V, (3,), generator=draw), torch.randn(3, V, generator=draw)
        passes.append(tried)
        newest = int(tried[0][-1])
        draft = drafter.propose(None, None, update(newest, tried), None)
        stored = table(passes, 3)
        expected = {}
        for path in shape:
            token = newest
            for rank in path:
                token = stored[token][rank] if token in stored else None
                if token is None:
                    break
            if token is not None:
                expected[path] = token
        numbers = {path: number for number, path in enumerate(expected)}
        assert draft.tokens.tolist() == list(expected.values())
        assert draft.parents.tolist() == [numbers.get(path[:-1], -1) for path in expected]
        assert draft.probabilities is None
        sizes.append(len(expected))
    assert sizes[0] < sizes[-1] == 14


def test_it_fits_two_megabytes():
    drafter = TokenRecycling(49152)
    assert drafter.following.numel() * drafter.following.element_size() < 2 << 20
    assert drafter.state() == {}


@pytest.mark.parametrize("setting", ["nodes", "candidates", "depth"])
def test_numbers_below_one_are_refused(setting):
    with pytest.raises(DrafterError, match=f"{setting}=0"):
        TokenRecycling(V, **{setting: 0})


def test_the_decoders_text_stays_and_repeats_are_drafted():
    target = Target(toys.llama(torch.float32, tie_word_embeddings=False))
    prompts = [torch.tensor([5, 9, 13, 7]), torch.tensor([40, 41])]
    plain = generate_batch(target, None, prompts, 30, [])
    for requested in (prompts, prompts[:1]):
        actual = generate_batch(target, TokenRecycling(64, 20), requested, 30, [])
        assert [result.tokens for result in actual] == [
            result.tokens for result in plain[: len(requested)]
        ]
    drafter = TokenRecycling(64, 20)
    first, second = (generate_batch(target, drafter, prompts[:1], 30, [])[0] for _ in range(2))
    assert second.tokens == first.tokens == plain[0].tokens
    assert second.steps < first.steps  # what was seen the first time is known the second
