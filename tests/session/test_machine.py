"""graft doctor: each line is true of this machine, and what is not ok says how to change it."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import torch

from tests.toys.commands import exit_code
from trainer import doctor
from trainer.session import machine


def by_name(lines):
    return {line.name: line for line in lines}


def test_it_says_what_is_installed_and_what_the_hardware_has(tmp_path, capsys):
    code = exit_code(doctor.main, [f"json={tmp_path / 'd.json'}"])
    lines = json.loads((tmp_path / "d.json").read_text())
    named = {line["name"]: line for line in lines}
    assert named["torch"]["text"].startswith(metadata.version("torch"))
    assert named["bf16"]["state"] == (
        "ok" if machine.bf16_is_fast(torch.cuda.is_available()) else "slow"
    )
    assert code == int(any(line["state"] == "wrong" for line in lines))
    shown = capsys.readouterr().out
    assert all(line["fix"] in shown for line in lines)
    assert {line["group"] for line in lines} == {
        "versions",
        "devices",
        "speed",
        "optional",
        "places",
    }


@pytest.mark.parametrize(
    ("version", "state", "text"),
    [
        (None, "wrong", "not installed"),
        ("0.1", "wrong", "0.1, tested are"),
        ("2.13.5", "ok", "2.13.5"),
    ],
)
def test_a_version_outside_the_range_is_wrong_and_ends_with_1(
    monkeypatch, capsys, version, state, text
):
    monkeypatch.setattr(
        machine.metadata, "requires", lambda name: ["torch<2.14,>=2.13", "x; extra == 'y'"]
    )
    monkeypatch.setattr(machine, "installed", lambda name: version if name == "torch" else "9")
    line = by_name(machine._versions())["torch"]
    assert line.state == state
    assert line.text.startswith(text)
    assert bool(line.fix) == (state == "wrong")
    if state == "wrong":
        assert re.fullmatch(r"pip install 'torch[<>=.,\d]+'", line.fix)
        assert exit_code(doctor.main, []) == 1


def test_what_is_missing_has_its_command(monkeypatch):
    monkeypatch.setattr(machine, "_module", lambda name: False)
    monkeypatch.setattr(machine.sddmm, "library", lambda: None)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(machine, "bf16_is_fast", lambda cuda: True)
    lines = [*machine._fast(), *machine._optional()]
    assert {line.name for line in lines if line.fix} >= {
        "kernels in C", "flash attention", "flash-linear-attention", "causal-conv1d",
        "tensorboard", "liger-kernel",
    }  # fmt: skip
    assert not [line for line in lines if line.state == "missing" and not line.fix]


def test_a_card_without_a_build_for_it(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.torch.version, "cuda", None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    line = by_name(machine._devices())["GPU"]
    assert (line.state, "built for the CPU" in line.text) == ("slow", True)
    assert "pip install torch" in line.fix


def test_no_secret_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-word")
    lines = by_name(machine._places())
    assert lines["HF_TOKEN"].text == "set"
    assert "a-very-secret-word" not in repr(lines)
