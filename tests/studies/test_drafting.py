"""A draft head in one command: its steps, where it continues, and its page."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from tests.conftest import ROOT, composed, sums, write_rows
from tests.toys.commands import exit_code, make_run
from trainer import draft
from trainer.config import commands
from trainer.config.errors import ConfigError
from trainer.drafters import DrafterError
from trainer.evaluation import stale
from trainer.studies import drafting, drafting_page


def options(tmp_path, *more):
    """Options of a command, with a run and prompts that exist."""
    run = make_run(tmp_path / "tuned")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1?"}])
    return [f"run={run}", f"prompts={prompts}", f"out={tmp_path / 'out'}", *more]


def work_of(tmp_path, *more):
    parsed = draft.parse(draft.Options, options(tmp_path, *more), draft.__doc__, "graft draft")
    return drafting.Work(parsed)


def test_every_experiment_that_distils_a_head_is_offered():
    distilling = {
        path.stem
        for path in (ROOT / "conf" / "experiment").glob("*.yaml")
        if "override /objective: distill" in path.read_text()
    }
    assert {*get_args(get_type_hints(draft.Options)["experiment"])} == distilling


def test_the_steps_are_commands_that_a_user_can_type(tmp_path):
    work = work_of(tmp_path, "experiment=dspark_chat", "to=drafter,speculators", "max_steps=3")
    assert [step.name for step in work.steps()] == [
        "answers",
        "head",
        "cooldown",
        "evaluation",
        "export drafter",
        "export speculators",
    ]
    words = {step.name: step.words for step in work.steps()}
    head = words["head"]()
    assert head[0] == "+experiment=dspark_chat"
    assert {"schedule=constant", "max_steps=3", "resume=auto", "task.train_on=last"} <= {*head}
    config = composed(*[word for word in head if not word.startswith("target.")])
    assert config.drafter._target_ == "trainer.drafters.block.Block"
    assert config.schedule._target_.endswith("constant")
    for name, step in words.items():
        if name in ("answers", "evaluation", "export drafter"):
            assert step()[0] in commands.NAMES
    assert f"run={tmp_path / 'out' / 'head-cooled'}" in words["export speculators"]()
    assert json.loads((tmp_path / "out" / "draft.json").read_text())["head"] == head[:-1]


def test_without_a_cooldown_the_experiment_has_its_own_schedule(tmp_path):
    (tmp_path / "config.json").touch()
    work = work_of(tmp_path, "cooldown=0", f"draft={tmp_path}")
    names = [step.name for step in work.steps()]
    assert "cooldown" not in names
    assert "stale" in names
    assert work.head == str(tmp_path / "out" / "head")


def test_other_settings_are_refused_and_a_stopped_step_is_done_again(tmp_path, monkeypatch, capsys):
    asked, codes = [], [0, 130]

    def run(command):
        asked.append(command[3])
        return codes.pop(0)

    monkeypatch.setattr(drafting, "finished", run)
    monkeypatch.setattr(drafting, "check", lambda _: None)
    words = options(tmp_path)
    assert draft.main(words) == 130
    assert asked == ["respond", "+experiment=eagle3_chat"]
    assert "head ended with 130: the same command continues there" in capsys.readouterr().err
    assert draft.main([*words, "max_steps=5"]) == 2
    assert "was started with other settings: overrides=[] there" in capsys.readouterr().err
    codes.append(1)
    assert draft.main([*words, "to=speculators"]) == 1
    assert asked[2:] == ["+experiment=eagle3_chat"]
    assert draft.main([*words, "dry=true"]) == 0
    assert "answers: done\nhead\n" in capsys.readouterr().out
    # Stopped after an export was written, and before it was recorded.
    (tmp_path / "out" / "drafter").mkdir()
    (step,) = (step for step in work_of(tmp_path).steps() if step.name == "export drafter")
    assert drafting._do(step) == 0
    assert len(asked) == 3
    (tmp_path / "out" / "draft.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        work_of(tmp_path)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["to=gguf"], "to=gguf: expected one of drafter, speculators"),
        (["cooldown=1.5"], "a share of the steps"),
        (["target.run=x"], "graft draft sets this itself"),
        (["experiment=rosa_sql"], "experiment"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, more, text, capsys):
    assert exit_code(draft.main, options(tmp_path, *more)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("experiment", "fits", "refused"),
    [
        ("uno_chat", "drafter,sglang", "speculators"),
        ("eagle3_chat", "drafter,speculators,sglang,gguf_draft", "medusa"),
    ],
)
def test_formats_are_refused_as_an_export_refuses_them(monkeypatch, experiment, fits, refused):
    def compose(words):
        return composed(*[word for word in words if not word.startswith("target.")], "base=tiny")

    base = composed("base=tiny", "base.layers=6", "task.path=x").base
    content = {"config": {"base": dict(base)}, "identity": {"labels": None}}
    monkeypatch.setattr(drafting.run_folder, "read", lambda run: (None, content, "last"))
    monkeypatch.setattr(drafting.compose, "compose", compose)
    asked = {"run": "r", "draft": None, "experiment": experiment, "prompts": "p", "overrides": []}
    drafting.check(SimpleNamespace(**asked, to=fits))
    with pytest.raises(DrafterError, match=f"to={refused} "):
        drafting.check(SimpleNamespace(**asked, to=refused))


def test_the_page_has_each_category_and_what_was_not_measured(tmp_path):
    def value(x):
        return {"value": x, "low": x - 0.5, "high": x + 0.5}

    figures = {"questions": 3, "tau": value(2.5), "speed_up": {"transformers": value(1.5)}}
    summary = figures | {"categories": {"math": figures, "chat": figures | {"questions": 1}}}
    (tmp_path / "speculation.json").write_text(json.dumps(summary))
    rows = [
        {"stage": stale.STAGES[0], "not_measured": "the run is gone"},
        {"stage": stale.STAGES[1], "categories": {"math": {"tau": 1.1, "first": 0.05}}},
        {"stage": stale.STAGES[2], "categories": {"math": {"tau": 2.2, "first": 0.6}}},
    ]
    (tmp_path / "stale.json").write_text(json.dumps(rows))
    record = {"settings": {"run": "runs/mine"}, "steps": {"head": {"seconds": 90.0}}}
    record["steps"]["export sglang"] = {"seconds": 6.0}
    page = drafting_page.page(tmp_path, record)
    assert "| head | 1.5 |" in page
    assert "| chat | 1 | 2.50 (2.00 to 3.00) | 1.50 (1.00 to 2.00) |" in page
    assert "| re-aligned head, new model | 2.20 (60%) |" in page
    assert "old head, old model: not measured, since the run is gone" in page
    assert f"- `{tmp_path / 'sglang'}`" in page


HEAD = (
    "adapter=none",
    "objective=distill",
    "drafter=eagle3",
    "drafter.offsets=2",
    "drafter.aux_layers=[0,1,2]",
    "drafter.coverage=0",
    "drafter.draft_vocab_size=64",
    "batch_size=4",
    "task.eval_fraction=0.2",
)


@pytest.mark.slow  # 30 seconds of a core
def test_an_old_head_is_re_aligned_from_answers_to_exports(train, tmp_path, monkeypatch, capsys):
    def run(command):
        words = command[3:]
        if words[0] in commands.NAMES:
            return importlib.import_module(f"trainer.{words[0]}").main(words[1:])
        train(*(word for word in words if not word.startswith("+experiment=")))
        return 0

    monkeypatch.setattr(drafting, "finished", run)
    rows = write_rows(tmp_path / "chats.jsonl", sums(40))
    old = train(f"task.path={rows}", *HEAD, "name=old", "max_steps=2")
    tuned = train(f"task.path={rows}", "name=tuned", "max_steps=2", "optimizer.lr=0.1")
    questions = [
        {"question_id": n, "category": name, "turns": [f"{n} + 2?"]}
        for n, name in enumerate(("math", "chat"))
    ]
    words = [
        f"run={tuned}",
        f"prompts={rows}",
        f"out={tmp_path / 'out'}",
        f"draft={old}",
        f"questions={write_rows(tmp_path / 'questions.jsonl', questions)}",
        "max_new_tokens=6",
        "rows=12",
        "cooldown=0.5",
        "verifier=org/target",
        "max_steps=2",
        "logger=none",
    ]
    assert draft.main([*words, "to=drafter,medusa"]) == 2
    assert "this drafter is EAGLE-3: to=speculators or to=sglang" in capsys.readouterr().err
    out = tmp_path / "out"
    assert not out.exists()
    assert draft.main([*words, "to=drafter,speculators"]) == 0
    record = json.loads((out / "draft.json").read_text())
    assert list(record["steps"]) == [
        "answers",
        "head",
        "cooldown",
        "evaluation",
        "stale",
        "export drafter",
        "export speculators",
    ]
    assert (out / "speculators" / "model.safetensors").exists()
    actual = json.loads((out / "stale.json").read_text())
    assert [row["stage"] for row in actual] == list(stale.STAGES)
    assert all(set(row["categories"]) == {"math", "chat"} for row in actual)
    assert "| old head, old model | " in (out / "draft.md").read_text()
    before = (out / "draft.json").read_bytes()
    assert draft.main([*words, "to=drafter"]) == 0
    assert (out / "draft.json").read_bytes() == before
