"""Supervised fine-tuning's rows: which format, which split, and how answers are scored."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.reading import Bad, DataError
from tasks.sft import SFT, score
from tasks.task import Conversation
from tests.conftest import sums, write_rows
from tests.toys import tasks as toys

PAIRS = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(20)]


def sft(path: Path | str, **changes: Any) -> SFT:
    return SFT(str(path), **toys.SFT | changes)


def prompts(task: SFT, split: str) -> list[str]:
    return [example.messages[0]["content"] for example in task.examples(split)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


def test_a_row_becomes_a_conversation_with_its_file_line_and_answer(chats):
    task = sft(chats)
    actual = list(task.examples("train"))
    reference = [
        Conversation(row["messages"], f"{chats}:{n}", None, row["messages"][1]["content"])
        for n, row in enumerate(sums(60), 1)
    ]
    assert actual == reference
    assert task.grade(actual[0], f" {actual[0].reference}\n") == {"exact_match": 1.0}
    assert task.grade(actual[0], "no") == {"exact_match": 0.0}


def test_the_first_readable_row_decides_on_the_format(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("broken\n" + json.dumps(PAIRS[0]) + "\n" + json.dumps({"messages": []}) + "\n")
    first, second, third = sft(file).examples("train")
    assert first == Bad(f"{file}:1", "not JSON: Expecting value at column 1")
    assert second.messages[1] == {"role": "assistant", "content": "0!"}
    assert third.where == f"{file}:3"
    assert third.reason.startswith("its columns are of the format messages, and those of the first")


def test_a_file_of_no_known_format_is_an_error_at_once(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}] * 3)
    with pytest.raises(
        DataError,
        match=re.escape(f"{file}:1: the columns (question, answer) are of no known format"),
    ):
        list(sft(file).examples("train"))
    named = sft(file, columns={"prompt": "question", "completion": "answer"})
    assert prompts(named, "train") == ["a", "a", "a"]


def test_a_chosen_format_settles_columns_that_fit_several(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [PAIRS[0] | {"instruction": "do", "output": "done"}])
    assert prompts(sft(file, format="alpaca"), "train") == ["do"]
    assert prompts(sft(file, format="prompt_completion"), "train") == ["0?"]


def test_every_broken_row_is_named_with_what_was_expected(tmp_path):
    rows = [PAIRS[0], {"prompt": "a", "completion": ""}, {"prompt": 5, "completion": "b"}, PAIRS[1]]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    actual = list(sft(file).examples("train"))
    assert actual[1:3] == [
        Bad(f"{file}:2", "completion is empty"),
        Bad(f"{file}:3", "prompt must be text, and is int: '5'"),
    ]
    assert [type(row) for row in actual] == [Conversation, Bad, Bad, Conversation]


# splits


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 5), (0.001, 1), (0.5, 10)])
def test_held_out_rows_are_a_fixed_draw_and_are_not_trained(pairs, fraction, count):
    train, held_out = (
        prompts(sft(pairs, eval_fraction=fraction), split) for split in ("train", "eval")
    )
    assert len(held_out) == count
    assert sorted(train + held_out) == sorted(row["prompt"] for row in PAIRS)
    assert held_out == prompts(sft(pairs, eval_fraction=fraction), "eval")


def test_the_draw_is_the_same_in_every_release_and_follows_the_number_of_rows_alone(
    pairs, tmp_path
):
    reference = ["3?", "4?", "5?", "8?", "10?"]
    assert prompts(sft(pairs, eval_fraction=0.25), "eval") == reference
    others = write_rows(
        tmp_path / "others.jsonl",
        [{"prompt": f"other {row['prompt']}", "completion": "x"} for row in PAIRS],
    )
    assert prompts(sft(others, eval_fraction=0.25), "eval") == [
        f"other {prompt}" for prompt in reference
    ]


@pytest.mark.parametrize("rows", [2, 3, 20])
def test_whatever_the_fraction_each_split_has_a_row(tmp_path, rows):
    file = write_rows(tmp_path / "rows.jsonl", PAIRS[:rows])
    for fraction in (0.001, 0.5, 0.999):
        train, held_out = (
            prompts(sft(file, eval_fraction=fraction), split) for split in ("train", "eval")
        )
        assert train
        assert held_out
        assert sorted(train + held_out) == sorted(row["prompt"] for row in PAIRS[:rows])


def test_several_files_are_split_as_one(pairs, tmp_path):
    halves = [
        write_rows(tmp_path / f"part{i}.jsonl", PAIRS[10 * i : 10 * i + 10]) for i in range(2)
    ]
    for split in ("train", "eval"):
        assert prompts(sft(tmp_path / "part*.jsonl", eval_fraction=0.25), split) == prompts(
            sft(pairs, eval_fraction=0.25), split
        )
    assert [row.where for row in sft(tmp_path / "part*.jsonl").examples("train")][9:11] == [
        f"{halves[0]}:10",
        f"{halves[1]}:1",
    ]


def test_a_stream_has_the_rows_of_a_file_that_is_read_before(pairs, tmp_path):
    other = write_rows(tmp_path / "eval.jsonl", [*PAIRS[:3], {"prompt": ""}, *PAIRS[3:6]])
    for limits in ({}, {"limit": 4, "eval_limit": 5}):
        read, streamed = (
            sft(pairs, eval_path=str(other), streaming=streaming, **limits)
            for streaming in (False, True)
        )
        for split, count in (
            ("train", limits.get("limit", 20)),
            ("eval", limits.get("eval_limit", 7)),
        ):
            actual = list(streamed.examples(split))
            assert actual == list(read.examples(split))
            assert len(actual) == count
            assert [row.where for row in actual if isinstance(row, Bad)] == [f"{other}:4"] * (
                split == "eval"
            )


def test_no_fraction_holds_nothing_out(pairs):
    assert prompts(sft(pairs), "eval") == []
    assert prompts(sft(pairs), "train") == [row["prompt"] for row in PAIRS]


def test_a_file_of_evaluation_stands_apart(pairs, tmp_path):
    other = write_rows(tmp_path / "eval.jsonl", [{"prompt": "x", "completion": "y"}])
    task = sft(pairs, eval_path=str(other), eval_fraction=0.5)
    assert prompts(task, "eval") == ["x"]
    assert len(prompts(task, "train")) == 20
    with pytest.raises(DataError, match=r"task\.eval_path='\./none\.jsonl': there is no such file"):
        sft(pairs, eval_path="./none.jsonl")


def test_limits_take_the_first_rows_of_each_split(pairs):
    limited = {"eval_fraction": 0.5, "limit": 3, "eval_limit": 2}
    for split, count in (("train", 3), ("eval", 2)):
        assert (
            prompts(sft(pairs, **limited), split)
            == prompts(sft(pairs, eval_fraction=0.5), split)[:count]
        )


def test_one_row_is_too_few_to_hold_some_out(tmp_path):
    file = write_rows(tmp_path / "one.jsonl", PAIRS[:1])
    with pytest.raises(
        DataError, match=r"has 1 rows, too few to hold some out: set task\.eval_fraction=0"
    ):
        sft(file, eval_fraction=0.1)


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ({"limit": 5}, {"train"}),
        ({"eval_limit": 1}, {"eval"}),
        ({"eval_fraction": 0.5}, {"train", "eval"}),
        ({"format": "prompt_completion"}, {"train", "eval"}),
        ({"columns": {"prompt": "completion"}}, {"train", "eval"}),
        ({"system": "S"}, {"train", "eval"}),
        ({"metric": "bleu"}, set()),
        ({"shuffle_block": 3}, set()),
    ],
)
def test_the_digest_of_a_split_follows_what_its_rows_depend_on(pairs, change, splits):
    plain, changed = sft(pairs, eval_fraction=0.25), sft(pairs, **{"eval_fraction": 0.25} | change)
    assert {
        split
        for split in ("train", "eval")
        if plain.fingerprint(split) != changed.fingerprint(split)
    } == splits


def test_the_digests_follow_the_files(pairs, tmp_path):
    other = write_rows(tmp_path / "eval.jsonl", PAIRS[:4])
    before = sft(pairs, eval_path=str(other))
    prints = {split: before.fingerprint(split) for split in ("train", "eval")}
    assert prints["train"] != prints["eval"]
    write_rows(other, PAIRS[:5])
    after = sft(pairs, eval_path=str(other))
    assert after.fingerprint("train") == prints["train"]
    assert after.fingerprint("eval") != prints["eval"]


def test_the_digests_do_not_follow_the_files_place(pairs, tmp_path):
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    shutil.copy(pairs, copy)
    for split in ("train", "eval"):
        assert sft(copy, eval_fraction=0.25).fingerprint(split) == sft(
            pairs, eval_fraction=0.25
        ).fingerprint(split)
    rows = copy.read_text()
    copy.write_text(rows.replace("19!", "20!"))
    assert sft(copy).fingerprint("train") != sft(pairs).fingerprint("train")


def test_no_evaluation_and_evaluation_on_the_training_file_have_other_digests(pairs):
    nothing, same = sft(pairs), sft(pairs, eval_path=str(pairs))
    assert (len(prompts(nothing, "eval")), len(prompts(same, "eval"))) == (0, 20)
    digests = [
        nothing.fingerprint("eval"),
        same.fingerprint("eval"),
        sft(pairs, eval_fraction=0.5).fingerprint("eval"),
    ]
    assert len(set(digests)) == 3


# scores


@pytest.mark.parametrize(
    ("metric", "actual", "reference", "expected"),
    [
        ("exact_match", "5", "5", 1.0),
        ("exact_match", "  a\n b ", "a b", 1.0),
        ("exact_match", "A", "a", 0.0),
        ("exact_match", "5.", "5", 0.0),
        ("contains", "It is 5.", "5", 1.0),
        ("contains", "It is\n5 apples", "is 5  apples", 1.0),
        ("contains", "It is 6.", "5", 0.0),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("bleu", "wholly other words here now", "the cat sat on the mat", 0.0),
        ("bleu", "7", "5", 0.0),
        ("chrf", "xyz", "the cat", 0.0),
        *(
            (metric, answer, answer, 1.0)
            for metric in ("bleu", "chrf")
            for answer in ("5", "the cat", "SELECT a FROM t;", "")
        ),
        *((metric, "", "the cat", 0.0) for metric in ("exact_match", "contains", "bleu", "chrf")),
    ],
)
def test_answers_are_scored(metric, actual, reference, expected):
    assert score(metric, actual, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("actual", "reference", "expected"),
    [
        # the shares of its 1 to 4 words in a row that are right, those of 2 and more as (right + 1)
        # / (all + 1)
        (
            "a cat sat on the mat",
            "the cat sat on the mat",
            (5 / 6 * 5 / 6 * 4 / 5 * 3 / 4) ** (1 / 4),
        ),
        # what is right once counts once
        ("the cat the cat", "the cat", (2 / 4 * 2 / 4) ** (1 / 2)),
        # all right, and too short
        ("the cat sat on", "the cat sat on the mat", math.exp(1 - 6 / 4)),
        (
            "the cat sat on the mat now",
            "the cat sat on the mat",
            (6 / 7 * 6 / 7 * 5 / 6 * 4 / 5) ** (1 / 4),
        ),
    ],
)
def test_bleu_by_hand(actual, reference, expected):
    assert score("bleu", actual, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("actual", "reference", "expected"),
    [
        # the mean over 1 to 6 letters and 1 to 2 words in a row of 5PR / (4P + R)
        ("ab", "ac", (1 / 2 + 0 + 0) / 3),
        ("abc", "ab", (10 / 11 + 5 / 6 + 0) / 3),
        ("ab", "abc", (10 / 14 + 5 / 9 + 0) / 3),
        ("a b", "a c", (1 / 2 + 0 + 1 / 2 + 0) / 4),
    ],
)
def test_chrf_by_hand(actual, reference, expected):
    assert score("chrf", actual, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_nearer_answer_scores_higher(metric):
    reference = "the cat sat on the mat"
    scores = [
        score(metric, actual, reference)
        for actual in ("a dog ran", "a cat sat on the mat", reference)
    ]
    assert 0 <= scores[0] < scores[1] < scores[2] <= 1 + 1e-6
