"""The verb: what its numbers count, what it compares, and what it refuses before a model is
loaded."""

from __future__ import annotations

import io
import json

import pytest
import rich
from rich.console import Console

from tasks.reading import DataError
from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code, make_run
from trainer import speculate
from trainer.assembly import trained as trained_module
from trainer.data.render import Renderer
from trainer.decoding import calibration
from trainer.decoding.speculative import Result
from trainer.drafters import DrafterError
from trainer.evaluation import decode_ways, questions, tree_search
from trainer.evaluation.questions import Question, read_prompts
from trainer.evaluation.speedup import summary_of_prompts
from trainer.evaluation.speedup_report import prompts_report
from trainer.storage import run_folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(train, stored):
    """A run of a kind, made once."""

    def built(kind="mtp_medusa"):
        note = stored / kind
        if not note.exists():
            rows = write_rows(stored / f"{kind}.jsonl", sums(40))
            drafter, task = f"drafter={kind}", "sft"
            if kind == "text":
                rows = write_rows(
                    stored / "text.jsonl", [{"text": "abc " * (1 + i % 9)} for i in range(40)]
                )
                drafter, task = "drafter=mtp_medusa", "completion"
            settings = [
                "callbacks.evaluation=null",
                f"runs={stored}",
                f"name={kind}-run",
                "max_steps=6",
                drafter,
            ]
            note.write_text(
                str(train(f"task={task}", f"task.path={rows}", f"task.eval_path={rows}", *settings))
            )
        return note.read_text()

    return built


@pytest.fixture
def shown(monkeypatch):
    page = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=page, force_terminal=False, width=140))
    return page


def test_a_run_is_decoded_three_ways_and_counted(trained, shown, tmp_path):
    file = tmp_path / "found.json"
    arguments = [f"run={trained()}", "heldout=3", "max_new_tokens=14", "count=2", f"json={file}"]
    assert speculate.main(arguments) == 0
    actual = json.loads(file.read_text())
    assert (actual["prompts"], actual["count"], actual["temperature"]) == (3, 2, 0.0)
    assert actual["plain"]["different_texts"] == actual["drafter"]["different_texts"] == 0
    assert (
        actual["transformers"]["tokens"]
        == actual["plain"]["tokens"]
        == actual["drafter"]["tokens"]
        == actual["plain"]["steps"]
    )
    assert actual["transformers"]["ratio"] == 1
    assert 1 <= actual["accepted"] <= 3
    assert len(actual["positions"]) == 2
    steps = actual["drafter"]["steps"] - 3
    assert sum(actual["histogram"]) == steps
    assert (
        steps + sum(place["taken"] for place in actual["positions"])
        >= actual["drafter"]["tokens"] - 3
    )
    page = shown.getvalue()
    assert "All 3 texts are those of transformers' greedy decoding" in page
    assert "with the drafter" in page


@pytest.mark.parametrize("tree", ["static", "eagle2", "dyspec"])
def test_trees_and_batches_write_the_same(trained, shown, tmp_path, tree):
    file, paths = tmp_path / "found.json", tmp_path / "tree.json"
    paths.write_text("[[0], [1], [0, 0]]")
    requested = [
        f"tree={tree}",
        "batch_size=2",
        *([f"paths={paths}"] if tree == "static" else ["top_k=3", "size=6"]),
    ]
    assert (
        speculate.main(
            [
                f"run={trained()}",
                "heldout=3",
                "max_new_tokens=10",
                "policy=refusal:0.999",
                f"json={file}",
                *requested,
            ]
        )
        == 0
    )
    actual = json.loads(file.read_text())
    assert actual["plain"]["different_texts"] == actual["drafter"]["different_texts"] == 0
    assert (actual["tree"], actual["batch_size"]) == (tree, 2)
    if tree == "static":
        assert len(actual["positions"]) <= 2


@pytest.fixture
def costs(monkeypatch):
    """Passes and drafts that take fixed times."""

    def reported(more, draft):
        def time_verification(target, context, widths, trees, layers):
            return {
                shape: {n: [1 + more * n] for n in widths}
                for shape in (("chain", "tree") if trees else ("chain",))
            }

        monkeypatch.setattr(calibration, "time_verification", time_verification)
        monkeypatch.setattr(
            calibration, "time_drafting", lambda target, drafter, text, trees: [draft] * len(trees)
        )

    return reported


def test_a_searched_tree_is_one_to_decode_with_and_gives_what_was_expected(
    trained, shown, tmp_path, costs
):
    costs(1e-9, 0.0)
    file, searched, actual = (
        tmp_path / name for name in ("tree.json", "searched.json", "found.json")
    )
    requested = [f"run={trained()}", "heldout=4", "max_new_tokens=12", f"paths={file}"]
    assert (
        speculate.main([*requested, "tree=search", "size=12", "top_k=4", f"json={searched}"]) == 0
    )
    expected = json.loads(searched.read_text())
    assert json.loads(file.read_text()) == expected["paths"] != []
    assert len(expected["paths"]) <= 12
    assert max(max(path) for path in expected["paths"]) < 4
    assert f"tree=static paths={file}" in shown.getvalue()
    assert speculate.main([*requested, "tree=static", f"json={actual}"]) == 0
    assert json.loads(actual.read_text())["accepted"] == pytest.approx(expected["tokens"])
    assert expected["ratio"] == pytest.approx(expected["tokens"])


def test_where_drafting_does_not_pay_no_tree_is_written(trained, shown, tmp_path, costs):
    costs(0.0, 99.0)
    file = tmp_path / "tree.json"
    assert (
        speculate.main(
            [f"run={trained()}", "heldout=2", "max_new_tokens=9", "tree=search", f"paths={file}"]
        )
        == 0
    )
    assert not file.exists()
    page = " ".join(shown.getvalue().split())
    assert "Drafting does not pay here" in page
    assert "is not written" in page


@pytest.mark.parametrize(
    ("chain", "tree", "message"),
    [
        ([1.0, 1.4, 1.4], [1.1, 1.2, 1.3], None),
        (
            [1.0, 1.0, 1.0],
            [1.3, 1.3, 1.3],
            "the pass over one token took at least 1e+03 ms as a chain and 1.3e+03 ms as a tree",
        ),
        (
            [1.3, 1.3, 1.3],
            [1.0, 1.0, 1.0],
            "the pass over one token took at least 1.3e+03 ms as a chain and 1e+03 ms as a tree",
        ),
        (
            [1.0, 1.6, 1.7],
            [1.0, 1.0, 9.0],
            "the pass over one token as a chain took 1e+03 ms at least and 1.6e+03 ms in the"
            " median",
        ),
    ],
)
def test_a_busy_machine_is_noticed(chain, tree, message):
    assert (
        tree_search.busy({"chain": {1: chain, 2: [2.0] * 3}, "tree": {1: tree, 2: [2.0] * 3}})
        == message
    )
    assert tree_search.busy({"chain": {1: [1.0, 1.1, 1.2]}}) is None


def test_a_busy_machine_is_told_and_recorded(trained, shown, tmp_path, monkeypatch, costs):
    costs(1e-9, 0.0)
    file, seconds = tmp_path / "found.json", calibration.time_verification
    monkeypatch.setattr(
        calibration,
        "time_verification",
        lambda *values, **more: seconds(*values, **more) | {"tree": {1: [9.0], 2: [9.0]}},
    )
    assert (
        speculate.main(
            [
                f"run={trained()}",
                "heldout=2",
                "max_new_tokens=9",
                "tree=search",
                "size=1",
                f"json={file}",
            ]
        )
        == 0
    )
    page = " ".join(shown.getvalue().split())
    assert (
        "Warning: the machine seems busy, and this may not be the best tree. The pass over one"
        " token took at least" in page
    )
    assert "9e+03 ms as a tree" in json.loads(file.read_text())["busy"]


def test_a_target_that_reads_no_trees_gets_a_chain(trained, shown, monkeypatch, costs):
    costs(1e-9, 0.0)

    def refused(target):
        raise DrafterError("it reads no trees")

    monkeypatch.setattr(tree_search, "allow_trees", refused)
    assert (
        speculate.main([f"run={trained()}", "heldout=4", "max_new_tokens=12", "tree=search"]) == 0
    )
    page = shown.getvalue()
    assert "Chains only: it reads no trees" in page
    assert json.loads(page.strip().splitlines()[-1]) in (
        [[0]],
        [[0], [0, 0]],
        [[0], [0, 0], [0, 0, 0]],
    )


def test_a_search_measures_this_machine(trained, shown, tmp_path):
    file = tmp_path / "searched.json"
    assert (
        speculate.main(
            [
                f"run={trained()}",
                "heldout=2",
                "max_new_tokens=12",
                "tree=search",
                "size=3",
                f"json={file}",
            ]
        )
        == 0
    )
    actual = json.loads(file.read_text())
    assert all(
        list(seconds) == ["1", "2", "3", "4"] and min(seconds.values()) > 0
        for seconds in actual["passes_ms"].values()
    )
    assert set(actual["passes_ms"]) == {"chain", "tree"}
    costs, drafted = actual["profit"], tmp_path / "drafted.json"
    assert len(costs["seconds"]) == len(costs["acceptance"]) + 1 > 1
    assert sorted(costs["seconds"])[0] == costs["seconds"][0] > 0  # without a draft
    assert all(0.25 <= theta <= 4 for theta in costs["temperatures"])
    words = [f"run={trained()}", "heldout=2", "max_new_tokens=12", f"json={drafted}"]
    assert speculate.main([*words, f"policy=profitable:{file}"]) == 0
    assert json.loads(drafted.read_text())["drafter"]["different_texts"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0, 0]]", "has no parent: add"),
        ("[[0], [0]]", "each once"),
        ("{}", "expected the paths"),
        ("[[0.5]]", "expected the paths"),
    ],
)
def test_a_bad_tree_says_what_is_wrong(tmp_path, capsys, content, message):
    file = tmp_path / "tree.json"
    file.write_text(content)
    make_run(tmp_path)
    assert speculate.main([f"run={tmp_path}", "prompt=x", "tree=static", f"paths={file}"]) == 2
    assert message in capsys.readouterr().err


def test_one_prompt_and_a_file_of_prompts_are_asked_as_rows_were_trained(trained, tmp_path):
    actual = trained_module.load_trained(trained())
    chat = [{"role": "user", "content": "1+2="}]
    lines = [
        {"prompt": "1+2="},
        {"messages": chat},
        {"messages": [*chat, {"role": "assistant", "content": "3"}]},
    ]
    file = write_rows(tmp_path / "prompts.jsonl", lines)
    ids, stops = questions.prompt_ids(actual, 0, questions.read_prompts(str(file)))
    assert ids == [Renderer(actual.base.tokenizer, actual.task).chat(chat)] * 3
    assert stops == [actual.base.tokenizer.eos_token_id]
    assert questions.prompt_ids(actual, 0, [Question("all", chat)])[0] == ids[:1]
    held, _ = questions.prompt_ids(actual, 5, [])
    assert len(held) == 5


def test_sampled_texts_repeat_with_their_seed_and_are_not_compared(trained, shown, monkeypatch):
    texts = []
    decode = decode_ways.decode_in_batches

    def watched(ways, prompts, batch_size):
        results = decode(ways, prompts, batch_size)
        texts.append(results["drafter"][0].tokens)
        return results

    monkeypatch.setattr(decode_ways, "decode_in_batches", watched)
    for seed in (1, 1, 2):
        arguments = [
            "prompt=abc",
            "max_new_tokens=16",
            "temperature=0.9",
            "top_p=0.95",
            f"seed={seed}",
        ]
        assert speculate.main([f"run={trained('text')}", *arguments]) == 0
    assert texts[0] == texts[1] != texts[2]
    assert "not compared" in shown.getvalue()


def test_the_numbers_are_means_over_texts():
    ways = {
        "transformers": [
            Result([1] * 6, [(0, 0)] * 5, 2.0, 0),
            Result([1] * 4, [(0, 0)] * 3, 3.0, 0),
        ],
        "plain": [
            Result([1] * 6, [(0, 0)] * 5, 1.0, 0),
            Result([1, 2, 1, 1], [(0, 0)] * 3, 1.0, 0),
        ],
        "drafter": [
            Result([1] * 6, [(2, 2), (2, 1)], 0.5, 0),
            Result([1] * 4, [(2, 0), (1, 1)], 0.5, 0),
        ],
    }
    actual = summary_of_prompts(ways, 1, 0.0)
    assert actual["transformers"] == {
        "tokens": 10,
        "steps": 10,
        "seconds": 5.0,
        "tokens_per_second": 2.0,
        "ratio": 1.0,
    }
    assert (
        actual["drafter"]["steps"],
        actual["drafter"]["ratio"],
        actual["drafter"]["different_texts"],
    ) == (6, 5.0, 0)
    assert actual["plain"]["different_texts"] == 1
    assert actual["accepted"] == 8 / 4
    assert actual["histogram"] == [1, 2, 1]
    assert actual["positions"] == [
        {"proposed": 4, "reached": 4, "taken": 3},
        {"proposed": 3, "reached": 2, "taken": 1},
    ]


def test_texts_that_differ_are_told_and_no_error():
    ways = {way: [Result([1, 2], [(1, 0)], 1.0, 0)] for way in decode_ways.WAYS}
    ways["drafter"] = [Result([1, 3], [(1, 0)], 1.0, 0)]
    *_, line = prompts_report(summary_of_prompts(ways, 1, 0.0))
    assert "1 of 1 texts differ from transformers' (0 without the drafter)" in line


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("mtp_medusa", [], "give one of prompt, prompts and heldout"),
        ("mtp_medusa", ["prompt=x", "heldout=2"], "give one of prompt, prompts and heldout"),
        (
            "mtp_medusa",
            ["prompt=x", "count=0"],
            "count=0: expected a whole number, at least 1, or null",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "top_p=0"],
            "top_p=0: expected a number, above 0 and at most 1",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "batch_size=0"],
            "batch_size=0: expected a whole number, at least 1",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=oak"],
            "tree=oak: expected one of chain, static, eagle2, dyspec",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=eagle2", "size=0"],
            "size=0: expected a whole number, at least 1",
        ),
        ("mtp_medusa", ["prompt=x", "siblings=some"], "siblings=some: expected one of without"),
        (
            "mtp_medusa",
            ["prompt=x", "policy=hope"],
            "policy=hope: one of fixed, confidence:THRESHOLD, refusal:THRESHOLD, entropy:THRESHOLD",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "policy=refusal"],
            "policy=refusal: add a threshold from 0 to 1",
        ),
        ("mtp_medusa", ["prompt=x", "policy=refusal:2"], "its threshold is a probability"),
        ("mtp_medusa", ["prompt=x", "policy=entropy:-1"], "an entropy in nats, 0 or more"),
        ("mtp_medusa", ["prompt=x", "paths=/nowhere.json"], "paths=/nowhere.json cannot be read"),
        ("mtp_medusa", ["prompt=x", "json=/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "paths=/nowhere/at/all.json"],
            "there is no folder /nowhere/at",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "temperature=1"],
            "temperature=1.0: tree=search measures greedy decoding",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "batch_size=2"],
            "batch_size=2: tree=search measures greedy decoding of one",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "policy=refusal:0.7"],
            "policy=refusal:0.7: tree=search measures",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "drafter=lookup"],
            "drafter=lookup makes trees of its own",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "size=0"],
            "size=0: expected a whole number, at least 1",
        ),
        (
            "mtp_medusa",
            ["prompt=x", "tree=search", "max_new_tokens=1"],
            "no answer to these prompts has a second token",
        ),
        ("mtp_medusa", ["prompts=/nowhere.jsonl"], "/nowhere.jsonl: there is no such file"),
        ("text", ["prompt="], "a prompt is empty"),
        ("text", ["heldout=2"], "this run continues plain text"),
    ],
)
def test_what_cannot_be_decoded_says_why(trained, capsys, kind, arguments, message):
    run = trained(kind)
    capsys.readouterr()
    assert exit_code(speculate.main, [f"run={run}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"config": {"drafter": {}}, "identity": {"labels": None}},
            "has no drafter. Train one with the adapter, graft ... drafter=mtp_shared",
        ),
        (
            {"config": {"drafter": {}}, "identity": {"labels": ["a", "b"]}},
            "this run trained a classifier, which writes no text",
        ),
    ],
)
def test_a_run_that_cannot_draft_is_refused_before_its_model_is_loaded(
    tmp_path, monkeypatch, capsys, content, message
):
    make_run(tmp_path)
    monkeypatch.setattr(run_folder, "read", lambda path: (None, content, "best"))
    monkeypatch.setattr(trained_module, "load_trained", None)
    assert speculate.main([f"run={tmp_path}", "prompt=x"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:1: not JSON"),
        ("[1]", "a row must be a JSON object"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": []}', 'a line is {"prompt": "..."}'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "has no prompt"),
        ("", "is empty"),
    ],
)
def test_a_bad_file_of_prompts_names_the_line(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError) as raised:
        read_prompts(str(file))
    assert message in str(raised.value)
