"""`graft generate` writes what transformers' own generation writes, token by token, with the
base next to it if asked."""

from __future__ import annotations

import io
import json
import re
import sys

import peft
import pytest
import rich
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import generate
from trainer.assembly import trained as trained_module
from trainer.assembly.build import instantiate
from trainer.config.decoding_options import SamplingOptions
from trainer.data.render import Renderer
from trainer.decoding.plugin import Candidates
from trainer.evaluation import streamed_answer
from trainer.storage import run_folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(train, stored):
    """A run of a kind, made once; its answers are not those of its base."""

    def built(kind="sft"):
        note = stored / kind
        if not note.exists():
            rows = write_rows(stored / f"{kind}.jsonl", sums(40))
            settings = [
                "callbacks.evaluation=null",
                f"runs={stored}",
                f"name={kind}-run",
                "max_steps=15",
            ]
            if kind == "completion":
                rows = write_rows(
                    stored / "text.jsonl", [{"text": "abc " * (1 + i % 9)} for i in range(40)]
                )
            if kind == "classification":
                rows = write_rows(
                    stored / "labels.jsonl",
                    [{"text": "abc " * (1 + i % 9), "label": str(i % 2)} for i in range(40)],
                )
                settings[-1] = "max_steps=1"
            task = kind if kind in ("completion", "classification") else "sft"
            adapter = {
                "full": ["adapter=full"],
                "drafter": ["drafter=mtp_medusa"],
                "prompts": ["adapter=prompt_tuning"],
            }.get(kind, [])
            note.write_text(
                str(
                    train(
                        f"task={task}",
                        f"task.path={rows}",
                        f"task.eval_path={rows}",
                        *settings,
                        *adapter,
                    )
                )
            )
        return note.read_text()

    return built


@pytest.fixture
def ask(trained, capsys, monkeypatch):
    """Runs the verb on a run of a kind; returns what it printed."""

    def requested(*arguments, kind="sft", which="", code=0):
        run = trained(kind)
        capsys.readouterr()
        assert exit_code(generate.main, [f"run={run}{which}", *arguments]) == code
        return capsys.readouterr().out

    return requested


def chat(text, system=None):
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def spoken(model, tokenizer, prompt, count, **settings):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    settings = {
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | settings
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **settings)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def loaded(run, base=False):
    """The exported adapter on its base, by PEFT and transformers alone."""
    described = instantiate(run_folder.read(run)[1]["config"]["base"])
    model = AutoModelForCausalLM.from_pretrained(described.path)
    return (
        model if base else peft.PeftModel.from_pretrained(model, f"{run}/adapter")
    ).eval(), described.tokenizer


@pytest.mark.parametrize("prompt", ["3+4=", "größe 🦙?", "{{ x }} [b]"])
def test_greedy_is_transformers_own_with_the_exported_adapter(ask, trained, prompt):
    model, tokenizer = loaded(trained())
    expected = spoken(model, tokenizer, chat(prompt), 12)
    assert ask(f"prompt={prompt}", "max_new_tokens=12") == expected + "\n"
    assert expected != spoken(loaded(trained(), base=True)[0], tokenizer, chat(prompt), 12)


def test_plain_text_is_continued_as_it_is(ask, trained):
    model, tokenizer = loaded(trained("completion"))
    expected = spoken(model, tokenizer, "abc ab", 10)
    assert ask("prompt=abc ab", "max_new_tokens=10", kind="completion") == expected + "\n"


def test_a_system_prompt_stands_before_the_question(ask, trained, monkeypatch):
    seen = []
    whole = streamed_answer.answer
    monkeypatch.setattr(
        streamed_answer,
        "answer",
        lambda model, ids, *rest: (seen.append(ids), whole(model, ids, *rest))[1],
    )
    ask("prompt=3+4=", "system=be brief", "max_new_tokens=2")
    tokenizer = loaded(trained())[1]
    assert tokenizer.decode(seen[0]) == chat("3+4=", "be brief")


def test_a_prompt_is_asked_as_rows_were_trained(trained):
    actual = trained_module.load_trained(trained())
    renderer = Renderer(actual.base.tokenizer, actual.task)
    example = next(iter(actual.task.examples("train")))
    assert renderer.chat(example.messages[:-1]) == renderer.prompt(example)
    assert renderer(example).ids[: len(renderer.prompt(example))] == renderer.prompt(example)


def test_standard_input_is_a_prompt(ask, monkeypatch):
    expected = ask("prompt=3+4=", "max_new_tokens=6")
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4="))
    assert ask("prompt=-", "max_new_tokens=6") == expected


def test_text_streams_word_by_word_and_is_the_whole_when_it_ends(trained):
    actual = trained_module.load_trained(trained())
    tokenizer, pieces = actual.base.tokenizer, []
    options = SamplingOptions(seed=3, temperature=1.0)
    streamed_answer.answer(
        actual.model, tokenizer("abc 12 ")["input_ids"], tokenizer, [], options, 300, pieces.append
    )
    torch.manual_seed(3)
    expected = spoken(
        actual.model, tokenizer, "abc 12 ", 300, do_sample=True, top_k=0, eos_token_id=None
    )
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1
    assert len(set(expected)) > 60  # all tokens are drawn from, not the likeliest fifty


def test_an_answer_ends_at_its_end_token(trained):
    actual = trained_module.load_trained(trained())
    tokenizer = actual.base.tokenizer
    ids = tokenizer(chat("3+4="), add_special_tokens=False)["input_ids"]

    def message(stops):
        pieces = []
        streamed_answer.answer(
            actual.model, ids, tokenizer, stops, SamplingOptions(), 12, pieces.append
        )
        return "".join(pieces)

    whole = message([tokenizer.eos_token_id])
    first = tokenizer(whole[0])["input_ids"][-1]
    assert whole.startswith(message([first]))
    assert len(message([first])) < len(whole)


@pytest.fixture
def proposals(monkeypatch):
    """How often a drafter was asked."""
    seen, propose = [], Candidates.get_candidates

    def counted(self, *arguments, **more):
        seen.append(type(self.drafter).__name__)
        return propose(self, *arguments, **more)

    monkeypatch.setattr(Candidates, "get_candidates", counted)
    return seen


def test_a_drafter_changes_nothing_but_the_way(ask, trained, proposals, tiny):
    common = ("prompt=3+4=", "max_new_tokens=20")
    expected = ask(*common, "draft=false", kind="drafter")
    assert not proposals
    assert ask(*common, kind="drafter") == expected
    assert set(proposals) == {"MedusaHeads"}
    for name, built, more in (
        ("lookup", "PromptLookup", ()),
        ("recycling", "TokenRecycling", ()),
        ("small", "SmallModel", (f"small={tiny.path}",)),
    ):
        proposals.clear()
        assert ask(*common, f"drafter={name}", *more, kind="drafter") == expected
        assert set(proposals) == {built}
    sampled = [ask(*common, "temperature=1", f"seed={seed}", kind="drafter") for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_what_cannot_be_drafted_for_is_decoded_plainly(trained, proposals, capsys):
    run = trained("prompts")
    capsys.readouterr()
    assert generate.main([f"run={run}", "prompt=3+4=", "max_new_tokens=4"]) == 0
    assert generate.main([f"run={run}", "prompt=3+4=", "max_new_tokens=4", "drafter=lookup"]) == 2
    assert "virtual tokens" in capsys.readouterr().err
    assert not proposals


@pytest.mark.parametrize("settings", [("temperature=1",), ("temperature=0.7", "top_p=0.9")])
def test_sampling_repeats_with_its_seed_and_differs_with_another(ask, settings):
    common = ("prompt=3+4=", "max_new_tokens=24", *settings)
    first = ask(*common, "seed=1")
    assert ask(*common, "seed=1") == first
    assert any(ask(*common, f"seed={seed}") != first for seed in (2, 3, 4))


def test_a_narrow_top_p_is_greedy(ask):
    assert ask("prompt=3+4=", "max_new_tokens=8", "temperature=1", "top_p=0.000001") == ask(
        "prompt=3+4=", "max_new_tokens=8"
    )


@pytest.mark.parametrize("kind", ["sft", "full"])
def test_the_base_stands_beside_the_model(ask, trained, monkeypatch, kind):
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, force_terminal=False, width=160))
    base, tokenizer = loaded(trained(kind), base=True)
    alone = spoken(base, tokenizer, chat("1+1="), 3)
    adapted = ask("prompt=1+1=", "max_new_tokens=3", kind=kind).rstrip("\n")
    assert alone != adapted
    ask("prompt=1+1=", "max_new_tokens=3", "compare=true", kind=kind)
    cells = [
        re.split(r"[┃│]", line)[1:3]
        for line in shown.getvalue().splitlines()
        if re.match("[┃│]", line)
    ]
    assert [cell.strip() for cell in cells[0]] == ["base", "adapted"]
    visible = lambda text: re.sub(r"[\s\x00-\x1f\x7f]", "", text)  # noqa: E731
    columns = ["".join(visible(row[i]) for row in cells[1:]) for i in (0, 1)]
    assert columns == [visible(alone), visible(adapted)]


def test_a_terminal_shows_both_as_they_come(ask, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, force_terminal=True, width=120))
    ask("prompt=1+1=", "max_new_tokens=3", "compare=true")
    assert shown.getvalue().count("adapted") >= 2  # drawn again and again


def test_brackets_in_an_answer_are_no_markup(trained, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, force_terminal=False, width=120))
    monkeypatch.setattr(
        streamed_answer,
        "answer",
        lambda *arguments: arguments[-1]("[bold]x[/bold] [/nothing] [link=a]"),
    )
    assert generate.main([f"run={trained()}", "prompt=x", "compare=true"]) == 0
    assert shown.getvalue().count("[bold]x[/bold] [/nothing] [link=a]") == 2


def test_an_earlier_checkpoint_can_be_asked(train, chats, capsys):
    settings = (
        "max_steps=12",
        "callbacks.checkpoints.every=1",
        "callbacks.checkpoints.keep=12",
        "callbacks.evaluation=null",
    )
    run = train(f"task.path={chats}", *settings, "schedule=constant")
    capsys.readouterr()
    message = []
    for which in ("@1", "@12", "@last", ""):
        assert generate.main([f"run={run}{which}", "prompt=1+1=", "max_new_tokens=12"]) == 0
        message.append(capsys.readouterr().out)
    assert message[0] != message[1] == message[2] == message[3]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "sft",
            ["prompt=x", "max_new_tokens=0"],
            "max_new_tokens=0: expected a whole number, at least 1",
        ),
        ("sft", ["prompt=x", "temperature=-1"], "temperature=-1: expected a number, at least 0"),
        (
            "sft",
            ["prompt=x", "temperature=1", "top_p=0"],
            "top_p=0: expected a number, above 0 and at most 1",
        ),
        (
            "sft",
            ["prompt=x", "temperature=1", "top_p=1.5"],
            "top_p=1.5: expected a number, above 0 and at most 1",
        ),
        (
            "sft",
            ["prompt=x", "drafter=looky"],
            "drafter=looky: expected one of run, lookup, edit, recycling, small, run+lookup",
        ),
        ("sft", ["prompt=x", "drafter=small"], "drafter=small and small=PATH"),
        ("sft", ["prompt=x", "small=there"], "drafter=small and small=PATH"),
        ("sft", ["prompt=x", "drafter=small", "small=no/such/place"], "no/such/place"),
        ("completion", ["prompt="], "the prompt is empty"),
        ("completion", ["prompt=x", "system=y"], "this run was trained on plain text"),
        ("classification", ["prompt=x"], "this run trained a classifier, which writes no text"),
    ],
)
def test_what_cannot_be_asked_says_why(trained, capsys, kind, arguments, message):
    run = trained(kind)
    capsys.readouterr()
    assert exit_code(generate.main, [f"run={run}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_a_file_of_prompts_is_answered_in_batches(ask, tmp_path):
    texts = ["3+4=", "12+5\x7f\u2028=", "9+9="]
    lines = [{"prompt": texts[0]}, {"messages": [{"role": "user", "content": texts[1]}]}]
    lines.append({"prompt": texts[2]})
    file = write_rows(tmp_path / "prompts.jsonl", lines)
    for kind in ("sft", "drafter"):
        alone = [ask(f"prompt={text}", "max_new_tokens=7", kind=kind)[:-1] for text in texts]
        for size in (1, 2):
            out = ask(f"prompts={file}", f"batch_size={size}", "max_new_tokens=7", kind=kind)
            messages = [json.loads(line)["messages"] for line in out.splitlines()]
            assert [row[-2]["content"] for row in messages] == texts
            assert [row[-1] for row in messages] == [
                {"role": "assistant", "content": answer} for answer in alone
            ]


def test_a_prompt_or_a_file(ask, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    for words in ([], ["prompt=a", f"prompts={file}"], [f"prompts={file}", "compare=true"]):
        ask(*words, code=2)
    ask(f"prompts={tmp_path / 'none.jsonl'}", code=2)
