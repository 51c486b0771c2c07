"""Each way to fail has its message and its exit code, and what the message proposes can be done."""

from __future__ import annotations

import errno
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from adapters.delta import AdapterError
from tasks.reading import DataError
from tasks.wheel import FetchError
from trainer import __main__
from trainer.config.errors import ConfigError
from trainer.data.chat_template import Refused
from trainer.models.base import BaseError
from trainer.models.losses import NonFinite
from trainer.session import failures
from trainer.session.session import Unfinished
from trainer.storage.checkpoints import CheckpointError, UnusableCheckpoint
from trainer.storage.run_folder import FolderError


def huge():
    torch.empty(1 << 56)


def full():
    with Path("/dev/full").open("w") as file:
        file.write("x")


def raising(error):
    def act(*_, **__):
        raise error

    return act


EXPLAINED = {
    "config": (raising(ConfigError("said")), 2, "said"),
    "base": (raising(BaseError("said")), 2, "said"),
    "data": (raising(DataError("said")), 2, "said"),
    "chat template": (raising(Refused("said")), 2, "said"),
    "adapter": (raising(AdapterError("said")), 2, "said"),
    "download": (raising(FetchError("said")), 2, "said"),
    "folder": (raising(FolderError("said")), 2, "said"),
    "a checkpoint not written": (raising(CheckpointError("said")), 1, "said"),
    "another run's checkpoint": (raising(UnusableCheckpoint("said")), 2, "said"),
    "NaN": (raising(NonFinite("3 steps in a row")), 1, "3 steps in a row"),
    "no memory for torch": (huge, 1, "These settings need less memory: batch_size=4 accumulate=2"),
    "no memory for Python": (
        lambda: bytearray(1 << 62),
        1,
        "These settings need less memory: batch_size=4 accumulate=2",
    ),
    "no memory, and no word": (
        raising(MemoryError()),
        1,
        "out of memory: MemoryError\nThese settings need less memory",
    ),
    "no memory on a GPU": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")),
        1,
        (
            "out of memory: CUDA out of memory. Tried to allocate 2 GiB.\n"
            "These settings need less memory:"
            " batch_size=4"
        ),
    ),
    "a full disk": (
        full,
        1,
        (
            "the disk is full: [Errno 28] No space left on device. Free some space, and resume with"
            " resume=auto"
        ),
    ),
    "a full disk and its file": (
        raising(OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl")),
        1,
        "the disk is full: /x/metrics.jsonl.",
    ),
}
UNEXPLAINED = [
    KeyError("x"),
    ValueError("x"),
    RuntimeError("shapes differ"),
    OSError(errno.EIO, "Input/output error"),
    AssertionError(),
]


def caught(act):
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.fixture
def settings(compose):
    """The plain config of some overrides."""

    def plain(*overrides):
        cfg = compose("task.path=rows", *overrides)
        return OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
        )

    return plain


@pytest.fixture
def job(compose, monkeypatch, tmp_path):
    """Ends the program's job as a run that does `act`; returns the exit code."""

    def ended(act):
        (tmp_path / "rows.jsonl").write_text("{}\n")
        cfg = compose(
            "+experiment=smoke", f"task.path={tmp_path / 'rows.jsonl'}", f"runs={tmp_path}"
        )
        HydraConfig.instance().set_config(cfg)
        monkeypatch.setattr("trainer.run.run", lambda cfg, signals: act())
        with pytest.raises(SystemExit) as end:
            __main__._job(cfg)
        return end.value.code

    return ended


@pytest.mark.long
@pytest.mark.parametrize("case", EXPLAINED)
def test_the_program_says_what_it_is_and_ends_with_its_code(job, caplog, case):
    act, code, message = EXPLAINED[case]
    with caplog.at_level(logging.INFO):
        assert job(act) == code
    assert message in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("error", UNEXPLAINED, ids=repr)
def test_what_is_ours_to_mend_comes_with_its_traceback(job, caplog, error):
    assert failures.explained(error, {}) is None
    assert job(raising(error)) == 1
    assert "please report it with this traceback" in caplog.text
    assert "Traceback" in caplog.text
    assert type(error).__name__ in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("code", [130, 143, 1])
def test_a_run_that_was_stopped_ends_with_the_signals_code(job, caplog, code):
    assert job(raising(Unfinished("saved after step 3 of 9", code))) == code
    assert "saved after step 3 of 9" in caplog.text


@pytest.mark.long
def test_ctrl_c_before_the_run_begins(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer", "+experiment=smoke", "task.path=rows"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(__main__, "_run", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130


@pytest.mark.parametrize("case", EXPLAINED)
def test_a_verb_says_the_same_on_standard_error(capsys, case):
    act, code, message = EXPLAINED[case]
    assert failures.report_and_exit_code(caught(act)) == code
    err = capsys.readouterr().err
    message = message.replace("resume with resume=auto", "run the command again")  # it has no run
    assert message.partition("These settings need less memory")[0] in err
    assert err.count("\n") <= 2


def test_a_verb_that_has_a_config_proposes_what_needs_less(capsys, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "hunter2-hunter2")
    assert (
        failures.report_and_exit_code(
            MemoryError("for hunter2-hunter2"), {"batch_size": 8, "accumulate": 1}
        )
        == 1
    )
    err = capsys.readouterr().err
    assert "These settings need less memory: batch_size=4 accumulate=2" in err
    assert "hunter2" not in err


@pytest.mark.parametrize("error", UNEXPLAINED, ids=repr)
def test_a_verb_hands_on_what_it_cannot_explain(error):
    with pytest.raises(type(error)) as raised:
        failures.report_and_exit_code(error)
    assert raised.value is error


def proposals(text):
    """Each proposed set of overrides."""
    line = text.partition("These settings need less memory: ")[2]
    return [re.findall(r"[\w.]+=[\w-]+", way) for way in line.split(", or ")]


ADAPTERS = ["lora", "full", "prompt_tuning", "adalora", "none"]


@pytest.mark.long
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_proposed_can_be_done_and_is_a_change(settings, adapter):
    arguments = [
        f"adapter={adapter}",
        "precision=fp32",
        "max_length=1024",
        "batch_size=12",
        "accumulate=3",
        "max_steps=1",
        "base=tiny",
    ]
    extra = (
        ["adapter.num_virtual_tokens=4"]
        if adapter == "prompt_tuning"
        else ["adapter.tfinal=0"]
        if adapter == "adalora"
        else []
    )
    before = settings(*arguments, *extra)
    text, code = failures.explained(caught(huge), before)
    assert code == 1
    ways = proposals(text)
    assert ["batch_size=6", "accumulate=6"] in ways
    assert ["max_length=512"] in ways
    assert ["precision=bf16-true"] in ways
    assert (["base.quantization=nf4"] in ways) == (adapter != "full")
    for way in ways:
        assert settings(*arguments, *extra, *way) != before


@pytest.mark.parametrize("batch_size", range(2, 17))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_in_smaller_parts_is_the_same_step(settings, batch_size, accumulate):
    text, _ = failures.explained(
        MemoryError(), {"batch_size": batch_size, "accumulate": accumulate}
    )
    (first, second), *_ = proposals(text)
    smaller, more = int(first.removeprefix("batch_size=")), int(second.removeprefix("accumulate="))
    assert smaller * more == batch_size * accumulate
    assert smaller <= batch_size // 2


def test_where_nothing_is_left_to_lower_the_machine_is_too_small(settings):
    arguments = [
        "batch_size=1",
        "max_length=256",
        "precision=bf16-true",
        "base=tiny",
        "base.quantization=nf4",
        "max_steps=1",
    ]
    text, _ = failures.explained(
        MemoryError(), settings(*arguments, "objective.gradient_checkpointing=true")
    )
    assert text.splitlines()[1] == "Use a smaller base, or a machine with more memory."


def test_rates_that_are_too_high_end_the_run_with_a_reason(train, chats):
    settings = [
        "optimizer.lr=1e30",
        "objective.nonfinite_limit=2",
        "schedule.warmup=0",
        "callbacks.evaluation=null",
    ]
    with pytest.raises(NonFinite) as refusal:
        train(f"task.path={chats}", *settings)
    message, code = failures.explained(refusal.value, {})
    assert code == 1
    assert "2 steps in a row, up to step" in message
    assert "Lower optimizer.lr" in message


def test_a_missing_dashboard_package_is_the_users_to_install(train, chats, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError) as refusal:
        train(f"task.path={chats}", "logger=tensorboard", "max_steps=1")
    assert failures.explained(refusal.value, {}) == (
        "logger=tensorboard needs a package that is not installed: pip install tensorboard",
        2,
    )
