"""Which rows a step takes, and the tensors they become, against plain loops."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from trainer.data.batches import Batches, BatchOrder, Collate, Pick, Sequences
from trainer.data.cache_key import FEATURES
from trainer.data.lengths import Report
from trainer.data.render import Tokens
from trainer.data.rows import Rows

SHAPES = [  # rows, batch_size, accumulate, ranks
    (1, 1, 1, 1),
    (7, 2, 1, 1),
    (12, 3, 2, 1),
    (13, 2, 3, 1),
    (5, 8, 1, 1),
    (13, 2, 1, 3),
    (24, 2, 2, 3),
    (25, 2, 2, 3),
    (3, 2, 2, 4),
]


def sizes(count: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(count)
    lengths = draw.integers(2, 60, count)
    return lengths, np.array([draw.integers(1, length) for length in lengths])


def plan(
    rows: int = 13,
    batch_size: int = 2,
    accumulate: int = 1,
    ranks: int = 1,
    seed: int = 0,
    **options,
) -> BatchOrder:
    return BatchOrder(*sizes(rows), seed, batch_size, accumulate, ranks, **{"epochs": 1, **options})


def order(built: BatchOrder, steps: range) -> list[list[list[list[Pick]]]]:
    """Picks by step, rank and micro-batch."""
    return [[built.micro_batches(step, rank) for rank in range(built.ranks)] for step in steps]


def counted(built: BatchOrder, steps: range) -> list[int]:
    """The sequences that train, in the order of the picks."""
    return [
        p.sequence
        for ranks in order(built, steps)
        for batches in ranks
        for batch in batches
        for p in batch
        if p.trains
    ]


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulate", "ranks", "epochs", "grouped"),
    [(*shape, 1 + i % 3, i % 2 == 1) for i, shape in enumerate(SHAPES)]
    + [(*shape, 2, i % 2 == 0) for i, shape in enumerate(SHAPES)],
)
def test_each_row_is_used_exactly_once_an_epoch_over_all_ranks(
    rows, batch_size, accumulate, ranks, epochs, grouped
):
    built = plan(rows, batch_size, accumulate, ranks, epochs=epochs, group_by_length=grouped)
    steps = built.steps(None, None)
    assert steps == -(-rows * epochs // (batch_size * accumulate * ranks))
    assert Counter(counted(built, range(steps))) == dict.fromkeys(range(rows), epochs)
    for epoch in range(epochs):
        assert sorted(built.at(epoch * rows + i) for i in range(rows)) == list(range(rows))
    assert built.positions(steps) == rows * epochs


@pytest.mark.parametrize(("rows", "batch_size", "accumulate", "ranks"), SHAPES)
def test_ranks_take_disjoint_shares_of_every_step_and_as_many_micro_batches(
    rows, batch_size, accumulate, ranks
):
    built = plan(rows, batch_size, accumulate, ranks, epochs=1)
    for step in range(built.steps(None, None)):
        shares = [built.micro_batches(step, rank) for rank in range(ranks)]
        # else a rank would wait for the others without end
        assert len({len(share) for share in shares}) == 1
        assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
        if ranks > 1:
            assert all(len(batch) == batch_size for share in shares for batch in share)
        first = step * batch_size * accumulate * ranks
        expected = [
            built.at(position)
            for position in range(first, min(first + batch_size * accumulate * ranks, rows))
        ]
        actual = [p.sequence for share in shares for batch in share for p in batch if p.trains]
        assert sorted(actual) == sorted(expected)
        assert len(set(actual)) == len(actual)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_micro_batches_take_the_order_one_after_another(ranks):
    built = plan(24, 2, 2, ranks)
    flat = [
        pick.sequence
        for step in range(24 // (4 * ranks))
        for number in range(2)
        for rank in range(ranks)
        for pick in built.micro_batches(step, rank)[number]
    ]
    assert flat == [built.at(position) for position in range(24)]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_depends_on_the_seed_and_the_step_only(grouped):
    options = {"epochs": 4, "group_by_length": grouped}
    whole = order(plan(25, 2, 2, 2, seed=3, **options), range(13))
    backwards = plan(25, 2, 2, 2, seed=3, **options)
    assert [order(backwards, range(step, step + 1))[0] for step in reversed(range(13))][
        ::-1
    ] == whole
    assert order(plan(25, 2, 2, 2, seed=3, **options), range(9, 13)) == whole[9:]
    np.random.seed(5)
    random.seed(5)
    assert order(plan(25, 2, 2, 2, seed=3, **options), range(13)) == whole
    assert order(plan(25, 2, 2, 2, seed=4, **options), range(13)) != whole


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_has_an_order_of_its_own(grouped):
    built = plan(30, 2, epochs=5, group_by_length=grouped)
    orders = {tuple(built.at(epoch * 30 + i) for i in range(30)) for epoch in range(5)}
    assert len(orders) == 5
    assert tuple(range(30)) not in orders


@pytest.mark.parametrize(("rows", "batch_size", "accumulate", "ranks"), SHAPES)
def test_window_tokens_are_the_trained_tokens_of_the_whole_step(
    rows, batch_size, accumulate, ranks
):
    built = plan(rows, batch_size, accumulate, ranks, epochs=1.5)
    used = 0
    for step in range(built.steps(None, None)):
        picks = [
            p for rank in range(ranks) for batch in built.micro_batches(step, rank) for p in batch
        ]
        naive = 0
        for pick in picks:
            if pick.trains:
                naive += int(built.trained[pick.sequence])
                used += 1
        assert {pick.window_tokens for pick in picks} == {naive}
        assert built.positions(step + 1) == used
    assert used == round(1.5 * rows)


@pytest.mark.parametrize(("epochs", "uses"), [(0.5, 10), (1, 20), (1.25, 25), (2.5, 50), (0.26, 5)])
def test_epochs_may_be_fractions(epochs, uses):
    built = plan(20, 3, epochs=epochs)
    steps = built.steps(None, None)
    assert steps == -(-uses // 3)
    times = Counter(counted(built, range(steps)))
    assert sum(times.values()) == uses
    assert set(times.values()) <= {uses // 20, uses // 20 + 1}


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (4, 4), (7, 7), (100, 7)])
def test_the_first_limit_ends_a_run(limit, expected):
    assert plan(20, 3).steps(limit, None) == expected
    assert plan(20, 3, epochs=None).steps(limit, None) == limit


def test_tokens_end_a_run_in_the_step_that_reaches_them():
    for ranks, epochs, tokens, max_steps in itertools.product(
        [1, 2], [1, 3, None], [1, 100, 137, 400, 10**6], [None, 6]
    ):
        if epochs is None and max_steps is None and tokens == 10**6:
            max_steps = 40
        tokens_end_a_run(tokens, epochs, ranks, max_steps)


def tokens_end_a_run(tokens, epochs, ranks, max_steps):
    """Count the steps of a run one by one until it has had so many tokens."""
    built = plan(20, 3, 1, ranks, epochs=epochs)
    most = min(max_steps or 10**9, -(-20 * epochs // (3 * ranks)) if epochs else 10**9)
    seen = expected = 0
    while seen < tokens and expected < most:
        seen += sum(
            int(built.lengths[sequence])
            for sequence in counted(built, range(expected, expected + 1))
        )
        expected += 1
    assert built.steps(max_steps, tokens) == expected, (tokens, epochs, ranks, max_steps)


@pytest.mark.parametrize(("more", "expected"), [(-1, 3), (0, 3), (1, 4)])
def test_a_step_that_reaches_the_tokens_exactly_is_the_last(more, expected):
    built = plan(20, 3)
    tokens = sum(int(built.lengths[sequence]) for sequence in counted(built, range(3)))
    assert built.steps(None, tokens + more) == expected


@pytest.mark.parametrize("rows", [40, 43])
def test_length_grouping_gives_each_batch_neighbours_in_length(rows):
    built = plan(rows, 4, group_by_length=True)
    batches = [[p.sequence for p in built.micro_batches(step)[0]] for step in range(rows // 4)]
    actual = sorted(
        (sorted(built.lengths[batch].tolist(), reverse=True) for batch in batches), reverse=True
    )
    longest_first = sorted(built.lengths.tolist(), reverse=True)
    assert actual == [longest_first[i : i + 4] for i in range(0, rows // 4 * 4, 4)]
    lengths = [built.lengths[batch].max() for batch in batches]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


def test_length_grouping_needs_less_padding_and_still_draws_batches_at_random():
    def padding(built: BatchOrder) -> int:
        batches = [
            [p.sequence for p in built.micro_batches(step)[0]]
            for step in range(built.steps(None, None))
        ]
        return sum(int(built.lengths[b].max() * len(b) - built.lengths[b].sum()) for b in batches)

    grouped, plain = plan(600, 4, group_by_length=True), plan(600, 4)
    assert padding(grouped) < 0.1 * padding(plain)
    # More rows than one sorted part holds: each epoch draws the rows of a part again.
    pairs = [
        {frozenset(grouped._order(epoch)[i : i + 4].tolist()) for i in range(0, 600, 4)}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 30


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("start", [0, 1, 3, 6, 7])
def test_the_sampler_started_at_a_step_yields_what_skipping_to_it_leaves(start, rank):
    def make(first: int) -> Batches:
        return Batches(plan(25, 2, 2, 2, epochs=2), first, 7, rank)

    whole = list(make(0))
    assert list(make(start)) == whole[start * 2 :]
    assert len(make(start)) == len(whole)  # counted from step 0


def test_the_samplers_length_counts_a_smaller_last_step():
    built = plan(13, 2, 3)  # steps of 6, 6 and 1
    for stop, expected in [(0, 0), (1, 3), (2, 6), (3, 7)]:
        assert len(Batches(built, 0, stop, 0)) == len(list(Batches(built, 0, stop, 0))) == expected


def rows_of(lengths: list[int], labels: list[int] | None = None) -> Rows:
    draw = random.Random(0)
    listed = [
        {
            "ids": [draw.randint(3, 99) for _ in range(length)],
            "trained": [draw.random() < 0.6 for _ in range(length - 1)] + [True],
            "label": labels[i] if labels else -1,
            "index": i,
            "where": str(i),
            "weight": 1.0,
        }
        for i, length in enumerate(lengths)
    ]
    return Rows(datasets.Dataset.from_list(listed, features=FEATURES), Report())


@pytest.mark.parametrize("packs", [None, [[2, 0], [1], [3, 4, 5]]])
def test_sequences_have_the_sizes_of_their_rows(packs):
    rows = rows_of([3, 9, 4, 1, 2, 5])
    built = Sequences(rows, packs)
    members = packs or [[i] for i in range(6)]
    assert len(built) == len(members)
    lengths, trained = built.sizes()
    for i, held in enumerate(members):
        pick, actual = built[Pick(i, True, 0)]
        assert (pick.sequence, built.members(i)) == (i, held)
        assert actual == [rows[row] for row in held]
        assert lengths[i] == sum(len(row.ids) for row in actual)
        # Nothing predicts the first token of a row.
        assert trained[i] == sum(flag for row in actual for flag in row.trained[1:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_collated_tensors_equal_plain_loops(packed, labelled):
    rows = rows_of([3, 9, 4, 8, 2, 5], [0, 1, 2, 1, 0, 2])
    sequences = Sequences(rows, [[2, 0], [1], [3, 4, 5]] if packed else None)
    picks = [Pick(0, True, 17), Pick(2, False, 17), Pick(1, True, 17)]
    batch = Collate(1, packed, labelled)([sequences[pick] for pick in picks])
    longest = max(
        sum(len(rows[row].ids) for row in sequences.members(pick.sequence)) for pick in picks
    )
    width = longest
    while width % 8:
        width += 1
    ids, labels, positions, mask, classes = [], [], [], [], []
    for pick in picks:
        one: dict[str, list[int]] = {"ids": [], "labels": [], "positions": [], "mask": []}
        for row in sequences.members(pick.sequence):
            for place, (token, trained) in enumerate(
                zip(rows[row].ids, rows[row].trained, strict=True)
            ):
                one["ids"].append(token)
                one["labels"].append(token if trained and place > 0 and pick.trains else -100)
                one["positions"].append(place)
                one["mask"].append(1)
            label = rows[row].label
        rest = width - len(one["ids"])
        ids.append(one["ids"] + [1] * rest)
        labels.append(one["labels"] + [-100] * rest)
        positions.append(one["positions"] + [0] * rest)
        mask.append(one["mask"] + [0] * rest)
        classes.append(label if pick.trains else -100)
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert (batch["window_tokens"], batch["sequences"]) == (17, [0, 2, 1])
    assert batch["lengths"].tolist() == [
        sum(one) * pick.trains for one, pick in zip(mask, picks, strict=True)
    ]
    assert ("position_ids" in batch, "attention_mask" in batch, "classes" in batch) == (
        packed,
        labelled,
        labelled,
    )
    if packed:
        assert batch["position_ids"].tolist() == positions
    if labelled:
        assert (batch["attention_mask"].tolist(), batch["classes"].tolist()) == (mask, classes)


@pytest.mark.parametrize(("rows", "batch_size", "accumulate", "ranks"), SHAPES)
def test_the_loaders_labels_and_tokens_are_those_that_the_plan_counts(
    rows, batch_size, accumulate, ranks
):
    sequences = Sequences(rows_of([random.Random(i).randint(2, 20) for i in range(rows)]))
    built = BatchOrder(*sequences.sizes(), 0, batch_size, accumulate, ranks, epochs=1)
    steps = built.steps(None, None)
    trained = tokens = windows = 0
    for rank in range(ranks):
        loader = DataLoader(
            sequences,
            batch_sampler=Batches(built, 0, steps, rank),
            collate_fn=Collate(0, False, False),
        )
        seen = list(loader)
        assert len(seen) == len(loader)
        trained += sum(int((batch["labels"] != -100).sum()) for batch in seen)
        tokens += sum(batch["tokens"] for batch in seen)
        windows = sum(batch["window_tokens"] for batch in seen[::accumulate])
    assert trained == built.trained.sum() == windows
    assert tokens == built.lengths.sum()


def test_the_end_token_is_trained_where_it_also_pads():
    batch = Collate(2, False, False)([(Pick(0, True, 2), [Tokens([5, 6, 2], [False, True, True])])])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 2, 2, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 2] + [-100] * 5]


def test_a_padded_tail_of_a_pack_is_no_token():
    batch = Collate(7, True, False)(
        [(Pick(0, True, 1), [Tokens([7, 7], [False, True]), Tokens([7], [True])])]
    )
    assert batch["labels"].tolist() == [[-100, 7, -100] + [-100] * 5]
    assert batch["tokens"] == 3


@pytest.mark.parametrize("packs", [None, [[0, 2], [1]]])
def test_the_window_counts_trained_tokens_times_their_rows_weights(packs):
    class Weighted:
        lengths = np.array([4, 6, 5])
        trained = np.array([3, 2, 4])
        weights = np.array([0.5, 1.0, 2.0])

        def __len__(self) -> int:
            return 3

    lengths, trained = Sequences(Weighted(), packs).sizes()
    assert trained.tolist() == ([1.5, 2.0, 8.0] if packs is None else [9.5, 2.0])
    built = BatchOrder(lengths, trained, 0, len(lengths), 1, epochs=1)
    assert {pick.window_tokens for pick in built.micro_batches(0)[0]} == {11.5}
