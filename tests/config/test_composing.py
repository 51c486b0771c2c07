"""What tests/composing.py composes is what Hydra composes."""

from __future__ import annotations

import sys

import pytest
import yaml
from omegaconf import OmegaConf

from tests import composing
from tests.conftest import composed
from trainer import __main__
from trainer.config.compose import compose

TASK = "task.path=rows.jsonl"
WORDS = {
    "values": ["experiment=smoke", TASK, "max_steps=3", "optimizer.lr=1e-3", "+task.columns.a=b"],
    "choices": ["experiment=smoke", TASK, "adapter=rosa", "schedule=multistep", "logger=wandb"],
    "several of one group": ["experiment=smoke", TASK, "callbacks=[default,averaging]"],
    "a choice and its values": ["experiment=smoke", TASK, "adapter=rslora", "adapter.rank=4"],
    "less": ["experiment=smoke", TASK, "~callbacks.progress", "logger=none"],
    "Hydra's": ["experiment=smoke", TASK, "hydra/launcher=slurm", "hydra.verbose=true"],
    "no experiment": [TASK, "base=tiny", "max_steps=2"],
}
FAULTS = {
    "an unknown choice": ["experiment=smoke", TASK, "adapter=loar"],
    "a group that is added": ["experiment=smoke", TASK, "++adapter=lora"],
    "a choice that is not there": ["experiment=smoke", TASK, "~adapter=rosa"],
    "a value that cannot be": ["experiment=smoke", TASK, "optimizer.lr=-1"],
    "no value": ["experiment=smoke"],
}


@pytest.mark.long
@pytest.mark.parametrize("case", WORDS)
def test_a_config_is_hydras(case):
    composed(*WORDS[case])
    quick = composed(*WORDS[case])  # from what the first has left
    with composing.as_hydra_does():
        expected = composed(*WORDS[case])
    assert OmegaConf.to_yaml(quick) == OmegaConf.to_yaml(expected)
    for flag in ("struct", "readonly"):
        assert OmegaConf.is_struct(quick) == OmegaConf.is_struct(expected), flag
    assert not OmegaConf.is_readonly(quick.hydra)


@pytest.mark.long
@pytest.mark.parametrize("case", FAULTS)
def test_an_error_is_hydras(case):
    with pytest.raises(Exception, match=r".+") as quick:
        composed(*FAULTS[case])
    with composing.as_hydra_does(), pytest.raises(Exception, match=r".+") as expected:
        composed(*FAULTS[case])
    assert (quick.type, str(quick.value)) == (expected.type, str(expected.value))


def test_what_a_test_changes_in_a_config_stays_there():
    first = composed("experiment=smoke", TASK)
    first.optimizer.lr = 7.0
    first.task.path = "other"
    assert composed("experiment=smoke", TASK).optimizer.lr != 7.0


@pytest.mark.long
def test_conf_is_read_once_by_every_way_to_compose(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer", "experiment=smoke", TASK, "--cfg", "job"])
    for again in (False, True):
        if again:
            monkeypatch.setattr(composing, "read", lambda *_: pytest.fail("read again"))
        assert compose(["experiment=smoke", TASK]).task.path == "rows.jsonl"
        with pytest.raises(SystemExit) as end:
            __main__.main()
        assert end.value.code == 0


@pytest.mark.long
def test_a_folder_of_ones_own_is_read_each_time(tmp_path):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    for steps in (3, 4):
        content = {"defaults": ["smoke"], "max_steps": steps}
        file.write_text("# @package _global_\n" + yaml.safe_dump(content))
        words = ["experiment=mine", TASK, f"hydra.searchpath=['file://{tmp_path}']"]
        assert compose(words).max_steps == steps


@pytest.mark.long
@pytest.mark.parametrize(
    "content",
    [
        {
            "defaults": [{"override /adapter": "rosa"}, {"override /base": "tiny"}, "_self_"],
            "adapter": {"rank": 4},
            "task": {"columns": {"a": "b"}},
        },
        {"defaults": [{"/base@own.base": "tiny"}], "own": {"a": [1, {"b": None}]}},
        {"optimizer": 3, "task": {"columns": {"a": "${name}"}}},
        {"hydra": {"searchpath": ["pkg://other"]}},
        {"hydra": {"run": "text", "job": {"chdir": True}}},
    ],
)
def test_a_file_of_ones_own_is_merged_as_hydra_does(tmp_path, content):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\n" + yaml.safe_dump(content))
    words = ["experiment=mine", TASK, f"hydra.searchpath=['file://{tmp_path}']"]

    def outcome():
        try:
            return OmegaConf.to_yaml(composed(*words))
        except Exception as error:
            return type(error), str(error)

    first, again = outcome(), outcome()
    with composing.as_hydra_does():
        expected = outcome()
    assert first == again == expected
