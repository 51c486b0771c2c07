"""Computations of the benchmarks of data preparation, growth and distillation, without their
measurements."""

from __future__ import annotations

import itertools

import pytest

from scripts.bench import distillation, growth, preflight
from scripts.bench.stages import Stages


def test_repeated_rows_differ_in_their_digits_only():
    chats = [
        preflight.messages({"question": "1 + 22?", "answer": "23"}),
        preflight.messages(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ),
    ]
    built = list(preflight.varied(chats, 7))
    texts = [tuple(message["content"] for message in chat) for chat in built]
    assert len(set(texts)) == 7
    assert [[message["role"] for message in chat] for chat in built] == [["user", "assistant"]] * 7
    for number, (requested, reported) in enumerate(texts):
        plain = "".join(
            "#" if letter.isdigit() else letter for letter in requested.removesuffix(f" ({number})")
        )
        assert (plain, len(reported)) == (("# + ##?", 2) if number % 2 == 0 else ("a", 1))
    assert built == list(preflight.varied(chats, 7))
    with pytest.raises(ValueError, match="the columns text are neither"):
        preflight.messages({"text": "a"})


def test_stages_count_what_is_within_them_once(monkeypatch):
    clock = itertools.count()
    # a second passes between two looks at it
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    stages = Stages()
    inner = stages.watched("inner", lambda: None)
    rows = stages.each("rows", lambda: iter([1, 2]))
    with stages.within("outer"):
        inner()
        assert list(rows()) == [1, 2]
    # Three steps of the iterator, the last of which ends it.
    assert stages.seconds == {"outer": 5, "inner": 1, "rows": 3}


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_the_exponent_of_a_power_is_that_power(power):
    sizes = [128.0, 256.0, 1024.0, 4096.0]
    assert growth.exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power)


def test_products_are_those_of_plain_loops():
    width, layers, vocabulary, length = 64, 3, 100, 5
    assert growth.inner(width) == 192
    attention = sum(
        2 * width
        for _ in range(layers)
        for query in range(length)
        for key in range(length)
        if key <= query
    )
    matrices = length * layers * (4 * width * width + 3 * width * 192)
    actual = growth.products(width, layers, vocabulary, length)
    assert actual == {
        "layers": matrices,
        "attention": attention,
        "head": length * width * vocabulary,
    }
    at = growth.crossing(width, layers, vocabulary)
    for place, more in ((at - 2, False), (at, True)):
        counts = growth.products(width, layers, vocabulary, place)
        assert (counts["attention"] > counts["layers"] + counts["head"]) is more


def test_exponents_are_told_for_each_way_with_the_larger_half():
    rows = [
        {
            "sweep": "length",
            "way": way,
            "length": n,
            "cpu_seconds": n**power,
            "seconds": n,
            "peak_bytes": 7,
        }
        for way, power in (("full", 2), ("ours", 1))
        for n in (1, 2, 4, 8)
    ]
    first, second = growth.exponents(rows, "length", ["full", "ours", "ours_fixed"])
    assert first.startswith(
        "full       over length: processor time 2.00, 2.00 from 4 on; wall clock 1.00"
    )
    assert "memory above the weights 0.00" in second


def test_the_summary_of_distillation_pairs_the_sides():
    rows = [
        {
            "drafter": "medusa",
            "supervised": 0.5,
            "side": side,
            "cpu_seconds": cpu,
            "seconds": 2 * cpu,
            "peak_bytes": peak,
            "losses": losses,
        }
        for side, cpu, peak, losses in (
            ("plain", 4.0, 100, [2.0, 1.0]),
            ("ours", 2.0, 25, [2.0, 1.01]),
            ("plain", 9.0, 100, [2.0, 1.0]),
            ("ours", 3.0, 25, [2.0, 1.0]),
            ("kept", 3.0, 50, [2.0, 1.0]),
        )
    ]
    against_plain, against_kept = distillation.summary(rows)
    assert against_plain.startswith(
        "medusa, 50% supervised: ours / plain, tokens a second 2.50 by processor time (2.00, 3.00)"
    )
    assert "peak 0.25; losses apart by at most 1.0e-02" in against_plain
    assert "ours / kept, tokens a second 1.50" in against_kept
    assert [distillation.masked(8, share) for share in (1.0, 0.5, 0.25)] == [1, 4, 6]
