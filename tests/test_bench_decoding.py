"""What the benchmarks of start-up and decoding compute from what they measure."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import decoding, startup
from trainer.decoding.layout import tree_positions
from trainer.decoding.target_cache import TargetCache


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_each_step_is_split_into_what_its_forwards_took():
    clock = Hand()
    meter = decoding.Meter(clock)

    def takes(seconds):
        def run():
            clock.seconds += seconds

        return run

    inner = meter.timed("drafter", takes(2.0))
    # what is within another's forward is its
    outer = meter.timed("target", lambda: (takes(1.0)(), inner()))
    for text in range(2):
        meter.restart()
        for _ in range(3):
            clock.seconds += 100.0 * (meter.began is None) * text
            outer()
            inner()
            clock.seconds += 5.0
            meter.lap()
    assert meter.steps == [{"step": 10.0, "target": 3.0, "drafter": 2.0}] * 4
    actual = decoding.figures(meter.steps)
    assert actual == {
        "step": 10_000.0,
        "target": 3_000.0,
        "drafter": 2_000.0,
        "rest": 5_000.0,
        "share": 0.5,
        "steps": 4,
    }
    row = actual | {
        "drafter": "Eagle3",
        "shape": "tree",
        "dtype": "float32",
        "tokens": 2.5,
        "drafter_ms": actual["drafter"],
    }
    assert (
        decoding.table([row]).splitlines()[-1]
        == "| Eagle3 | tree | float32 | 4 | 2.50 | 10000.00 | 3000.00 | 2000.00 | 5000.00 | 50.0% |"
    )


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("INFO     loading /models/x in bfloat16   \n", "data"),
        ("INFO     trained: 4,884,480 of 139,399,488 parameters (3.50%)\n", "model"),
        ("INFO     train: 1000 of 1000 rows kept; 160,142 tokens, 100% of them trained\n", None),
        ("INFO     step 1/2  loss 5.9177  lr 1.00e-04\n", "step"),
        ("INFO     step 1  loss 5.9177  lr 1.00e-04\n", "step"),
        ("INFO     step 10/20  loss 5.9177  lr 1.00e-04\n", None),
        ("reached: model\n", "model"),
    ],
)
def test_stages_are_read_from_output(line, stage):
    assert startup.stage_of(line) == stage


def test_processor_seconds_count_children_that_have_ended():
    stat = "77 (a name) with) S 1 2 3 4 5 6 7 8 9 10 " + "250 50 30 20 20 0 1 0 99"
    assert startup.processor_seconds(stat, 100) == pytest.approx(3.5)


def test_ratios_are_taken_round_by_round():
    def of(*walls):
        return [
            {stage: {"wall": wall, "processor": 2 * wall} for stage in startup.STAGES}
            for wall in walls
        ]

    actual = {"cold": {"ours": of(4.0, 9.0, 6.0), "hf": of(8.0, 10.0, 10.0)}}
    assert startup.ratios(actual["cold"]["ours"], actual["cold"]["hf"]) == pytest.approx(
        [0.5, 0.9, 0.6]
    )
    shown = startup.table(actual)
    assert "| cold | ours | 6.00 (12.00) | 6.00 (12.00) | 6.00 (12.00) |" in shown
    assert "ours / hf to the first step: 0.600 wall (0.500, 0.900, 0.600), 0.600 processor" in shown


def test_the_rows_are_the_same_for_all_and_as_long_as_asked():
    rows = startup.chats(5, 31)
    assert rows == startup.chats(5, 31)
    assert [sum(len(m["content"].split()) for m in row["messages"]) for row in rows] == [31] * 5


def test_the_plain_scripts_are_python():
    compile(startup.PEER, "peer.py", "exec")


# what was made faster


def test_the_largest_is_the_first_of_equals_as_argmax_has_it():
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 5.0, 5.0]]
    ).repeat(1, 500)
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(dtype)
        assert torch.equal(x.max(-1).indices, x.float().argmax(-1))
        assert x.max(-1).indices.tolist() == [1, 0, 2]


def test_who_sees_whom_is_what_ancestors_say():
    trees, most = [[-1, -1, 0, 2, 1], [-1, 0]], 6
    depths, sees = tree_positions(trees, most)
    for row, parents in enumerate(trees):
        for node in range(most):
            seen, above = {node}, node
            while 0 < above <= len(parents):
                above = parents[above - 1] + 1
                seen.add(above)
            assert sees[row, node].nonzero()[:, 0].tolist() == sorted(seen)
            assert depths[row, node] == (len(seen) - 1 if node <= len(parents) else 0)


@pytest.mark.parametrize("path", [[], [0], [0, 1], [0, 2], [1, 3, 4], [2]])
def test_the_entries_of_one_sequence_are_kept_as_those_of_several(path):
    def after(together):
        keys = torch.arange(2 * 12 * 3.0).view(1, 2, 12, 3)
        target_cache = TargetCache.__new__(TargetCache)
        cache = torch.nn.Module()
        layer = torch.nn.Module()
        layer.keys, layer.values, layer.is_initialized = keys.clone(), -keys, True
        cache.layers, cache.get_seq_length = [layer], lambda: 12
        cache.crop = lambda less: setattr(cache, "less", less)
        target_cache.cache, target_cache.lengths, target_cache.parents = (
            cache,
            [6],
            [[-1, -1, 0, 1, 3]],
        )
        if together:
            target_cache._commit_several([path], 6)
            cache.crop(target_cache.lengths[0] - 12)
        else:
            target_cache.commit([path])
        end = 12 + cache.less
        return layer.keys[:, :, :end], layer.values[:, :, :end], target_cache.lengths

    one, several = after(False), after(True)
    assert one[2] == several[2] == [7 + len(path)]
    assert torch.equal(one[0], several[0])
    assert torch.equal(one[1], several[1])
    expected = [*range(7), *(7 + node for node in path)]
    assert torch.equal(one[0], torch.arange(2 * 12 * 3.0).view(1, 2, 12, 3)[:, :, expected])
