"""Settings of a run's task that graft evaluate replaces."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from trainer.config import compose
from trainer.config.errors import ConfigError
from trainer.evaluation.run_metrics import task_settings


@pytest.fixture(scope="module")
def task():
    config = OmegaConf.to_container(compose.compose(["task=sft", "task.path=a.jsonl"]))
    return config["task"]


def test_words_are_read_as_the_command_line_of_a_run_reads_them(task):
    words = ["task.eval_path=/a dir/b,c=1.jsonl", "task.eval_limit=null", "task.eval_split=test"]
    assert task_settings(task, words) == {
        "eval_path": "/a dir/b,c=1.jsonl",
        "eval_limit": None,
        "eval_split": "test",
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.eval_pth=a.jsonl", "task.eval_pth: there is no such key. Did you mean eval_path?"),
        ("task.eval_limit=0", "task.eval_limit is 0, but must be int >= 1"),
        ("task.eval_limit=many", "task.eval_limit is 'many', but must be int"),
        ("task._target_=os.system", "task._target_: there is no such key"),
        ("task.eval_path={_target_: os.system}", "no object may be created there"),
    ],
)
def test_what_is_no_setting_of_the_task_is_refused(task, word, message):
    with pytest.raises(ConfigError) as error:
        task_settings(task, [word])
    assert message in str(error.value)
