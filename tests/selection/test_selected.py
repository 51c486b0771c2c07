"""Rows chosen by real runs of the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import AdapterError
from tasks.reading import DataError
from tests.conftest import write_rows
from tests.toys.commands import exit_code
from trainer import select as verb
from trainer.assembly.build import instantiate
from trainer.selection import selected
from trainer.selection.choose import Choice
from trainer.selection.gradients import RowLoss
from trainer.selection.selected import Plan, select
from trainer.storage import run_folder
from trainer.storage.door import FolderError


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **more}


def letters(count: int, start: int) -> list[dict[str, Any]]:
    return [
        chat("ab" * (1 + i % 4), "abcabc"[i % 3 :] + "x" * (i % 5), n=start + i)
        for i in range(count)
    ]


def digits(count: int, start: int) -> list[dict[str, Any]]:
    return [chat(f"{i}?", f"0{(i * 7) % 90 + 10}", n=start + i) for i in range(count)]


@pytest.fixture(scope="module")
def warm(train_in, tmp_path_factory):
    """A pool of two kinds of rows, mixed, and a run that has seen both."""
    place = tmp_path_factory.mktemp("selection")
    pool = [row for pair in zip(letters(40, 0), digits(40, 100), strict=True) for row in pair]
    rows = write_rows(place / "pool.jsonl", pool)
    write_rows(place / "targets.jsonl", [*digits(46, 900)[40:], pool[1]])
    run = train_in(
        place, f"task.path={rows}", "task.eval_fraction=0.05", "adapter=lora", "max_steps=12",
        "optimizer.lr=2e-2", "callbacks.evaluation.samples=0", "report=false",
        "callbacks.evaluation.every=null", "check_export=false", "name=warm",
    )  # fmt: skip
    return run, place


def test_a_conversation_of_several_texts_is_chosen_once():
    choice = Choice(np.array([3, 0, 2, 1]), np.array([0.9, 0.8, 0.7, 0.6]), np.array([5, 6, 7, 8]))
    once = selected.once(choice, np.array([10, 11, 12, 10]))  # places 0 and 3 are of one row
    assert once.rows.tolist() == [3, 2, 1]
    assert once.scores.tolist() == [0.9, 0.7, 0.6]
    assert once.targets.tolist() == [5, 7, 8]
    alone = selected.once(Choice(choice.rows, choice.scores), np.arange(4))
    assert alone.rows.tolist() == [3, 0, 2, 1]
    assert alone.targets is None


def chosen(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("by", ["gradient", "transport"])
def test_the_cluster_of_the_targets_is_chosen(warm, tmp_path, by, capsys):
    run, place = warm
    out = tmp_path / "rows.jsonl"
    words = [f"run={run}", f"target={place / 'targets.jsonl'}", f"by={by}", "keep=15", f"to={out}"]
    assert exit_code(verb.main, words) == 0
    text = capsys.readouterr().out
    assert "1 rows of the pool are targets, too, and were left out" in text
    assert "15 of 75 rows for 7 targets" in text
    rows = chosen(out)
    assert len(set(rows)) == 15
    assert sum(n >= 100 for n in rows) >= 14
    assert 100 not in rows  # the target of the pool
    record = json.loads((tmp_path / "rows.select.json").read_text())
    assert [entry["where"] for entry in record["rows"]] == [
        f"{place / 'pool.jsonl'}:{1 + (2 * (n - 100) + 1 if n >= 100 else 2 * n)}" for n in rows
    ]
    assert all(0 <= entry["target"] < 7 for entry in record["rows"])
    assert record["removed_as_targets"] == 1
    assert record["targets"]["rows"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.select.json"]


@pytest.mark.parametrize("by", ["leverage", "perplexity", "random"])
def test_choices_without_targets(warm, tmp_path, by):
    run, _ = warm
    first, second = (
        select(Plan(str(run), by, 0.25, tmp_path / f"{name}.jsonl", seed=4)) for name in "ab"
    )
    assert first.rows == 19
    assert first.pool == 76
    assert 0 < first.tokens < first.pool_tokens
    assert first.to.read_bytes() == second.to.read_bytes()
    if by != "perplexity":
        other = select(Plan(str(run), by, 0.25, tmp_path / "c.jsonl", seed=5))
        assert other.to.read_bytes() != first.to.read_bytes()


def test_a_stopped_choice_continues_to_the_same_bits(warm, tmp_path, monkeypatch):
    run, place = warm
    target = str(place / "targets.jsonl")

    def choose(name: str) -> bytes:
        plan = Plan(str(run), "gradient", 10, tmp_path / f"{name}.jsonl", target)
        return select(plan).to.read_bytes()

    whole, calls = choose("whole"), []
    gradient = RowLoss.gradient

    def stopping(self: Any, row: Any) -> Any:
        calls.append(row)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return gradient(self, row)

    monkeypatch.setattr(RowLoss, "gradient", stopping)
    with pytest.raises(KeyboardInterrupt):
        choose("cut")
    assert not (tmp_path / "cut.jsonl").exists()
    assert choose("cut") == whole
    assert len(calls) == 70 + (75 - 64) + 7
    assert not (tmp_path / "cut.jsonl.work").exists()


def test_the_gradient_is_that_of_the_mean_loss(warm):
    import torch

    from trainer.assembly.rows import load_data
    from trainer.assembly.trained import load_trained

    run = load_trained(str(warm[0]))
    data = load_data(run.config, run.base, run.task)
    assert data.train is not None
    row, loss = data.train.rows[3], RowLoss(run, data.collate)
    ids = torch.tensor([row.ids])
    logits = run.model(input_ids=ids).logits[0, :-1].float()
    labels = torch.tensor(row.ids[1:])
    where = torch.tensor(row.trained[1:])
    mean = torch.nn.functional.cross_entropy(logits[where], labels[where])
    expected = torch.autograd.grad(mean, loss.parameters)
    torch.testing.assert_close(
        loss.gradient(row), torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-6
    )
    assert float(loss.value(row)[0]) == pytest.approx(float(mean.detach()), rel=1e-5)


def test_what_cannot_be_chosen_from_is_refused(warm, tmp_path):
    run, place = warm
    to = tmp_path / "rows.jsonl"
    write_rows(place / "bad.jsonl", [{"messages": []}])
    skip = ("task.on_bad=skip",)
    with pytest.raises(DataError, match=r"target=.*bad\.jsonl: no row of train is left"):
        select(Plan(str(run), "gradient", 5, to, str(place / "bad.jsonl"), skip))
    with pytest.raises(DataError, match="keep=500: the pool has 76 rows"):
        select(Plan(str(run), "random", 500, to))
    folder, content, _ = run_folder.read(str(run))
    config = content["config"] | {"task": content["config"]["task"] | {"eval_fraction": 0.0}}
    with pytest.raises(DataError, match=r"holds out no rows\. Give a file"):
        selected._held_out(folder, config, instantiate(config["base"]))
    pool = (f"task.path={place / 'targets.jsonl'}", "task.eval_fraction=0")
    with pytest.raises(DataError, match="has no row that is no target"):
        select(Plan(str(run), "gradient", 5, to, str(place / "targets.jsonl"), pool))
    to.touch()
    with pytest.raises(FolderError, match=r"rows\.jsonl exists\. Remove it"):
        select(Plan(str(run), "random", 5, to))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_cold_adapter_says_nothing(warm):
    from types import SimpleNamespace

    import torch

    model = torch.nn.Module()
    model.register_parameter("A", torch.nn.Parameter(torch.ones(2)))
    inner = torch.nn.Module()
    inner.register_parameter("B", torch.nn.Parameter(torch.zeros(2)))
    model.add_module("delta", inner)
    run: Any = SimpleNamespace(model=model, step=60)
    plan = Plan("runs/x", "gradient", 5, Path("x.jsonl"))
    with pytest.raises(AdapterError, match=r"runs/x has B = 0: .* Train it first"):
        selected._refuse_cold(run, plan)
    inner.B.data += 1
    selected._refuse_cold(run, plan)
    model.requires_grad_(False)
    with pytest.raises(AdapterError, match="has no trained part"):
        selected._refuse_cold(run, plan)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keep=0.1"], "missing: target=FILE, the rows that by=gradient chooses for"),
        (["keep=0.1", "by=random", "target=eval"], "target=eval has no effect with by=random"),
        (["keep=1.0", "by=random"], "keep=1.0: expected a whole number of rows, or a share"),
        (["keep=0", "by=random"], "keep=0: expected a whole number, above 0, or a number"),
        (["keep=5", "by=random", "dims=64"], "dims=64 has no effect with by=random"),
        (["keep=5", "by=random", "to=x.csv"], "to=x.csv: expected the name of a .jsonl file"),
        (["keep=5", "by=loss"], "by=loss: expected one of gradient"),
        (["keep=5", "target=no.jsonl"], "no.jsonl"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to = [] if any(word.startswith("to=") for word in words) else ["to=rows.jsonl"]
    assert exit_code(verb.main, ["run=no/run", *to, *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
