"""The search by evolution: its budget, its path, and what it finds, against all candidates."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

from tests.toys.families import model_of
from trainer.shrinking import divergence, drop_layers, evolution
from trainer.shrinking.evolution import Levels, Search, Sets, Settings
from trainer.shrinking.families import FAMILIES, layers_of

CPU = torch.device("cpu")
ROWS = [torch.arange(3, 3 + count) for count in (9, 14, 9)]
SMALL = Settings(6, offspring=5, initial=4, stages=((2, 20), (1, 100)))


def tangled(gone):
    """A number for a set, which no sum over its parts gives."""
    return random.Random(str(gone)).random()


def judged(log=None):
    def fitness(candidates, tokens, draw):
        if log is not None:
            log.append((list(candidates), tokens))
        return [tangled(gone) for gone in candidates]

    return fitness


def test_it_finds_the_best_of_all_sets():
    best = min(itertools.combinations(range(6), 2), key=tangled)
    for seed in range(3):
        job = Search(Sets(6, 2), judged(), seed, SMALL)
        job.start([(0, 1)])
        while job.generation < SMALL.generations:
            job.step()
        assert job.parent == best


def test_every_generation_keeps_the_budget_and_is_never_worse():
    log = []
    job = Search(Sets(12, 4), judged(log), 3, replace(SMALL, initial=0))
    job.start([(0, 1, 2, 3)])
    assert job.parent == (0, 1, 2, 3)
    values = [tangled(job.parent)]
    for _ in range(8):
        parent, seen = job.parent, len(log)
        job.step()
        values.append(tangled(job.parent))
        stages = log[seen:]
        assert [tokens for _, tokens in stages] == [20, 100]
        assert len(stages[0][0]) == len(set(stages[0][0])) == 5
        assert parent not in stages[0][0]
        assert parent in stages[1][0]
        assert len(stages[1][0]) == 3  # two survivors and the parent
        for gone in stages[0][0]:
            assert len(set(gone)) == 4
            assert 1 <= len(set(gone) - set(parent)) <= 3
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


LEVELS = Levels(((4, 6), (6, 4), (4, 6), (6, 4), (4, 6)), -2, 1)


@pytest.mark.parametrize("space", [Sets(10, 3), LEVELS])
def test_the_same_seed_takes_the_same_path_and_a_search_resumes_on_it(space):
    def path(seed, stop=None):
        job = Search(space, judged(), seed, SMALL)
        job.start([])
        parents = [job.parent]
        while job.generation < 6:
            if job.generation == stop:
                state = json.loads(json.dumps(job.state()))
                job = Search(space, judged(), seed, SMALL)
                assert job.load(state)
            parents.append(job.step())
        return parents

    assert path(1) == path(1) == path(1, stop=3)
    assert path(1) != path(2)
    other = Search(Sets(10, 4), judged(), 1, SMALL)
    assert not other.load({"parent": [1, 2, 3], "generation": 2})
    assert not other.load({"parent": [1, 2, 3, 10], "generation": 2})
    assert not other.load({"generation": 2})


def test_levels_keep_the_number_of_entries_and_their_bounds():
    log = []
    job = Search(LEVELS, judged(log), 0, replace(SMALL, initial=3))
    job.start([(0,) * 5])
    for _ in range(12):
        job.step()
    seen = {levels for candidates, _ in log for levels in candidates}
    assert len(seen) > 12
    for levels in seen:
        assert sum(levels[0::2]) == sum(levels[1::2]) == 0  # for each shape
        assert set(levels) <= {-2, -1, 0, 1}
        assert LEVELS.holds(levels)
    assert not LEVELS.holds((1, -1, 0, 0, 0))
    assert not LEVELS.holds((2, 0, -2, 0, 0))
    assert not LEVELS.holds((0, 0, 0, 0))


def test_a_set_from_outside_may_win_at_the_start():
    best = min(itertools.combinations(range(9), 3), key=tangled)
    job = Search(Sets(9, 3), judged(), 0, Settings(1, initial=1))
    job.start([best])
    assert job.parent == best


def test_the_papers_number_of_generations():
    assert evolution.generations_of(32, 8) == 128
    assert evolution.generations_of(2, 1) == 1


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "phi"])
def test_divergences_are_those_of_models_without_the_layers(name, monkeypatch):
    monkeypatch.setattr(divergence, "TOP", 5)
    monkeypatch.setattr(divergence, "CHUNK", 4)
    shape = FAMILIES[name]
    model = model_of(name).float()
    layers = layers_of(model, shape)
    judge = divergence.Divergence(model, layers, ROWS, CPU, drop_layers.without(len(layers)))
    assert judge.of((), [0, 1, 2]) == pytest.approx(0.0, abs=1e-6)
    smaller = model_of(name).float()
    drop_layers.drop(smaller, shape, [1])
    total = count = 0.0
    for row in ROWS[:2]:
        with torch.no_grad():
            p, q = (
                each(input_ids=row[None], use_cache=False).logits[0].double().softmax(-1)
                for each in (model_of(name).float(), smaller)
            )
        for one, other in zip(p, q, strict=True):
            top = one.argsort(descending=True)[:5]
            rest_p, rest_q = 1 - one[top].sum(), 1 - other[top].sum()
            total += float((one[top] * (one[top] / other[top]).log()).sum())
            total += float(rest_p * (rest_p / rest_q).log())
        count += len(row)
    assert total > 0
    assert judge.of((1,), [0, 1]) == pytest.approx(total / count, rel=1e-4)
    # rows are drawn until there are enough tokens
    values = judge([(0,), (1,)], 10**6, random.Random(0))
    assert values == pytest.approx([judge.of((0,), [0, 1, 2]), judge.of((1,), [0, 1, 2])])
