"""What a static tree is searched from: ranks against ones that a drafter was given, replayed steps
against decoded ones."""

from __future__ import annotations

import random

import pytest
import torch

from tests.toys.speculative import PROMPT, alone, tiny
from trainer.decoding import calibration, clock
from trainer.decoding.calibration import (
    acceptance,
    fastest_tree,
    greedy_text,
    least_seconds,
    ranks,
    replay,
    time_drafting,
    time_verification,
)
from trainer.decoding.speculative import Strategy, generate
from trainer.decoding.trees import EAGLE1, Levels
from trainer.drafters import Drafter, DrafterError, Target

V, DEPTH = 41, 5


class Known(Drafter):
    """Gives the text's token i, drafted after the newest token n, the rank order[n][i - n - 1]."""

    offsets = DEPTH

    def __init__(self, ids, order, vocabulary=None):
        super().__init__()
        self.ids, self.order, self.vocabulary = ids, order, vocabulary

    def start(self, target):
        return []

    def grow(self, memory, target, update):
        assert (update.first is None) == bool(memory)
        assert len(update.hidden) == len(update.ids) >= 1
        memory += update.ids.tolist()
        assert memory == self.ids[1 : len(memory) + 1]
        return Said(self, len(memory))


class Said:
    branches, confidence = True, None

    def __init__(self, drafter, newest):
        self.drafter, self.newest, self.depths = drafter, newest, []
        self.depth, self.vocabulary = drafter.offsets, drafter.vocabulary

    def logits(self, depth):
        drafter, at = self.drafter, self.newest + 1 + depth
        order = list(range(V)) if drafter.vocabulary is None else drafter.vocabulary.tolist()
        if at < len(drafter.ids) and drafter.ids[at] in order:
            order.remove(drafter.ids[at])
            order.insert(drafter.order[self.newest][depth], drafter.ids[at])
        where = {
            token: place
            for place, token in enumerate(
                range(V) if drafter.vocabulary is None else drafter.vocabulary.tolist()
            )
        }
        logits = torch.zeros(len(order))
        for rank, token in enumerate(order):
            logits[where[token]] = -float(rank)
        return logits

    def first(self):
        return self.logits(0)

    def extend(self, tokens, parents):
        depth = 1 + (self.depths[parents[0]] if parents[0] >= 0 else 0)
        self.depths += [depth] * len(tokens)
        return self.logits(depth).expand(len(tokens), -1)


@pytest.fixture(scope="module")
def target():
    return Target(tiny())


def known(target, prompt, count, seed, vocabulary=None):
    """(drafter, whole text, the ranks it gives)."""
    draw = random.Random(seed)
    ids = prompt.tolist() + alone(target.model, prompt, count)
    order = [[min(12, int(draw.expovariate(0.7))) for _ in range(DEPTH)] for _ in ids]
    return Known(ids, order, vocabulary), ids, order


def cut(row, width):
    """Up to the first that is not among the `width` best."""
    stored = []
    for rank in row:
        stored.append(min(rank, width))
        if rank >= width:
            break
    return stored


@pytest.mark.long
@pytest.mark.parametrize("width", [1, 3, 10])
def test_ranks_are_those_of_the_texts_own_tokens(target, width):
    drafter, ids, order = known(target, PROMPT, 20, 1)
    text = greedy_text(target, drafter, PROMPT, 20, [])
    assert text.ids.tolist() == ids
    actual = ranks(target, drafter, text, width, 4)
    assert actual == [
        cut(order[n][: min(4, len(ids) - 1 - n)], width) for n in range(len(PROMPT), len(ids) - 1)
    ]
    assert len({len(row) for row in actual}) > 1


def test_what_a_draft_vocabulary_lacks_is_never_right(target):
    vocabulary = torch.arange(1, V, 2)
    drafter, ids, order = known(target, PROMPT, 20, 2, vocabulary)
    actual = ranks(target, drafter, greedy_text(target, drafter, PROMPT, 20, []), 6, 3)
    for n, row in enumerate(actual, len(PROMPT)):
        expected = [
            rank if ids[n + 1 + i] % 2 else 99
            for i, rank in enumerate(order[n][: min(3, len(ids) - 1 - n)])
        ]
        assert row == cut(expected, 6)


def test_a_growth_that_ends_early_is_wrong_there(target):
    drafter, _, order = known(target, PROMPT, 20, 3)
    drafter.offsets = 2
    actual = ranks(target, drafter, greedy_text(target, drafter, PROMPT, 20, []), 41, 4)
    assert actual[0] == [*order[len(PROMPT)][:2], 41]


def test_acceptance_is_how_often_a_rank_is_right_below_right_nodes():
    draw = random.Random(4)
    texts = [
        [cut([draw.choice([0, 0, 0, 1, 2, 5]) for _ in range(min(3, n + 1))], 4) for n in range(40)]
        for _ in range(3)
    ]
    for width in (1, 2, 4):
        table = acceptance(texts, width)
        assert len(table) == 3
        for depth, row in enumerate(table):
            at = []
            for text in texts:
                for place in text:
                    if len(place) > depth and all(rank < width for rank in place[:depth]):
                        at.append(place[depth])
            assert row == [sum(rank == r for rank in at) / len(at) for r in range(width)]
    assert acceptance([[[3]], []], 2) == [[0.0, 0.0]]
    assert acceptance([], 2) == []


@pytest.mark.parametrize(
    "paths",
    [list(EAGLE1), [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], [(1,), (0,), (1, 2), (2,)], [(3,)]],
)
def test_a_replay_takes_as_many_steps_as_decoding(target, paths):
    texts, tokens, steps = [], 0, 0
    for seed, count in ((5, 26), (6, 1), (7, 14)):
        prompt = PROMPT.roll(seed)
        drafter, ids, _ = known(target, prompt, count, seed)
        stop = [ids[-1]] if seed == 7 else []
        texts.append(
            ranks(target, drafter, greedy_text(target, drafter, prompt, count, stop), 10, DEPTH)
        )
        decoded = generate(target, drafter, prompt, count, stop, strategy=Strategy(Levels(paths)))
        tokens, steps = tokens + len(decoded.tokens) - 1, steps + decoded.steps
    assert replay(texts, paths) == tokens / steps > 1
    assert replay(texts, []) == 1
    assert replay([], paths) == 1


def test_costs_are_the_least_of_each_width_and_linear_between():
    chain = {4: [5.0, 3.5], 1: [1.0, 2.0], 2: [1.5]}
    assert least_seconds({"chain": chain}, 3) == {"chain": [1.0, 1.5, 2.5, 3.5]}


def test_a_pass_takes_no_longer_than_one_over_more_tokens_or_over_a_tree():
    chain, tree = {1: [2.0], 2: [9.0], 3: [3.0]}, {1: [1.5], 2: [4.0], 3: [3.5]}
    assert least_seconds({"chain": chain, "tree": tree}, 2) == {
        "chain": [1.5, 3.0, 3.0],
        "tree": [1.5, 3.5, 3.5],
    }


def test_passes_and_drafts_are_timed(target, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(calibration, "working", lambda device: float(next(clock)))
    seconds = time_verification(target, PROMPT, [1, 2, 9], 3)
    assert seconds == {shape: {n: [1.0] * 3 for n in (1, 2, 9)} for shape in ("chain", "tree")}
    assert list(time_verification(target, PROMPT, [1, 2], 1, trees=False)) == ["chain"]
    drafter, _, _ = known(target, PROMPT, 12, 8)
    text = greedy_text(target, drafter, PROMPT, 12, [])
    assert time_drafting(target, drafter, text, [[(0,)], [(0,), (1,), (0, 0)]]) == [1.0, 1.0]
    with pytest.raises(DrafterError, match="too short to measure"):
        time_drafting(target, drafter, greedy_text(target, drafter, PROMPT, 4, []), [[(0,)]])


def test_each_pass_comes_after_the_same_context(target, monkeypatch):
    seen, reads = [], calibration.TargetCache.read

    def read(self, tokens, parents):
        states = reads(self, tokens, parents)
        seen.append((self.whole, self.lengths[0], states[0][0][0]))
        return states

    monkeypatch.setattr(calibration.TargetCache, "read", read)
    time_verification(target, PROMPT, [1, 2, 5], 2)
    assert {length for _, length, _ in seen} == {len(PROMPT)}
    for _, _, newest in seen:
        torch.testing.assert_close(newest, seen[0][2])


TEXT = [[[0, 0, 0, 0][: 40 - n] if n % 4 else [1, 0, 2][: 40 - n] for n in range(40)]]


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 3.0])
def test_the_fastest_chain_is_the_one_of_all_lengths(level):
    verify = [1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 2.5]
    actual = fastest_tree(
        TEXT,
        {"chain": 1},
        {"chain": verify},
        lambda trees: [level * max(map(len, paths)) for paths in trees],
    )
    rates = {0: 1 / verify[0]}
    for length in range(1, 5):
        paths = [(0,) * k for k in range(1, length + 1)]
        rates[length] = replay(TEXT, paths) / (verify[length] + level * length)
    best = max(rates, key=rates.get)
    assert actual.paths == [(0,) * k for k in range(1, best + 1)]
    assert actual.tokens / actual.seconds == pytest.approx(rates[best])
    assert (best == 0) == (level == 3.0)


def test_trees_are_taken_where_their_passes_are_worth_it():
    flat, dear = [1.0] + [1.1] * 8, [1.0] + [2.9] * 8
    widths = {"chain": 1, "tree": 3}
    free = fastest_tree(
        TEXT, widths, {"chain": flat, "tree": flat}, lambda trees: [0.0] * len(trees)
    )
    assert {(0,), (1,), (0, 0), (1, 0)} <= set(free.paths)
    assert free.tokens > replay(TEXT, [(0,) * k for k in range(1, 5)])
    assert Levels(free.paths).branches
    only = fastest_tree(
        TEXT, widths, {"chain": flat, "tree": dear}, lambda trees: [0.0] * len(trees)
    )
    assert only.paths == [(0,), (0, 0), (0, 0, 0)]


def test_a_drafter_with_trees_of_its_own_is_refused():
    class Own(Known):
        def propose(self, *rest):
            raise AssertionError

    calibration.refuse_own_trees(Known([], []))
    with pytest.raises(DrafterError, match="Own builds its own trees"):
        calibration.refuse_own_trees(Own([], []))


def test_one_thread_counts_processor_seconds(monkeypatch):
    monkeypatch.setattr(clock.time, "process_time", lambda: 7.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 9.0)
    for threads, seconds in ((1, 7.0), (2, 9.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert clock.working(torch.device("cpu")) == seconds
