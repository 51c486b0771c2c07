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
    above, found = [()], []
    for level in shape:
        above = [(*above[parent], rank) for parent, rank in level]
        found += above
    return found


@pytest.mark.parametrize(
    ("nodes", "candidates", "depth"),
    [(1, 1, 1), (7, 3, 4), (20, 2, 6), (80, 8, 6), (9, 8, 1), (5, 1, 3)],
)
def test_the_tree_holds_the_likeliest_paths(nodes, candidates, depth):
    found = paths(levels(nodes, candidates, depth))

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
    wanted = sorted((chance(path) for path in everything), reverse=True)[:nodes]
    assert sorted(map(chance, found), reverse=True) == pytest.approx(wanted)
    assert len(set(found)) == len(found)
    assert all(path[:-1] in found for path in found if len(path) > 1)


def table(passes, candidates):
    """What the target last said, token by token."""
    kept = {}
    for tokens, logits in passes:
        for token, row in zip(tokens.tolist(), logits.tolist(), strict=True):
            kept[token] = sorted(range(V), key=lambda v: -row[v])[:candidates]
    return kept


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
        kept = table(passes, 3)
        wanted = {}
        for path in shape:
            token = newest
            for rank in path:
                token = kept[token][rank] if token in kept else None
                if token is None:
                    break
            if token is not None:
                wanted[path] = token
        numbers = {path: number for number, path in enumerate(wanted)}
        assert draft.tokens.tolist() == list(wanted.values())
        assert draft.parents.tolist() == [numbers.get(path[:-1], -1) for path in wanted]
        assert draft.probabilities is None
        sizes.append(len(wanted))
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
    for asked in (prompts, prompts[:1]):
        found = generate_batch(target, TokenRecycling(64, 20), asked, 30, [])
        assert [result.tokens for result in found] == [
            result.tokens for result in plain[: len(asked)]
        ]
    drafter = TokenRecycling(64, 20)
    first, second = (generate_batch(target, drafter, prompts[:1], 30, [])[0] for _ in range(2))
    assert second.tokens == first.tokens == plain[0].tokens
    assert second.steps < first.steps  # what was seen the first time is known the second
