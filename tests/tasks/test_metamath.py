"""MetaMathQA: its prompt, and the board's way to find and compare results."""

from __future__ import annotations

import pytest

from tasks.metamath import accuracy, answer_of, right, value_of
from tasks.reading import Bad
from tests.conftest import write_rows
from tests.toys.tasks import task_of


def test_rows_of_both_data_sets_become_the_boards_prompt(tmp_path):
    rows = [
        {"query": "1+1?", "response": "Two. The answer is: 2", "type": "GSM_AnsAug"},
        {"question": "2+1?", "answer": "2+1=3\n#### 3"},
        {"query": "1?", "response": "no result"},
    ]
    first, second, bad = task_of("metamath", write_rows(tmp_path / "a.jsonl", rows)).examples(
        "train"
    )
    assert [m["content"] for m in first.messages] == [
        "Question: 1+1? Think step by step.\nAnswer:",
        "Two. The answer is: 2",
    ]
    assert second.reference.endswith("#### 3")
    assert isinstance(bad, Bad)
    assert "must have its result after 'The answer is:'" in bad.reason


@pytest.mark.parametrize(
    ("text", "actual"),
    [
        ("It is 4. The answer is: 4", "4"),
        ("The answer is: 3. No, the answer follows. The answer is: 5.", "5"),
        ("so\n#### 1.5", "1.5"),
        ("The final answer is 50%.", "50"),
        ("The answer is: 7\nQuestion: 8?", "7"),
        ("The answer is: $x$", "x"),
        ("no result", None),
    ],
)
def test_the_result_is_what_follows_the_last_mark(text, actual):
    assert answer_of(text) == actual


def test_numbers_and_fractions_are_compared_by_value():
    assert value_of("20/14") == pytest.approx(20 / 14)
    assert value_of("1/0") == "1/0"
    assert value_of("1/2/3") == "1/2/3"
    assert right("The answer is: 1/2", "#### 0.5")
    assert right("The answer is: \\sqrt{5}", "The answer is: \\sqrt{5}")
    assert not right("0.5", "#### 0.5")
    pairs = [("The answer is: 2", "#### 2"), ("The answer is: 3", "#### 2")]
    assert accuracy(pairs) == 0.5
    assert accuracy([]) == 0.0
