"""What happens around the steps: the numbers of each, when a run is evaluated, saved and stopped,
and what is shown."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import time

import pytest
import torch

from trainer.callbacks import every_steps
from trainer.callbacks.metrics import finite
from trainer.callbacks.tracking import wandb_logger
from trainer.storage import checkpoints, journal
from trainer.training.finetune import FineTune

COMMON = ("schedule=constant", "schedule.warmup=0", "callbacks.evaluation.samples=0")


def rows(run, kind):
    return [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == kind]


def of(run, kind, name):
    return [row[name] for row in rows(run, kind)]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (None, 10, None),
        (0.2, 10, 2),
        (0.2, 1, 1),
        (0.001, 10, 1),
        (1, 10, 1),
        (3, 10, 3),
        (3.0, 10, 3),
        (50, 10, 50),
        (0.5, 3, 2),
    ],
)
def test_below_one_a_distance_is_a_share_of_the_run(every, steps, expected):
    assert every_steps(every, steps) == expected


# metrics


def test_each_steps_numbers_are_those_of_its_rows(train, chats, tiny):
    started = time.monotonic()
    run = train(
        f"task.path={chats}",
        *COMMON,
        "max_steps=7",
        "batch_size=3",
        "accumulate=2",
        "callbacks.evaluation.every=null",
        "schedule.warmup=4",
        "optimizer.lr=1e-3",
    )
    wall = time.monotonic() - started
    actual = rows(run, "step")
    assert [row["step"] for row in actual] == list(range(1, 8))
    checked = json.loads((run / "preflight.json").read_text())["data"]["train"]
    assert [row["lr"] for row in actual] == pytest.approx(
        [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    )
    tokens = [0, *of(run, "step", "tokens")]
    grown = [b - a for a, b in itertools.pairwise(tokens)]
    assert all(6 * 10 <= n <= 6 * checked["longest"] for n in grown)
    assert sum(grown) <= checked["tokens"]
    seconds = of(run, "step", "seconds")
    assert all(0 < a < b for a, b in itertools.pairwise(seconds))
    assert seconds[-1] < wall
    spent = [b - a for a, b in zip([0.0, *seconds[:-1]], seconds, strict=True)]
    for row, new, took in zip(actual, grown, spent, strict=True):
        assert row["tokens_per_s"] == pytest.approx(new / took, rel=1e-6)
        assert 0 < row["trained_per_s"] < row["tokens_per_s"]
        assert row["grad_norm"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert row["skipped"] == 0
    assert actual[0]["loss"] == pytest.approx(math.log(259), rel=0.1)  # nothing is known yet


def test_the_first_steps_loss_is_the_bases_on_its_rows(train, chats, tiny):
    settings = (
        f"task.path={chats}",
        f"task.eval_path={chats}",
        "batch_size=60",
        "max_steps=1",
        "callbacks.evaluation.every=1",
    )
    run = train(*settings, *COMMON)
    before, after = rows(run, "evaluation")
    (step,) = rows(run, "step")
    assert step["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert step["accuracy"] == pytest.approx(before["accuracy"])
    assert after["loss"] < before["loss"]


def test_rows_of_several_steps_have_the_tokens_of_all(train, chats):
    each = train(f"task.path={chats}", *COMMON, "max_steps=7")
    some = train(f"task.path={chats}", *COMMON, "max_steps=7", "callbacks.progress.every=3")
    assert of(some, "step", "step") == [3, 6, 7]
    assert of(some, "step", "tokens") == [
        of(each, "step", "tokens")[step - 1] for step in (3, 6, 7)
    ]
    tokens, seconds = [0, *of(some, "step", "tokens")], [0.0, *of(some, "step", "seconds")]
    rates = [(tokens[i + 1] - tokens[i]) / (seconds[i + 1] - seconds[i]) for i in range(3)]
    assert of(some, "step", "tokens_per_s") == pytest.approx(rates, rel=1e-6)
    assert of(some, "step", "loss") == [of(each, "step", "loss")[step - 1] for step in (3, 6, 7)]


def test_time_spent_on_evaluation_is_not_training(train, chats, monkeypatch):
    from trainer.callbacks import evaluation

    whole, clock, spent = evaluation.losses, time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 10_000 * len(spent))
    monkeypatch.setattr(evaluation, "losses", lambda *a, **k: (spent.append(1), whole(*a, **k))[1])
    run = train(f"task.path={chats}", *COMMON, "max_steps=4", "callbacks.evaluation.every=1")
    assert len(spent) == 5
    assert all(seconds >= 10_000 for seconds in of(run, "evaluation", "seconds"))
    assert of(run, "step", "seconds")[-1] < 10_000  # of more than fifty thousand in all


def spoilt(monkeypatch, steps, value=math.nan):
    """Give the loss of some steps another value."""
    whole = FineTune.training_step

    def step(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        if self.step + 1 in steps:
            self.sums["loss"] = self.sums["loss"] + value
            loss = loss * value
        return loss

    monkeypatch.setattr(FineTune, "training_step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_passed_over_is_written_with_its_rows_as_json(
    train, chats, monkeypatch, caplog, value
):
    spoilt(monkeypatch, {1, 3}, value)
    with caplog.at_level(logging.INFO):
        run = train(
            f"task.path={chats}",
            *COMMON,
            "max_steps=4",
            "batch_size=2",
            "task.eval_path=" + str(chats),
        )

    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)
    actual = rows(run, "skipped")
    assert [row["step"] for row in actual] == [1, 3]
    assert all(not math.isfinite(float(row["loss"])) for row in actual)
    places = [place for row in actual for place in row["rows"]]
    assert len(places) == 4
    assert all(re.fullmatch(r".*chats\.jsonl:\d+", place) for place in places), places
    assert of(run, "step", "skipped") == [1, 1, 2, 2]
    assert [loss is None for loss in of(run, "step", "loss")] == [True, False, True, False]
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.5, 1.5), (0.0, 0.0), (math.nan, None), (math.inf, None), (-math.inf, None)],
)
def test_json_has_no_word_for_what_is_not_finite(value, expected):
    assert finite(value) == expected


# evaluation


@pytest.mark.parametrize(
    ("every", "steps"),
    [("null", [0, 7]), ("3", [0, 3, 6, 7]), ("0.5", [0, 4, 7])],
)
def test_a_run_is_evaluated_before_between_and_after(train, chats, every, steps):
    run = train(f"task.path={chats}", *COMMON, "max_steps=7", f"callbacks.evaluation.every={every}")
    assert of(run, "evaluation", "step") == steps


def test_answers_are_graded_at_both_ends_and_where_asked_between(train, chats):
    settings = (
        f"task.path={chats}",
        f"task.eval_path={chats}",
        "callbacks.evaluation.max_new_tokens=2",
        "max_steps=5",
    )
    run = train(
        *settings,
        "callbacks.evaluation.generate=3",
        "callbacks.evaluation.every=1",
        "callbacks.evaluation.generate_every=2",
    )
    graded = {row["step"]: "exact_match" in row for row in rows(run, "evaluation")}
    # Of the evaluations 1 2 3 4 5 6, every second one, and both ends.
    assert graded == {0: True, 1: True, 2: False, 3: True, 4: False, 5: True}
    kept = journal.read(run / "samples.jsonl")
    assert [row["step"] for row in kept] == [
        step for step, yes in graded.items() if yes for _ in range(3)
    ]
    assert len({row["where"] for row in kept}) == 3


def test_fewer_answers_are_kept_than_graded(train, chats, caplog):
    settings = (
        f"task.path={chats}",
        f"task.eval_path={chats}",
        "callbacks.evaluation.max_new_tokens=1",
        "max_steps=1",
    )
    with caplog.at_level(logging.INFO, "trainer"):
        run = train(
            *settings,
            "callbacks.evaluation.generate=5",
            "callbacks.evaluation.generate_before=1",
            "callbacks.evaluation.samples=2",
        )
    assert [row["step"] for row in journal.read(run / "samples.jsonl")] == [0, 0, 1, 1]
    assert of(run, "evaluation", "answers") == [1, 5]
    for row in rows(run, "evaluation"):
        assert 0 < row["answer_seconds"] < row["seconds"]
    text = r"evaluation at step 1: .*loss [\d.]+ s, 5 graded answers [\d.]+ s"
    assert re.search(text, caplog.text)
    other = train(*settings, "callbacks.evaluation.generate=0", "callbacks.evaluation.samples=2")
    assert [row["step"] for row in journal.read(other / "samples.jsonl")] == [0, 0, 1, 1]
    assert not any("exact_match" in row for row in rows(other, "evaluation"))


def test_the_evaluation_before_training_is_of_the_base_alone(train, chats):
    settings = (f"task.path={chats}", "max_steps=1", *COMMON)
    alone = of(train(*settings, "adapter=none"), "evaluation", "loss")[0]
    with_adapter = of(
        train(*settings, "adapter=prompt_tuning", "adapter.num_virtual_tokens=4"),
        "evaluation",
        "loss",
    )
    assert with_adapter[0] == pytest.approx(alone, rel=1e-5)
    # virtual tokens disturb from the start
    assert with_adapter[1] != pytest.approx(alone, rel=1e-5)


def scripted(monkeypatch, values, name="loss"):
    """Let evaluations find these values, the one before training first."""
    from trainer.callbacks import evaluation

    whole, left = evaluation.losses, iter(values)
    monkeypatch.setattr(evaluation, "losses", lambda *a, **k: whole(*a, **k) | {name: next(left)})


@pytest.mark.parametrize(
    ("values", "mode", "patience", "stopped", "best"),
    [
        ([9.0, 5.0, 6.0, 4.0, 6.0, 7.0], "min", 2, 5, 3),
        ([9.0, 5.0, 5.0, 5.0], "min", 2, 3, 1),  # the same is not better
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], "min", 1, None, 6),
        ([0.1, 0.3, 0.2, 0.1], "max", 2, 3, 1),
        ([9.0, math.nan, math.nan, 1.0], "min", 2, 2, None),
        ([1.0, 5.0, 4.0, 6.0], "min", 2, 2, None),  # never better than the base
    ],
)
def test_patience_counts_evaluations_without_a_better_one(
    train, chats, monkeypatch, values, mode, patience, stopped, best
):
    scripted(monkeypatch, values)
    run = train(
        f"task.path={chats}",
        *COMMON,
        "max_steps=6",
        "callbacks.evaluation.every=1",
        f"callbacks.evaluation.patience={patience}",
        f"callbacks.evaluation.mode={mode}",
        "callbacks.checkpoints.every=null",
        "callbacks.checkpoints.keep=1",
    )
    reasons = rows(run, "stopped")
    assert [row["step"] for row in reasons] == ([] if stopped is None else [stopped])
    assert all(f"no better loss in {patience} evaluations" in row["reason"] for row in reasons)
    file = run / "checkpoints" / "best.json"
    assert (json.loads(file.read_text())["step"] if file.exists() else None) == best
    last = stopped or 6
    assert of(run, "step", "step")[-1] == last
    kept = [saved.step for saved in checkpoints.complete(run / "checkpoints")]
    assert kept == sorted({last} | ({best} if best else set()))


def test_a_run_is_left_as_it_was_by_an_evaluation(train, chats):
    settings = (f"task.path={chats}", *COMMON, "max_steps=5", "adapter.dropout=0.5")
    often = train(*settings, "callbacks.evaluation.every=1", "callbacks.evaluation.generate=2")
    never = train(*settings, "callbacks.evaluation=null")
    assert of(often, "step", "loss") == of(never, "step", "loss")


# checkpoints


@pytest.mark.parametrize(
    ("every", "keep", "steps"),
    [("null", 3, [9]), ("3", 1, [6, 9]), ("2", 3, [6, 8, 9]), ("0.34", 9, [3, 6, 9])],
)
def test_the_newest_stay_and_the_one_before_the_cooldown(train, chats, every, keep, steps):
    settings = (
        "max_steps=9",
        f"callbacks.checkpoints.every={every}",
        f"callbacks.checkpoints.keep={keep}",
    )
    run = train(f"task.path={chats}", *settings, "callbacks.evaluation=null")
    assert [saved.step for saved in checkpoints.complete(run / "checkpoints")] == steps
    files = [f"step-{step:08d}.{end}" for step in steps for end in ("ckpt", "json")]
    marks = [] if every == "null" else ["constant.json"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted([*marks, *files])


def test_the_best_stays_however_old_and_becomes_the_adapter(train, chats, monkeypatch):
    from safetensors.torch import load_file

    scripted(monkeypatch, [9.0, 8.0, 2.0, 5.0, 4.0, 3.0, 6.0])
    run = train(
        f"task.path={chats}",
        *COMMON,
        "max_steps=6",
        "callbacks.evaluation.every=1",
        "callbacks.checkpoints.every=1",
        "callbacks.checkpoints.keep=2",
        "export=best",
    )
    assert [saved.step for saved in checkpoints.complete(run / "checkpoints")] == [2, 5, 6]
    assert checkpoints.chosen(run / "checkpoints", "best").step == 2
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    parts = {
        step: checkpoints.load(checkpoints.Checkpoint.at(run / "checkpoints", step))["adapter"][
            "tensors"
        ]
        for step in (2, 6)
    }
    sums = {
        step: sum(float(tensor.abs().sum()) for tensor in tensors.values())
        for step, tensors in parts.items()
    }
    assert sum(float(tensor.abs().sum()) for tensor in saved.values()) == pytest.approx(
        sums[2], rel=1e-6
    )
    assert sums[2] != pytest.approx(sums[6], rel=1e-4)


def test_accumulation_is_never_cut(train, chats):
    run = train(
        f"task.path={chats}",
        *COMMON,
        "max_steps=5",
        "accumulate=3",
        "batch_size=2",
        "callbacks.checkpoints.every=2",
    )
    for checkpoint in checkpoints.complete(run / "checkpoints"):
        saved = checkpoints.load(checkpoint)
        assert saved["counters"]["step"] == checkpoint.step
        batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert batches == 3 * checkpoint.step


# stopping


def test_the_time_of_all_starts_counts(train, chats):
    settings = (
        f"task.path={chats}",
        *COMMON,
        "max_steps=2000",
        "callbacks.evaluation=null",
        "callbacks.checkpoints.every=null",
    )
    run = train(*settings, "max_time=0.01")
    (first,) = rows(run, "stopped")
    assert first["reason"] == "max_time=0.01 minutes have passed"
    assert first["minutes"] >= 0.01
    train(*settings, f"max_time={first['minutes'] + 0.0005}", "resume=auto")
    (second,) = rows(run, "stopped")
    assert second["minutes"] >= first["minutes"] + 0.0005
    # a twentieth of the first start's time
    assert 0 < second["step"] - first["step"] < first["step"] / 2


@pytest.mark.parametrize("limit", [1, 300])
def test_tokens_end_a_stream_after_the_step_that_reaches_them(train, chats, limit):
    settings = (
        "task.streaming=true",
        f"task.eval_path={chats}",
        "max_steps=9",
        "batch_size=4",
        "callbacks.evaluation=null",
    )
    run = train(f"task.path={chats}", *settings, f"max_tokens={limit}")
    tokens = [0, *of(run, "step", "tokens")]
    assert tokens[-1] >= limit > tokens[-2]
    assert [row["reason"] for row in rows(run, "stopped")] == [f"max_tokens={limit} are processed"]


# tracking


class Run:
    """A W&B run that records its calls."""

    def __init__(self, folder):
        self.dir, self.id, self.events = str(folder / "wandb" / "run-1-abcd" / "files"), "abcd", []

    def __getattr__(self, name):
        return lambda *of, **named: self.events.append((name, *of, named))


class Refusing:
    """W&B's init as it fails for some modes; notes what it is asked for."""

    def __init__(self, failing, folder=None):
        self.failing, self.asked, self.folder = failing, [], folder
        self.runs = []

    def __call__(self, **settings):
        self.asked.append(settings)
        if settings["mode"] in self.failing:
            raise RuntimeError("no route to host\nmore")
        self.runs.append(Run(self.folder))
        return self.runs[-1]


START = {"git": "0" * 8, "number": 1}


@pytest.fixture
def dashboard(tmp_path, monkeypatch):
    """Starts W&B's logger with some modes failing; returns the modes tried and whether there is a
    logger."""
    import wandb

    def started(mode, failing, key=True, netrc=tmp_path / "none", base_url=None):
        (
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
            if key
            else monkeypatch.delenv("WANDB_API_KEY", raising=False)
        )
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.delenv("WANDB_BASE_URL", raising=False)
        if base_url is not None:
            monkeypatch.setenv("WANDB_BASE_URL", base_url)
        monkeypatch.setenv("NETRC", str(netrc))
        init = Refusing(failing, tmp_path)
        monkeypatch.setattr(wandb, "init", init)
        monkeypatch.setattr(wandb, "teardown", lambda: None)
        logger = wandb_logger(
            tmp_path,
            "abcd",
            "name",
            {"a": 1},
            START,
            None,
            "graft",
            None,
            mode,
            None,
            None,
            ["t"],
            None,
            3,
            False,
            True,
            15.0,
            1.0,
            1.0,
        )
        assert all(
            (asked["id"], asked["resume"], asked["dir"]) == ("abcd", "allow", tmp_path)
            for asked in init.asked
        )
        assert all(
            asked["config"]["a"] == 1 and asked["config"]["start"]["git"] == "0" * 8
            for asked in init.asked
        )
        return [asked["mode"] for asked in init.asked], logger is not None

    return started


@pytest.mark.parametrize(
    ("mode", "key", "failing", "tried", "logged", "said"),
    [
        ("auto", True, [], ["online"], True, None),
        (
            "auto",
            True,
            ["online"],
            ["online", "offline"],
            True,
            "no route to host, so this run is logged offline",
        ),
        (
            "auto",
            True,
            ["online", "offline"],
            ["online", "offline"],
            False,
            "the run continues without it",
        ),
        ("auto", False, [], ["offline"], True, "no API key, so this run is logged offline"),
        (
            "online",
            True,
            ["online"],
            ["online", "offline"],
            True,
            "no route to host, so this run is logged offline",
        ),
        ("online", False, [], ["offline"], True, "no API key, so this run is logged offline"),
        ("offline", False, [], ["offline"], True, None),
        ("offline", True, ["offline"], ["offline"], False, "the run continues without it"),
        ("disabled", True, [], [], False, None),
    ],
)
def test_a_dashboard_that_fails_costs_the_copy_and_not_the_run(
    dashboard, caplog, mode, key, failing, tried, logged, said
):
    with caplog.at_level(logging.INFO):
        assert dashboard(mode, failing, key) == (tried, logged)
    assert "more" not in caplog.text
    assert (said in caplog.text) if said else (caplog.text == "")
    if said and "offline" in said:
        assert "wandb sync" in caplog.text


@pytest.mark.parametrize("server", ["default", "https://api.wandb.ai", "http://own.example:8080"])
def test_a_key_in_the_netrc_file_is_a_key(dashboard, tmp_path, monkeypatch, server):
    """Also under the name that W&B itself takes by default, which is its own to change."""
    from wandb.sdk.wandb_settings import Settings

    default = Settings.model_fields["base_url"].default
    host = (default if server == "default" else server).partition("://")[2]
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    base_url = server if "own" in server else None
    assert dashboard("auto", [], False, tmp_path / ".netrc", base_url) == (["online"], True)


@pytest.mark.parametrize(
    "content",
    ["machine api.wandb.ai login\nnonsense here", "machine elsewhere.org login a password b\n"],
)
def test_a_netrc_file_without_a_key_is_none(dashboard, tmp_path, content):
    (tmp_path / ".netrc").write_text(content)
    (tmp_path / ".netrc").chmod(0o600)
    assert dashboard("auto", [], False, tmp_path / ".netrc") == (["offline"], True)


def test_a_run_without_its_dashboard_is_whole(train, chats, monkeypatch, caplog):
    import wandb

    monkeypatch.setattr(wandb, "init", Refusing(["online", "offline"]))
    run = train(f"task.path={chats}", "logger=wandb", "max_steps=2", "callbacks.evaluation=null")
    assert "the run continues without it" in caplog.text
    assert of(run, "step", "step") == [1, 2]
    assert (run / "report.html").exists()


def test_tensorboard_holds_the_journals_numbers(train, chats):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(f"task.path={chats}", "logger=tensorboard", "max_steps=3", *COMMON)
    actual = EventAccumulator(str(run / "tensorboard")).Reload()
    for kind, prefix in (("step", "train"), ("evaluation", "eval")):
        events = actual.Scalars(f"{prefix}/loss")
        assert [event.step for event in events] == of(run, kind, "step")
        assert [event.value for event in events] == pytest.approx(of(run, kind, "loss"), rel=1e-5)


# progress


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(train, chats, monkeypatch, caplog):
    import io

    import rich
    from rich.console import Console

    for terminal in (False, True):
        caplog.clear()
        shown = io.StringIO()
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
            patch.setattr(rich, "_console", Console(file=shown, force_terminal=terminal, width=200))
            train(
                f"task.path={chats}",
                *COMMON,
                "max_steps=3",
                "optimizer.lr=1e-3",
                "callbacks.evaluation.every=null",
            )
        lines = [
            record.getMessage()
            for record in caplog.records
            if record.getMessage().startswith("step ")
        ]
        if terminal:
            assert lines == []
            assert "3/3" in shown.getvalue()
            assert re.search(
                r"loss \d\.\d{4}  lr 1\.00e-03  [\d,]+ tokens/s \([\d,]+ trained\)",
                shown.getvalue(),
            )
        else:
            assert lines[0].startswith("step 1/3  loss 5.")
            assert lines[-1].startswith("step 3/3  ")
            assert lines[-1].endswith("left 0:00")


def test_a_run_that_only_time_ends_is_told_without_a_number_of_steps(monkeypatch, caplog):
    import io
    from types import SimpleNamespace

    import rich
    from rich.console import Console

    from trainer.callbacks.progress import ProgressBar

    row = {"loss": 1.5, "lr": 1e-3, "tokens_per_s": 100.0, "trained_per_s": 50.0}
    for minutes, expected in ((13, "left 10:30"), (None, "")):
        context = SimpleNamespace(
            steps=1 << 61, max_minutes=minutes, minutes=2.5, journal=SimpleNamespace(last=row)
        )
        trainer, module = (
            SimpleNamespace(is_global_zero=True),
            SimpleNamespace(step=0, step_done=True),
        )
        for terminal in (False, True):
            caplog.clear()
            shown = io.StringIO()
            with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
                patch.setattr(
                    rich, "_console", Console(file=shown, force_terminal=terminal, width=200)
                )
                progress = ProgressBar(context, 1)
                module.step = 0
                progress.on_train_start(trainer, module)
                module.step = 297
                progress.update(trainer, module)
                progress.on_train_end(trainer, module)
            if terminal:
                said = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown.getvalue())
                assert re.search(r"step 297 .*loss 1\.5000", said)
                assert ("left" in said) == bool(expected)
                assert expected in said
            else:
                line = caplog.records[-1].getMessage()
                assert (
                    line == "step 297  loss 1.5000  lr 1.00e-03  100 tokens/s (50"
                    f" trained){'  ' if expected else ''}{expected}"
                )
            assert str(1 << 61) not in shown.getvalue() + caplog.text


def test_a_bar_goes_away_when_the_run_breaks_off(train, chats, monkeypatch):
    import io

    import rich
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(rich, "_console", console)

    def broken(self, *arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(FineTune, "training_step", broken)
    with pytest.raises(torch.OutOfMemoryError):
        train(f"task.path={chats}", *COMMON, "max_steps=3")
    assert not console._live_stack
