"""Answers of a target are those of transformers' own generation, row by row, whatever stops the
command in between."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.sft import SFT
from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import generate, respond
from trainer.assembly import trained as trained_module
from trainer.config import answer_options
from trainer.data.render import Renderer
from trainer.evaluation import answers as answers_module
from trainer.evaluation import responses
from trainer.storage.answers import AnswersFolder

ASKED = [
    "Say a.",
    "2+3=",
    "What is the capital of France, and why?",
    "größe 🦙",
    "x",
    "Tell me more about it.",
    "1",
    "And then?",
]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The tiny base with weights that say different things to different prompts, and often end."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny.path),
        AutoTokenizer.from_pretrained(tiny.path),
    )
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "layers" in name else 0.3)
        model.get_input_embeddings().weight[2] *= 2
        # bytes that are not ASCII, which alone are no text
        model.get_input_embeddings().weight[97:] *= 0.45
    place = tmp_path_factory.mktemp("speaker")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def naive(folder):
    """transformers alone on the same folder."""
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


_settings: dict[str, object] = {}


@pytest.fixture
def ask(folder, tmp_path, capsys, monkeypatch):
    """Runs the verb on the base; returns its exit code, the folder, and what was said."""
    whole = answer_options.composed

    def composed(options):  # composing a config takes longer than the answers
        key = json.dumps([options.base, options.task, options.settings])
        if options.prompts is None or key not in _settings:
            _settings[key] = whole(options)
        config = copy.deepcopy(_settings[key])
        config["task"]["path"] = options.prompts or config["task"]["path"]
        return config

    monkeypatch.setattr(answer_options, "composed", composed)

    def requested(rows, *arguments, out="out", target=True):
        prompts = (
            rows
            if isinstance(rows, str)
            else f"prompts={write_rows(tmp_path / 'asked.jsonl', rows)}"
        )
        base = ["base=hf", f"base.path={folder}", "precision=fp32"] if target else []
        words = [
            prompts,
            f"out={tmp_path / out}",
            *(w for w in ("max_new_tokens=12", "batch_size=3") if w[:9] not in str(arguments)),
        ]
        capsys.readouterr()
        code = exit_code(respond.main, [*base, *words, *arguments])
        output = capsys.readouterr()
        return SimpleNamespace(code=code, folder=tmp_path / out, out=output.out, err=output.err)

    return requested


def lines(file):
    return (
        [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]
        if file.exists()
        else []
    )


def by_row(actual):
    return {
        line["row"]: line
        for line in lines(actual.folder / "rows.jsonl") + lines(actual.folder / "left_out.jsonl")
    }


def prompts():
    return [{"prompt": text} for text in ASKED]


@torch.no_grad()
def spoken(naive, messages, count, options=None, seed=None):
    """(text, whether it ended) of an answer, a token at a time without a cache, in float64."""
    model, text = (
        naive.model.double(),
        naive.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
    )
    ids = naive.tokenizer(text, add_special_tokens=False)["input_ids"]
    u = None if seed is None else np.random.default_rng(seed).random(count)
    output = []
    for step in range(count):
        scores = model(torch.tensor([ids + output])).logits[0, -1]
        if u is None:
            token = int(scores.argmax())
        else:
            p = (scores / options["temperature"]).softmax(-1)
            order = p.argsort(descending=True).tolist()
            stored, total = [], 0.0
            if options.get("top_k"):
                order = order[: options["top_k"]]
            whole = float(p[order].sum())
            for candidate in order:
                if total >= options.get("top_p", 1.0):
                    break
                stored.append(candidate)
                total += float(p[candidate]) / whole
            stored.sort()
            share, upto, token = float(p[stored].sum()), 0.0, stored[-1]
            for candidate in stored:
                upto += float(p[candidate]) / share
                if upto > u[step]:
                    token = candidate
                    break
        output.append(token)
        if token == naive.tokenizer.eos_token_id:
            break
    model.float()
    return (
        naive.tokenizer.decode(output, skip_special_tokens=True),
        output[-1] == naive.tokenizer.eos_token_id,
    )


def compared(actual, row, messages, text, ended):
    if not text.strip():
        assert actual["why"] == "empty"
        return "empty"
    assert actual["messages"] == [*messages, {"role": "assistant", "content": text}], row
    assert actual.get("cut", False) is (not ended)
    return "ended" if ended else "cut"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 9},
    ],
)
def test_answers_are_those_of_each_row_alone(ask, naive, options):
    actual = ask(prompts(), "seed=7", *(f"{name}={value}" for name, value in options.items()))
    assert actual.code == 0, actual.err
    rows, kinds = by_row(actual), set()
    assert sorted(rows) == list(range(len(ASKED)))
    for row, text in enumerate(ASKED):
        messages = [{"role": "user", "content": text}]
        kinds.add(
            compared(
                rows[row],
                row,
                messages,
                *spoken(naive, messages, 12, options, [7, row, 0] if options else None),
            )
        )
    assert {"ended", "cut"} <= kinds


def test_the_text_of_a_row_does_not_depend_on_its_batch(ask):
    first = by_row(ask(prompts(), "temperature=1", "batch_size=1", out="one"))
    assert by_row(ask(prompts(), "temperature=1", "batch_size=8", out="eight")) == first
    part = by_row(ask(prompts(), "temperature=1", "skip=4", "rows=2", out="part"))
    assert part == {row: first[row] for row in (4, 5)}
    assert by_row(ask(prompts(), "temperature=1", "seed=1", out="other")) != first


def test_each_turn_is_answered_after_the_one_before(ask, naive):
    turns = [{"question_id": 81, "turns": [text, "And then?", "Why?"]} for text in ASKED]
    rows, answered = by_row(ask(turns, "max_new_tokens=30", "temperature=1")), []
    for row, text in enumerate(ASKED):
        messages = []
        for turn, question in enumerate((text, "And then?", "Why?")):
            requested = [*messages, {"role": "user", "content": question}]
            output, ended = spoken(naive, requested, 30, {"temperature": 1.0}, [0, row, turn])
            if not output.strip():
                break
            messages = [*requested, {"role": "assistant", "content": output}]
            if not ended:
                break
        assert rows[row]["messages"] == (messages or [{"role": "user", "content": text}])
        answered.append(len(messages) // 2)
    assert 3 in answered  # all of a conversation
    assert set(answered) - {3}  # one that broke off


def test_a_row_for_each_answer(ask):
    turns = [{"turns": [text, "And then?", "Why?"]} for text in ASKED]
    whole = by_row(ask(turns, "max_new_tokens=30", "temperature=1", out="whole"))
    actual = ask(turns, "max_new_tokens=30", "temperature=1", "per=answer")
    rows = lines(actual.folder / "rows.jsonl")
    stored = [row for row in whole.values() if "why" not in row]
    assert len(rows) == sum(len(row["messages"]) // 2 for row in stored) > len(stored)
    for row in stored:
        own = sorted(
            (line for line in rows if line["row"] == row["row"]), key=lambda line: line["answer"]
        )
        assert [line["messages"] for line in own] == [
            row["messages"][: 2 * n] for n in range(1, len(own) + 1)
        ]
        assert row.get("cut", False) == own[-1].get("cut", False)
        assert row.get("inexact", False) == any(line.get("inexact", False) for line in own)
    # as a kill in the middle of a write
    part = [line for line in rows if not (line["of"] > 1 and line["answer"] == 2)]
    write_rows(actual.folder / "rows.jsonl", part)
    ask(turns, "max_new_tokens=30", "temperature=1", "per=answer")
    again = lines(actual.folder / "rows.jsonl")
    assert again[: len(part)] == part
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, rows))


def test_which_answers_are_written_anew(ask, naive):
    chats = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *(
                    m
                    for text in (first, "Why?")
                    for m in (
                        {"role": "user", "content": text},
                        {"role": "assistant", "content": "given"},
                    )
                ),
            ]
        }
        for first in ASKED
    ]
    last, whole = by_row(ask(chats, out="last")), by_row(ask(chats, "answers=all", out="all"))
    for row, chat in enumerate(chats):
        compared(last[row], row, chat["messages"][:-1], *spoken(naive, chat["messages"][:-1], 12))
        assert not any(message["content"] == "given" for message in whole[row]["messages"])
    # rows that end in a question
    asked_last = [{"messages": chat["messages"][:-1]} for chat in chats]
    assert by_row(ask(asked_last, out="questions")) == last


def test_a_row_trains_the_tokens_that_were_generated(ask, folder, naive):
    actual = ask(
        [{"prompt": f"{text} {i}"} for i in range(4) for text in ASKED],
        "temperature=1",
        "max_new_tokens=30",
    )
    rows, exact = lines(actual.folder / "rows.jsonl"), 0
    for line in rows:
        ids = naive.tokenizer.apply_chat_template(
            line["messages"][:-1], add_generation_prompt=True, return_dict=False
        )
        u = np.random.default_rng([0, line["row"], 0]).random(30)
        output = []
        with torch.no_grad():
            for at in u:
                p = naive.model(torch.tensor([ids + output])).logits[0, -1].double().softmax(-1)
                output.append(int((p.cumsum(-1) > at).nonzero()[0]))
                if output[-1] == 2:
                    break
        whole = naive.tokenizer.apply_chat_template(line["messages"], return_dict=False)
        assert line.get("inexact", False) == (whole[: len(ids + output)] != ids + output)
        exact += "inexact" not in line
    assert 0 < exact < len(rows)  # random bytes are often no text
    counts = json.loads((actual.folder / "provenance.json").read_text())["counts"]
    assert counts["inexact"] == len(rows) - exact
    file = str(actual.folder / "rows.jsonl")
    task = SFT(
        file,
        "train",
        None,
        "test",
        0.0,
        None,
        None,
        "auto",
        {},
        None,
        None,
        "all",
        "exact_match",
        False,
        1,
        "raise",
        "error",
        None,
        {},
    )
    assert [example.messages for example in task.examples("train")] == [
        line["messages"] for line in rows
    ]


def test_what_has_no_answer_is_counted_and_told_apart(ask, naive):
    rows = [*prompts(), {"prompt": "long " * 100}]
    stored = ask(rows, out="kept")
    left = lines(stored.folder / "left_out.jsonl")
    assert {(line["row"], line["why"]) for line in left if line["why"] == "long"} == {(8, "long")}
    empty = [
        row
        for row in range(8)
        if not spoken(naive, [{"role": "user", "content": ASKED[row]}], 12)[0].strip()
    ]
    assert [
        line["row"] for line in sorted(left, key=lambda line: line["row"]) if line["why"] == "empty"
    ] == empty
    cut = {line["row"] for line in lines(stored.folder / "rows.jsonl") if line.get("cut")}
    dropped = ask(rows, "cut=drop", out="dropped")
    assert (
        {line["row"] for line in lines(dropped.folder / "left_out.jsonl") if line["why"] == "cut"}
        == cut
        != set()
    )
    assert by_row(dropped).keys() == set(range(9))
    counts = json.loads((dropped.folder / "provenance.json").read_text())["counts"]
    whole = len(lines(dropped.folder / "rows.jsonl"))
    assert (counts["rows"], counts["cut"]) == (whole, 0)
    assert [counts[f"left out: {why}"] for why in ("empty", "cut", "long", "refused")] == [
        len(empty),
        len(cut),
        1,
        0,
    ]
    assert whole + len(empty) + len(cut) + 1 == 9
    assert f"rows {whole}" in dropped.out


def test_the_first_refusal_is_said(tmp_path):
    for _ in range(2):  # also by the command that finds all of them done
        with AnswersFolder(tmp_path, {}, {}) as folder:
            folder.add([{"row": 0, "why": "long"}, {"row": 1, "why": "refused", "reason": "no"}])
        assert folder.why == f"\n{tmp_path / 'left_out.jsonl'}: no"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
def test_a_stopped_command_goes_on_to_the_same_rows(ask, monkeypatch, number):
    expected = by_row(ask(prompts(), "temperature=1", out="whole"))
    whole, calls = answers_module.continuations, itertools.count(1)

    def stopping(*arguments):
        if next(calls) == 2:
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        return whole(*arguments)

    monkeypatch.setattr(responses, "continuations", stopping)
    stopped = ask(prompts(), "temperature=1")
    assert stopped.code == 128 + (number or signal.SIGINT)
    assert "stopped with 3 of 8 conversations" in stopped.err
    assert "run the same command again to resume" in stopped.err
    stored = {
        name: (stopped.folder / name).read_bytes() for name in ("rows.jsonl", "left_out.jsonl")
    }
    assert all(content == b"" or content.endswith(b"\n") for content in stored.values())
    with (stopped.folder / "rows.jsonl").open("ab") as file:
        # as a kill would leave it
        file.write('{"messages": [{"role": "user", "content": "grö'.encode()[:-1])
    went_on = ask(prompts(), "temperature=1")
    assert went_on.code == 0
    assert by_row(went_on) == expected
    rows = [line["row"] for name in stored for line in lines(went_on.folder / name)]
    assert sorted(rows) == list(range(8))
    assert all(
        (went_on.folder / name).read_bytes().startswith(content) for name, content in stored.items()
    )
    monkeypatch.setattr(responses, "continuations", lambda *_: pytest.fail("asked again"))
    assert ask(prompts(), "temperature=1").code == 0


def test_a_row_of_a_batch_that_was_half_written_is_asked_among_the_same_rows(ask, monkeypatch):
    actual = ask(prompts(), "temperature=1")
    file, expected = actual.folder / "rows.jsonl", by_row(actual)
    content = file.read_text("utf-8").split("\n")
    file.write_text("\n".join(content[1:]), "utf-8")
    widths, whole = [], answers_module.continuations
    monkeypatch.setattr(
        responses,
        "continuations",
        lambda model, requested, *rest: (
            widths.append(len(requested)),
            whole(model, requested, *rest),
        )[1],
    )
    assert by_row(ask(prompts(), "temperature=1")) == expected
    assert widths in ([3], [2])


def test_other_settings_in_the_same_folder_are_refused(ask, tmp_path):
    first = ask(prompts(), "temperature=1", "rows=2")
    before = by_row(first)
    changes = [
        ("seed=2", "seed: 0 then, 2 now"),
        ("max_new_tokens=9", "max_new_tokens: 12 then, 9 now"),
        ("temperature=0.5", "temperature: 1.0 then, 0.5 now"),
        ("cut=drop", 'cut: "keep" then, "drop" now'),
        ("task.chat_template=none", "template: "),
        ("base.dtype=bfloat16", "target: "),
    ]
    refused = [(ask(prompts(), "temperature=1", word), output) for word, output in changes]
    refused.append((ask([{"prompt": "other"}], "temperature=1"), "prompts: "))
    for actual, output in refused:
        assert actual.code == 2
        assert "was begun with other settings" in actual.err
        assert output in actual.err
    assert by_row(first) == before


def test_a_line_that_is_none_of_ours_is_named(ask):
    actual = ask(prompts(), "temperature=1", "rows=2")
    with (actual.folder / "rows.jsonl").open("a") as file:
        file.write("[1, 2\n")
    number = (actual.folder / "rows.jsonl").read_bytes().count(b"\n")
    again = ask(prompts(), "temperature=1", "rows=2")
    assert again.code == 2
    assert f"rows.jsonl:{number} is not a line that this command writes" in again.err


def test_more_rows_and_another_batch_size_go_on(ask):
    ask(prompts(), "temperature=1", "rows=3")
    grown = ask(prompts(), "temperature=1", "batch_size=2")
    assert grown.code == 0
    assert by_row(grown) == by_row(ask(prompts(), "temperature=1", out="whole"))


def test_two_processes_do_not_share_a_folder(ask, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        actual = ask(prompts())
    assert actual.code == 2
    assert "is in use by another process" in actual.err


def test_a_template_is_given_what_serving_gives_it(ask, folder, naive, tmp_path, monkeypatch):
    template = naive.tokenizer.chat_template.replace(
        "assistant\n' }}",
        "assistant\n' }}{% if think is defined and not think %}<t></t>{% endif %}",
    )
    assert template != naive.tokenizer.chat_template
    (tmp_path / "t.jinja").write_text(template, "utf-8")
    seen, whole = [], responses.answers
    monkeypatch.setattr(
        responses,
        "answers",
        lambda responder, requested, *rest: (
            seen.extend(requested),
            whole(responder, requested, *rest),
        )[1],
    )
    actual = ask(
        prompts()[:1], f"task.chat_template={tmp_path / 't.jinja'}", "template.think=false"
    )
    assert actual.code in (0, 1)
    assert naive.tokenizer.decode(seen[0]).endswith("assistant\n<t></t>")
    chosen = actual.folder / "chat_template.jinja"
    task = SimpleNamespace(kind="conversation", chat_template=str(chosen), train_on="last")
    assert Renderer(naive.tokenizer, task).chat([{"role": "user", "content": ASKED[0]}]) == seen[0]
    refused = ask(prompts(), "template.thinks=false", out="other")
    assert refused.code == 2
    assert "template.thinks: the chat template never reads 'thinks'" in refused.err


def test_a_run_answers_with_its_adapter(ask, train, tmp_path, capsys):
    rows = write_rows(tmp_path / "sums.jsonl", sums(20))
    run = train(
        f"task.path={rows}", f"task.eval_path={rows}", "callbacks.evaluation=null", "max_steps=8"
    )
    words = ("prompt=3+4=", "max_new_tokens=9")
    actual = ask([{"prompt": "3+4="}], f"run={run}@last", "max_new_tokens=9", target=False)
    (line,) = by_row(actual).values()
    capsys.readouterr()
    assert generate.main([f"run={run}", *words]) == 0
    assert capsys.readouterr().out == line["messages"][-1]["content"] + "\n"
    target = json.loads((actual.folder / "provenance.json").read_text())["settings"]["target"]
    trained = trained_module.load_trained(str(run))
    assert target["step"] == trained.step == 8
    assert target["base"] == trained.base.fingerprint
    assert len(target["adapter"]) == 64


def test_a_task_s_own_rows_are_asked(ask, tmp_path, naive):
    rows = write_rows(tmp_path / "sums.jsonl", sums(6))
    actual = by_row(ask("task=sft", f"task.path={rows}", "task.eval_fraction=0", "rows=4"))
    for row, chat in enumerate(sums(6)[:4]):
        compared(actual[row], row, chat["messages"][:-1], *spoken(naive, chat["messages"][:-1], 12))
    assert sorted(actual) == [0, 1, 2, 3]
    refused = ask("task=completion", f"task.path={rows}", out="other")
    assert refused.code == 2


def test_the_record_says_what_made_the_rows(ask, tmp_path, folder):
    actual = ask(prompts(), "temperature=0.5", "top_p=0.9", "seed=3")
    record = json.loads((actual.folder / "provenance.json").read_text())
    settings = record["settings"]
    assert (
        settings["prompts"] == hashlib.sha256((tmp_path / "asked.jsonl").read_bytes()).hexdigest()
    )
    assert (settings["temperature"], settings["top_p"], settings["seed"], settings["stops"]) == (
        0.5,
        0.9,
        3,
        [2],
    )
    assert settings["target"]["dtype"] == "float32"
    assert record["base"] == str(folder)
    assert record["versions"].keys() == {"torch", "transformers", "tokenizers"}
    assert record["counts"]["rows"] == len(lines(actual.folder / "rows.jsonl"))


def test_the_model_s_own_generation_settings_do_not_count(ask, folder, tmp_path):
    expected = by_row(ask(prompts(), "temperature=1", out="plain"))
    file = folder / "generation_config.json"
    before = file.read_text()
    file.write_text(
        json.dumps(
            json.loads(before)
            | {
                "repetition_penalty": 50.0,
                "do_sample": True,
                "temperature": 0.1,
                "top_k": 2,
            }
        )
    )
    try:
        assert by_row(ask(prompts(), "temperature=1", out="other")) == expected
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["run=x"], "either base=NAME, of conf/base, or run=FOLDER"),
        (["task=sft"], "either prompts=FILE or task=NAME"),
        (["max_new_tokens=0"], "max_new_tokens=0: expected a whole number, at least 1"),
        (["temperature=-1"], "temperature=-1: expected a number, at least 0"),
        (["top_p=0.5"], "do nothing with temperature=0"),
        (["answers=some"], "answers=some: expected one of last, all"),
        (["rows=x"], "rows=x: expected a whole number"),
        (["seed=-1"], "seed=-1: expected a whole number, at least 0"),
        (
            ["base.dtype=float32", "run=x"],
            "base.dtype=float32: a run brings its base and precision along",
        ),
        (["task.limit=3"], "task.limit does nothing to prompts=x.jsonl"),
        (["bach_size=3"], "Did you mean batch_size?"),
    ],
)
def test_what_cannot_be_asked_says_why(capsys, arguments, output):
    with pytest.raises(SystemExit) as stop:
        respond.main(["base=tiny", "prompts=x.jsonl", "out=y", *arguments])
    assert stop.value.code == 2
    assert output in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words", "output"),
    [
        ([{"text": "a"}], [], "asked.jsonl:1: the columns (text) are of no known format"),
        ([{"prompt": "a"}, {"prompt": ""}], [], "asked.jsonl:2: prompt is empty"),
        ([{"prompt": "a"}], ["field=b"], "no column 'b'"),
        ([{"prompt": "a"}], ["skip=1"], "there is no row after the first 1"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], [], "the role 'robot'"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(ask, rows, words, output):
    actual = ask(rows, *words)
    assert actual.code == 2
    assert output in actual.err
