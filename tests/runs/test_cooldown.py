"""Cooldowns: branched off a run, begun at run time, and left out when the run is made longer."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tasks.wheel import sha256
from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer import cooldown
from trainer.callbacks.cooldown import CooldownTrigger
from trainer.callbacks.metrics import Metrics
from trainer.schedules.cooldown import SHAPES
from trainer.session import branches
from trainer.storage import checkpoints, journal
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.run_folder import FolderError

CONSTANT = (
    "schedule=constant",
    "schedule.warmup=3",
    "batch_size=4",
    "callbacks.checkpoints.every=4",
    "callbacks.checkpoints.keep=null",
    "callbacks.evaluation.every=4",
    "callbacks.evaluation.max_new_tokens=8",
    "check_export=false",
    "max_epochs=null",
    "adapter.dropout=0.3",
)


@pytest.fixture(scope="module")
def trained_once(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps at a constant rate, which keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("constant")
    chats = write_rows(folder / "chats.jsonl", sums(60))
    return train_in(folder, f"task.path={chats}", *CONSTANT, "max_steps=12", "name=constant")


@pytest.fixture
def constant(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of `trained_once` among the runs of this test."""
    return shutil.copytree(trained_once, tmp_path / "runs" / "constant", symlinks=True)


def branched(train: Any, run: str, *more: str, **options: Any) -> Path:
    """The run that the verb asks for, in this process."""
    _, arguments = branches.arguments(branches.Branch(run, **options), list(more))
    return train(*(argument for argument in arguments if not argument.startswith("+experiment")))


def rates(run: Path) -> dict[int, float]:
    """The rate of each step of a run."""
    return {
        row["step"]: row["lr"]
        for row in journal.read(run / "metrics.jsonl")
        if row["kind"] == "step"
    }


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_branch_that_does_not_fall_is_the_run_itself(train, chats, constant):
    """Weights, moments, rows and random draws are the run's own: with the rate left as it is, so
    are the bits."""
    before = contents(constant)
    branch = branched(train, f"{constant}@4", steps="8", final="1")
    assert same(outcome(branch)[0], outcome(constant)[0])
    assert outcome(branch)[1] == outcome(constant)[1]
    assert contents(constant) == before
    record = yaml.safe_load((branch / "run.yaml").read_text())
    saved = checkpoints.Checkpoint.at(constant / "checkpoints", 4).path
    assert record["parent"] == {
        "id": yaml.safe_load((constant / "run.yaml").read_text())["id"],
        "run": str(constant.resolve()),
        "step": 4,
        "sha256": sha256(saved),
    }
    assert record["id"] != record["parent"]["id"]


def test_a_branchs_rate_falls_from_the_runs_own(train, constant):
    branch = branched(train, f"{constant}@8", fraction="0.5", shape="cosine", final="0.1")
    actual, peak = rates(branch), rates(constant)[8]
    assert [actual[step] for step in range(1, 9)] == [rates(constant)[step] for step in range(1, 9)]
    expected = [peak * (0.1 + 0.9 * SHAPES["cosine"](k / 8)) for k in range(8)]
    assert [actual[step] for step in range(9, 17)] == pytest.approx(expected)
    assert max(actual) == 16


def test_a_branch_that_was_cut_off_goes_on(train, constant, monkeypatch):
    expected = outcome(branched(train, f"{constant}@8", steps="6", name="alone"))
    with monkeypatch.context() as patch:
        cut_at(patch, 13)
        with pytest.raises(PowerCut):
            branched(train, f"{constant}@8", steps="6", name="cut")
    branch = branches.Branch(f"{constant}@8", steps="6", name="cut")
    _, arguments = branches.arguments(branch, [])
    actual = outcome(
        train(*(a for a in arguments if not a.startswith("+experiment")), "resume=auto")
    )
    assert same(actual[0], expected[0])
    assert actual[1] == expected[1]


def test_a_branch_may_see_other_rows(train, chats, constant, caplog):
    other = chats.with_name("other.jsonl")
    other.write_text(chats.read_text().replace("1", "7"))
    caplog.set_level(logging.INFO, "trainer")
    branch = branched(train, f"{constant}@8", f"task.path={other}", steps="4")
    assert "from step 8 on, this branch trains on other rows than its parent" in caplog.text
    assert not same(
        outcome(branch)[0], outcome(branched(train, f"{constant}@8", steps="4", name="same"))[0]
    )


def test_a_branch_with_other_settings_is_refused(train, constant):
    with pytest.raises(CheckpointError, match=r"optimizer.lr: 0.01 in the run, 0.5 now"):
        branched(train, f"{constant}@8", "optimizer.lr=0.5", steps="4")
    damaged = checkpoints.Checkpoint.at(constant / "checkpoints", 8).path
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="instead of"):
        branched(train, f"{constant}@8", steps="4", name="damaged")


def test_a_falling_rate_is_branched_off_only_by_force(train, chats):
    run = train(
        f"task.path={chats}",
        *CONSTANT[2:],
        "schedule=cooldown",
        "schedule.warmup=2",
        "schedule.cooldown=6",
        "max_steps=12",
        "name=down",
    )
    assert branched(train, f"{run}@4", steps="2").name == "down-cooldown-4-2"
    with pytest.raises(
        ValueError,
        match=r"after step 8 of .*down the rate is already falling \(0.423 of the peak, 1 before\)",
    ):
        branched(train, f"{run}@8", steps="4")
    forced = rates(branched(train, f"{run}@8", steps="4", shape="linear", force=True))
    assert [forced[step] for step in range(9, 13)] == pytest.approx(
        [0.01 * (1 - (2 / 6) ** 0.5) * (1 - k / 4) for k in range(4)]
    )
    with pytest.raises(FolderError, match="is itself a cooldown"):
        branched(train, f"{run.parent / 'down-cooldown-4-2'}@4", steps="4")


def test_a_cooldown_of_so_many_tokens(train, chats):
    run = train(
        f"task.path={chats}",
        *CONSTANT[2:],
        "schedule=cooldown",
        "schedule.warmup=2",
        "schedule.cooldown_tokens=300",
        "max_steps=12",
        "schedule.shape=linear",
        "name=tokens",
    )
    steps = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]
    total = steps[-1]["tokens"]
    down = next(n for n in range(1, 12) if total - steps[-n - 1]["tokens"] >= 300)
    assert 1 < down < 8
    assert [row["lr"] for row in steps[-down - 1 :]] == pytest.approx(
        [0.01, *(0.01 * (1 - k / down) for k in range(down))]
    )
    assert branched(train, f"{run}@4", steps="2").name == "tokens-cooldown-4-2"
    with pytest.raises(ValueError, match=r"after step 12 of .* the rate is already falling"):
        branched(train, f"{run}@12", steps="4")


def test_the_family_is_counted(train, constant, capsys):
    for step, length in ((4, "2"), (8, "4")):
        branched(train, f"{constant}@{step}", steps=length)
    assert cooldown.main([f"family={constant}"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| constant")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [row[:4] for row in cells] == [
        ["constant", "", "", "12"],
        ["constant-cooldown-4-2", "4", "2", "6"],
        ["constant-cooldown-8-4", "8", "4", "12"],
    ]
    for row, name in zip(
        cells, ("constant", "constant-cooldown-4-2", "constant-cooldown-8-4"), strict=True
    ):
        last = [
            r
            for r in journal.read(constant.parent / name / "metrics.jsonl")
            if r["kind"] == "evaluation"
        ][-1]
        assert row[5] == f"{last['loss']:.4f}"
    # 8 constant steps and 2 + 4 of cooldown instead of 6 + 12.
    assert "took 14 steps" in (constant / "family.md").read_text()
    assert "they would have taken 18: 22% were saved" in (constant / "family.md").read_text()
    assert (constant / "family.svg").read_text().count("<svg") == 1


def test_the_verb_runs_one_branch_for_each_length(constant, warm_program, chats):
    run = constant.relative_to(chats.parent)
    words = (f"run={run}@4,8", "steps=2", "--multirun", "callbacks.evaluation=null")
    message = warm_program(*words, module="trainer.cooldown")
    assert message.returncode == 0, message.stderr
    for step in (4, 8):
        assert max(rates(constant.parent / f"constant-cooldown-{step}-2")) == step + 2
    assert "| constant-cooldown-8-2 | 8 | 2 | 10 |" in message.stdout


REFUSED = [
    (["steps=3"], "missing: from (or run), the run to branch off, or family"),
    (["from={run}@4", "run={run}@4", "steps=3"], "from and run are two names of one option"),
    (["run={run}@4,8", "steps=3"], "run={run}@4,8: several values need --multirun"),
    (["run=nowhere", "steps=3"], "run=nowhere: nowhere is no run folder"),
    (["from={run}@4"], "give the cooldown's length"),
    (["from={run}@4", "steps=3", "fraction=0.5"], "give the cooldown's length"),
    (["from={run}@4", "steps=0"], "steps=0 after step 4 is no cooldown"),
    (["from={run}@4", "steps=x"], "steps=x after step 4 is no cooldown"),
    (["from={run}@4", "fraction=1"], "fraction=1 after step 4 is no cooldown"),
    (["from={run}@4", "fraction=0.01"], "fraction=0.01 after step 4 is no cooldown"),
    (["from={run}@5", "steps=3"], "has no checkpoint '5'; it has the steps 4, 8, 12"),
    (["from={run}@4", "steps=3,4"], "steps=3,4: several values need --multirun"),
    (["from={run}@4,8", "steps=3", "name=x", "--multirun"], "2 branches cannot share a name"),
    (["from={run}@4", "steps=3", "shape=square"], "shape=square: expected one of 1-sqrt"),
    (["from={run}@4", "steps=3", "force=maybe"], "force=maybe: expected true or false"),
    (["from=nowhere", "steps=3"], "nowhere is no run folder"),
    (["family=nowhere"], "nowhere is no run folder"),
    (["steps"], "steps: expected KEY=VALUE"),
    (
        ["from={run}@4", "fractoin=0.5"],
        "fractoin=0.5: there is no such option. Did you mean fraction?",
    ),
]


def test_what_cannot_be_branched_is_said(constant, capsys):
    for arguments, message in REFUSED:
        words = [argument.format(run=constant) for argument in arguments]
        assert exit_code(cooldown.main, words) != 0
        assert message.format(run=constant) in capsys.readouterr().err


TRIGGERED = ("callbacks=[default,cooldown]", "callbacks.cooldown.length=4")


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Do something when a run has done a step."""
    whole = Metrics.record

    def acting(self, trainer, module, *rest):
        whole(self, trainer, module, *rest)
        if module.step == step:
            act(self.run_state)

    monkeypatch.setattr(Metrics, "record", acting)


WAYS = {
    "signal": (lambda context: os.kill(os.getpid(), signal.SIGUSR2), "SIGUSR2 was received"),
    "file": (lambda context: (context.folder.path / "cooldown").touch(), "cooldown was found"),
    "patience": (
        lambda context: setattr(context, "evals_since_best", 2),
        "no better evaluation in 2",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_cooldown_begins_when_it_is_asked_for(train, chats, monkeypatch, way):
    act, reason = WAYS[way]
    stop_at(monkeypatch, 5, act)
    run = train(
        f"task.path={chats}", *CONSTANT, *TRIGGERED, "callbacks.cooldown.patience=2", "max_steps=30"
    )
    actual = rates(run)
    assert [actual[step] for step in sorted(actual)] == pytest.approx(
        [0.01 / 3, 0.02 / 3, *[0.01] * 3, *(0.01 * (1 - (k / 4) ** 0.5) for k in range(4))]
    )
    (began,) = (row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "cooldown")
    assert (began["step"], began["steps"]) == (5, 4)
    assert reason in began["reason"]
    (stopped,) = (row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "stopped")
    assert (stopped["step"], stopped["reason"]) == (9, "cooled down over 4 steps")
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert not (run / "cooldown").exists()


def test_a_run_that_stays_the_same_cools_down(train, chats):
    """By its own evaluations: at a rate of next to nothing none is better than the first."""
    run = train(
        f"task.path={chats}",
        *CONSTANT,
        *TRIGGERED,
        "callbacks.cooldown.patience=2",
        "max_steps=30",
        "optimizer.lr=1e-30",
        "adapter.dropout=0",
    )
    assert max(rates(run)) == 12  # evaluated at 4 and 8, and four steps more


def test_a_cooldown_that_was_cut_off_goes_on(train, chats, monkeypatch):
    settings = (f"task.path={chats}", *CONSTANT, *TRIGGERED, "max_steps=30")
    touch = WAYS["file"][0]
    with monkeypatch.context() as patch:
        stop_at(patch, 5, touch)
        expected = outcome(train(*settings, "name=alone"))
    with monkeypatch.context() as patch:
        stop_at(patch, 5, touch)
        cut_at(patch, 7)
        with pytest.raises(PowerCut):
            train(*settings, "name=cut")
    actual = outcome(train(*settings, "name=cut", "resume=auto"))  # nothing asks for it any more
    assert same(actual[0], expected[0])
    assert [row for row in actual[1] if row["kind"] == "step"] == [
        row for row in expected[1] if row["kind"] == "step"
    ]


def test_a_run_that_is_made_longer_leaves_its_cooldown_out(train, chats, monkeypatch):
    settings = (f"task.path={chats}", *CONSTANT, "callbacks.checkpoints.keep=1")
    with monkeypatch.context() as patch:
        stop_at(patch, 5, WAYS["file"][0])
        run = train(*settings, *TRIGGERED, "max_steps=12", "name=cooled")
    cooled = outcome(run)[0]
    # the same length: nothing is left to do
    again = train(*settings, *TRIGGERED, "max_steps=12", "name=cooled", "resume=auto")
    assert same(outcome(again)[0], cooled)
    longer = train(*settings, *TRIGGERED, "max_steps=14", "name=cooled", "resume=auto")
    expected = train(*settings, "max_steps=14", "name=never")
    assert longer == run
    assert same(outcome(longer)[0], outcome(expected)[0])
    assert rates(longer) == rates(expected)
    assert not [
        row for row in journal.read(run / "metrics.jsonl") if row["kind"] in ("cooldown", "stopped")
    ]
    assert (run / "adapter-12" / "adapter_model.safetensors").exists()


def test_a_planned_cooldown_is_left_out_too(train, chats):
    settings = (
        f"task.path={chats}",
        *CONSTANT[1:],
        "schedule=cooldown",
        "schedule.cooldown=4",
        "callbacks.checkpoints.keep=1",
    )
    train(*settings, "max_steps=11", "name=grows")
    longer = train(*settings, "max_steps=15", "name=grows", "resume=auto")
    expected = train(*settings, "max_steps=15", "name=fresh")
    assert same(outcome(longer)[0], outcome(expected)[0])
    assert rates(longer) == rates(expected)


@pytest.mark.parametrize(
    ("length", "done", "minutes", "limit", "seconds", "expected"),
    [
        # 4 minutes are left after the reserve, and 10 steps take 11 s
        (10, 50, 5.0, 10.0, 50.0, 0),
        (10, 50, 8.83, 10.0, 50.0, 9),  # 10.2 s are left
        (10, 50, 8.99, 10.0, 50.0, 1),
        (0.5, 50, 8.0, 10.0, 50.0, 0),  # as many as were done take 55 s, and 60 s are left
        (0.5, 50, 8.2, 10.0, 50.0, 43),
    ],
)
def test_a_cooldown_is_done_by_the_deadline(
    tmp_path, monkeypatch, length, done, minutes, limit, seconds, expected
):
    folder: Any = types.SimpleNamespace(path=tmp_path)
    context: Any = types.SimpleNamespace(
        folder=folder, steps=10_000, evals_since_best=0, max_minutes=limit, minutes=minutes
    )
    trigger = CooldownTrigger(context, length, "1-sqrt", 0.0, None, "max_time", 1.0)
    monkeypatch.setattr(
        "trainer.callbacks.cooldown.time.monotonic", lambda: trigger.train_start + seconds
    )
    steps, reason = trigger._due(done)
    assert steps == expected
    assert ("deadline" in reason) == bool(steps)


def test_the_deadline_of_a_slurm_job(tmp_path, monkeypatch):
    clock = {"time": 970.0, "monotonic": 0.0}
    for name in clock:
        monkeypatch.setattr(
            f"trainer.callbacks.cooldown.time.{name}", lambda name=name: clock[name]
        )
    folder: Any = types.SimpleNamespace(path=tmp_path)
    context: Any = types.SimpleNamespace(
        folder=folder,
        steps=100,
        evals_since_best=0,
        max_minutes=None,
        minutes=0.0,
        signals=types.SimpleNamespace(),
    )
    module: Any = types.SimpleNamespace(step=0, runtime_cooldown=None, drop_cooldown=False)
    trigger = CooldownTrigger(context, 5, "1-sqrt", 0.0, None, "slurm", 0.0)
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    trigger.on_train_start(types.SimpleNamespace(is_global_zero=True), module)  # type: ignore[arg-type]
    assert trigger._seconds_left() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    trigger.on_train_start(types.SimpleNamespace(is_global_zero=True), module)  # type: ignore[arg-type]
    assert trigger._seconds_left() == 30.0
    # 1.2 s a step; a clock that was set back changes nothing
    clock |= {"time": 0.0, "monotonic": 12.0}
    assert trigger._seconds_left() == 18.0
    assert trigger._due(10)[0] == 0
    clock["monotonic"] = 24.0  # 2.4 s a step
    assert trigger._due(10)[0] == 2
