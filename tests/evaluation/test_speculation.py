"""The evaluation of speculation counts what a naive count counts, and asks what Spec-Bench's layout
says."""

from __future__ import annotations

import json

import pytest

from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import evaluate
from trainer.assembly.trained import load_trained
from trainer.evaluation import decode_ways
from trainer.evaluation.questions import Question, read_questions

BENCH = [
    {"question_id": 1, "category": "math", "turns": ["3+4=", "and 1 more?"]},
    {"question_id": 2, "category": "math", "turns": ["1+1="]},
    {
        "question_id": 3,
        "category": "rôle",
        "turns": ["5+5=", "twice that?"],
        "reference": ["10", "20"],
    },
]


# what is asked


def test_questions_in_spec_benchs_layout(tmp_path):
    file = write_rows(tmp_path / "bench.jsonl", BENCH)
    actual = read_questions(str(file))
    assert actual[0] == Question("math", [{"role": "user", "content": "3+4="}], ["and 1 more?"])
    assert [question.category for question in actual] == ["math", "math", "rôle"]
    assert [question.messages[0]["content"] for question in read_questions(str(file), 1)] == [
        "3+4=",
        "5+5=",
    ]


def test_questions_in_the_other_layout(tmp_path):
    file = write_rows(tmp_path / "chats.jsonl", [*sums(2), {"prompt": "hello"}])
    assert read_questions(str(file)) == [
        *(Question("all", row["messages"][:1]) for row in sums(2)),
        Question("all", [{"role": "user", "content": "hello"}]),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bench.jsonl:1: not JSON"),
        (json.dumps(BENCH[0]) + "\n[1", "bench.jsonl:2: not JSON"),
        (json.dumps(BENCH[0]) + '\n{"turns": []}', "bench.jsonl:2: a line is"),
        ('{"turns": ["x", 3]}', "bench.jsonl:1: a line is"),
        ("", "bench.jsonl is empty"),
        ("7", "bench.jsonl:1: a row must be a JSON object"),
    ],
)
def test_a_file_that_is_no_set_of_questions_says_why(tmp_path, text, message):
    file = tmp_path / "bench.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"))


# runs


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def run(train, stored):
    """A run with a drafter, made once."""
    note = stored / "run"
    if not note.exists():
        rows = write_rows(stored / "chats.jsonl", sums(40))
        settings = (
            "callbacks.evaluation=null",
            f"runs={stored}",
            "name=the-run",
            "max_steps=8",
            "drafter=mtp_medusa",
        )
        note.write_text(str(train(f"task.path={rows}", f"task.eval_path={rows}", *settings)))
    return note.read_text()


def test_turns_follow_the_targets_own_answers(run, tmp_path, monkeypatch, capsys):
    file = write_rows(tmp_path / "bench.jsonl", BENCH)
    seen, transformers = [], decode_ways.by_transformers

    def watched(model, ids, stops, pad, max_new_tokens, sampling):
        result = transformers(model, ids, stops, pad, max_new_tokens, sampling)
        if max_new_tokens == 10:
            seen.append((ids.tolist(), result.tokens))
        return result

    monkeypatch.setattr(decode_ways, "by_transformers", watched)
    out, plot = tmp_path / "found.json", tmp_path / "found.svg"
    assert (
        evaluate.main(
            [
                f"run={run}",
                "task=speculation",
                f"prompts={file}",
                "max_new_tokens=10",
                f"json={out}",
                f"plot={plot}",
            ]
        )
        == 0
    )
    actual = json.loads(out.read_text())
    assert "All 5 texts are those of transformers' greedy decoding" in capsys.readouterr().out
    assert plot.read_text().count("tau: tokens of a target pass") == 1
    assert [(row["question"], row["turn"], row["category"]) for row in actual["each"]] == [
        (0, 0, "math"),
        (0, 1, "math"),
        (1, 0, "math"),
        (2, 0, "rôle"),
        (2, 1, "rôle"),
    ]
    tokenizer = load_trained(run).base.tokenizer
    for first, second, follows in ((0, 1, BENCH[0]), (3, 4, BENCH[2])):
        message = tokenizer.decode(seen[first][1], skip_special_tokens=True)
        text = tokenizer.decode(seen[second][0])
        assert text.startswith(tokenizer.decode(seen[first][0]) + message)
        assert follows["turns"][1] in text
    assert (
        actual["ways"]["transformers"]["tokens"]
        == actual["ways"]["drafter"]["tokens"]
        == sum(len(text) for _, text in seen)
    )
    assert actual["tau"]["value"] >= 1
    assert set(actual["categories"]) == {"math", "rôle"}


@pytest.mark.parametrize("name", ["lookup", "recycling", "run"])
def test_other_drafters_and_trees(run, name, tmp_path):
    out = tmp_path / "found.json"
    growth = ("tree=eagle2", "size=5", "top_k=2", "policy=refusal:0.9") if name == "run" else ()
    compared = 2 if name == "lookup" else 0
    assert (
        evaluate.main(
            [
                "task=speculation",
                f"run={run}",
                "heldout=3",
                "max_new_tokens=24",
                f"drafter={name}",
                f"compared={compared}",
                *growth,
                f"json={out}",
            ]
        )
        == 0
    )
    actual = json.loads(out.read_text())
    assert actual["tree"] == ("eagle2" if growth else "chain")
    assert actual["pass"]["nodes"] <= (5 if growth else 80)
    assert actual["different_texts"] == {"plain": 0, "drafter": 0}
    assert (actual["answers"], actual["compared"]) == (3, compared or 3)
    assert actual["drafter"] == name
    assert actual["positions"]
    assert 1 <= actual["tau"]["low"] <= actual["tau"]["value"] <= actual["tau"]["high"]


def test_what_does_not_fit_is_left_out(run, tmp_path):
    file = write_rows(
        tmp_path / "bench.jsonl", [{"turns": ["1+1=", "x" * 600, "y"]}, {"turns": ["2+2="]}]
    )
    out = tmp_path / "found.json"
    assert (
        evaluate.main(
            ["task=speculation", f"run={run}", f"prompts={file}", "max_new_tokens=4", f"json={out}"]
        )
        == 0
    )
    actual = json.loads(out.read_text())
    assert (actual["answers"], actual["left_out"]) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=other"], "task=other: a run is evaluated on its own task"),
        (["task=speculation", "heldout=0"], "heldout=0: expected a whole number, at least 1"),
        (["task=speculation", "each=-1"], "each=-1: expected a whole number, at least 0"),
        (
            ["task=speculation", "max_new_tokens=1"],
            "max_new_tokens=1: expected a whole number, at least 2",
        ),
        (["task=speculation", "temperature=-1"], "temperature=-1: expected a number"),
        (["task=speculation", "count=0"], "count=0: expected a whole number, at least 1"),
        (["task=speculation", "tree=oak"], "tree=oak: expected one of chain"),
        (["task=speculation", "plot=/no/such/place.svg"], "there is no folder"),
        (["task=speculation", "drafter=other"], "drafter=other: expected one of run, lookup"),
        (
            ["task=speculation", "prompts=/no/such/file"],
            "/no/such/file: there is no such file",
        ),
    ],
)
def test_what_cannot_be_asked_says_why(run, capsys, arguments, message):
    capsys.readouterr()
    assert exit_code(evaluate.main, [f"run={run}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
