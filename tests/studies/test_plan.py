"""A study's file: what it means, and what is wrong with it."""

from __future__ import annotations

import copy

import pytest
import yaml

from trainer.config.errors import ConfigError
from trainer.studies import plan

GOOD = {
    "name": "mine",
    "data": {"sums": {"overrides": ["task=sft", "task.path={folder}/a.jsonl"], "test": "t.jsonl"}},
    "methods": {"lora": ["adapter=lora"], "rosa": {"overrides": ["adapter=rosa"], "share": 0.25}},
    "rates": [1e-3, "1e-4"],
    "folder": "rows",
}


def write(tmp_path, **changes):
    file = tmp_path / "study.yaml"
    content = copy.deepcopy(GOOD) | changes
    file.write_text(yaml.safe_dump({key: v for key, v in content.items() if v != "leave out"}))
    return str(file)


def test_a_file_is_read_with_its_defaults_and_the_command_lines_changes(tmp_path):
    study = plan.read(write(tmp_path), {"seeds": [3, 4], "folder": "other"}, ["max_steps=2"])
    assert study.folder.as_posix() == "runs/mine"
    assert study.overrides == ["max_steps=2"]
    assert study.data["sums"].overrides == ["task=sft", "task.path=other/a.jsonl"]
    assert study.data["sums"].test == ["task.eval_path=t.jsonl"]
    assert study.methods["lora"].rates == [1e-4, 1e-3]
    assert (study.methods["rosa"].share, study.methods["rosa"].solve) == (0.25, True)
    assert (study.seeds, study.search_seed, study.baseline) == ([3, 4], 3, "lora")
    assert study.parameters is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": [1]}, "rate: there is no such key; did you mean rates?"),
        ({"rates": "leave out"}, "methods.lora has no rates: set rates, or rates of its own"),
        ({"rates": [0]}, "methods.lora: the rate 0 is no number above 0"),
        ({"rates": ["fast"]}, "the rate 'fast' is no number above 0"),
        ({"name": "leave out"}, "name is missing: names the study"),
        ({"name": "a/b"}, "name is 'a/b': a name has letters"),
        ({"seeds": []}, "seeds is [], expected whole numbers"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]: a seed occurs twice"),
        ({"mode": "least"}, "mode is 'least', expected min or max"),
        ({"parameters": 0}, "parameters is 0, expected 1 or more"),
        ({"parameters": True}, "parameters is True, expected int or null"),
        ({"data": {"a": {"generate": -1}}}, "data.a.generate is -1, expected 0 or more"),
        ({"data": {"a": {"batch_size": 0}}}, "data.a.batch_size is 0, expected 1 or more"),
        ({"methods": {}}, "methods is empty: name one at least"),
        ({"methods": {"a-b": []}}, "methods.a-b: a name has letters"),
        ({"methods": {"a": 3}}, "methods.a is 3, expected a list of settings"),
        ({"methods": {"a": {"share": 1}}}, "methods.a.share is 1, expected above 0 and below 1"),
        ({"methods": {"a": {"share": "x"}}}, "methods.a.share is 'x', expected float or int"),
        ({"methods": {"a": ["adapter"]}}, "methods.a has 'adapter', expected KEY=VALUE"),
        ({"methods": {"a": ["seed=1"]}}, "methods.a has seed=1: the study sets seed in each run"),
        ({"overrides": ["optimizer.lr=1"]}, "the study sets optimizer.lr in each run"),
        ({"folder": None}, "has task.path={folder}/a.jsonl: set folder"),
        ({"baseline": "dora"}, "baseline is dora, which is none of methods: lora, rosa"),
        ({"search": {"step": 3}}, "search.step: there is no such key"),
        ({"data": {"a": {"generate": "all"}}}, "data.a.generate is 'all', expected int"),
    ],
)
def test_faults_are_reported_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        plan.read(write(tmp_path, **changes), {}, [])
    assert message in str(error.value)


def test_what_is_no_study(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="expected a mapping with the keys name"):
        plan.read(str(file), {}, [])
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        plan.read(str(file), {}, [])
    assert plan.file_fault(str(file)) is None
    assert plan.file_fault("method") == "there is no such file, did you mean methods?"


@pytest.mark.parametrize("name", plan.presets())
def test_our_own_studies_can_be_read(name):
    study = plan.read(name, {"folder": "rows"}, [])
    assert study.parameters
    assert all(data.test and data.generate for data in study.data.values())


def test_a_method_that_occurs_twice_is_refused_with_its_line(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nmethods:\n  lora: [adapter=lora]\n  lora: [adapter=rosa]\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:4: the key lora occurs twice"):
        plan.read(str(file), {}, [])
