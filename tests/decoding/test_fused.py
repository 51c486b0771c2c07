"""Merged drafts hold both trees, and the text stays the target's."""

from __future__ import annotations

import random

import pytest
import torch

from tests.toys import adapters as toys
from trainer.decoding import fused
from trainer.decoding.fused import Fused, merge
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Strategy, generate, generate_batch
from trainer.drafters import Draft, Drafter, DrafterError, Target, chain
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.recycling import TokenRecycling
from trainer.speculate import Options


def tree(draw, count, drawn):
    parents = [draw.randrange(-1, node) for node in range(count)]
    tokens: list[int] = []
    for parent in parents:  # no two siblings with one token
        used = {token for token, other in zip(tokens, parents, strict=False) if other == parent}
        tokens.append(draw.choice([token for token in range(count + 4) if token not in used]))
    rows = torch.tensor([parent + 1 for parent in parents]) if drawn else None
    q = torch.rand(count + 1, 9) if drawn else None
    return Draft(torch.tensor(tokens), torch.tensor(parents), q, rows)


def strings(draft):
    """The texts from the newest token to each node."""
    texts = []
    for parent, token in zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True):
        texts.append((*(texts[parent] if parent >= 0 else ()), token))
    return texts


@pytest.mark.parametrize("drawn", [False, True])
def test_a_merged_tree_is_the_union_of_both(drawn):
    draw = random.Random(3)
    shared = 0
    for _ in range(200):
        first, second = tree(draw, draw.randint(1, 8), drawn), tree(draw, draw.randint(0, 8), False)
        both = merge(first, second, 99)
        texts = strings(both)
        assert set(texts) == set(strings(first)) | set(strings(second))
        assert len(texts) == len(set(texts))
        shared += len(set(strings(first)) & set(strings(second)))
        count = len(first.tokens)
        assert both.tokens[:count].equal(first.tokens)
        if drawn:
            assert both.rows[:count].equal(first.rows)
            assert (both.rows[count:] == -1).all()
        few = merge(first, second, count + 2)
        assert len(few.tokens) <= count + 2
        assert set(strings(few)) <= set(texts)
    assert shared > 20


class Both(Drafter):
    """Keeps what two drafters proposed at each step."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.offsets, self.weights = parts, 8, [0.0] * 8
        self.proposals = []

    def start(self, target):
        return [part.start(target) for part in self.parts]

    def propose(self, memory, target, update, build):
        drafts = [
            part.propose(part_memory, target, update, build)
            for part, part_memory in zip(self.parts, memory, strict=True)
        ]
        self.proposals.append(drafts)
        return drafts[-1]


def test_greedy_texts_stay_and_no_step_is_shorter_than_by_the_better_of_both():
    target = Target(toys.llama(torch.float32))
    vocabulary = target.config.vocab_size
    prompts = [torch.tensor([5, 9, 13, 7, 5, 9]), torch.tensor([40, 41])]
    for prompt in prompts:
        plain = generate(target, None, prompt, 40, []).tokens
        stored = Both(
            [
                PromptLookup(6),
                TokenRecycling(vocabulary),
                Fused(TokenRecycling(vocabulary), PromptLookup(6)),
            ]
        )
        result = generate(target, stored, prompt, 40, [])
        assert result.tokens == plain
        position = 1
        for drafts, (_, taken) in zip(stored.proposals, result.drafts, strict=False):
            rest = plain[position:]
            best = 0
            for draft in drafts[:2]:
                fits = [text for text in strings(draft) if list(text) == rest[: len(text)]]
                best = max(best, max(map(len, fits), default=0))
            assert taken >= min(best, len(rest) - 1)
            position += taken + 1
    batch = Fused(TokenRecycling(vocabulary), PromptLookup(6))
    together = generate_batch(target, batch, prompts, 40, [])
    assert [result.tokens for result in together] == [
        generate(target, None, prompt, 40, []).tokens for prompt in prompts
    ]


def test_a_target_without_trees_gets_the_longer_chain(monkeypatch):
    def no_trees(target):
        raise DrafterError("no trees")

    monkeypatch.setattr(fused, "allow_trees", no_trees)

    class Fixed(Drafter):
        depth = 3

        def __init__(self, tokens):
            super().__init__()
            self.tokens = torch.tensor(tokens)

        def start(self, target):
            return None

        def propose(self, *_):
            return chain(self.tokens)

    for first, second, expected in (([1, 2], [3], [1, 2]), ([1], [3, 4], [3, 4])):
        drafter = Fused(Fixed(first), Fixed(second))
        memory = drafter.start(None)
        assert drafter.propose(memory, None, None, None).tokens.tolist() == expected


def test_other_rules_are_refused_before_and_while_decoding():
    for settings in ({"rule": "recursive"}, {"siblings": "spectr"}):
        faults = list(Options(run="x", prompt="x", drafter="run+lookup", **settings).faults())
        assert any("drawn and copied siblings" in fault for fault in faults)
    assert not list(Options(run="x", prompt="x", drafter="run+lookup").faults())
    target = Target(toys.llama(torch.float32))
    drafter = Fused(PromptLookup(), PromptLookup())
    with pytest.raises(DrafterError, match="only rule=traversal verifies"):
        generate(
            target,
            drafter,
            torch.tensor([1, 2]),
            4,
            [],
            Sampling(1.0, 1.0, seed=0),
            Strategy(rule="recursive"),
        )
