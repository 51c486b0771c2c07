"""Every row of the table of conflicts can be reached, and names settings that exist."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT
from trainer.config import compose as composer
from trainer.config import conflicts, schema
from trainer.config.conflicts import _CONDITION, FACTS, Conflict, holds, value_of

ROWS = conflicts.table()
# A value of a key that no row's own file gives, so that a condition on it can hold.
SET = {
    "callbacks.averaging": ("callbacks/averaging", "averaging"),
    "callbacks.cooldown": ("callbacks/cooldown", "cooldown"),
    "branch": ("branch/cooldown", None),
    "drafter": ("drafter/medusa", None),
    "drafter_adapter": ("drafter_adapter/lora", None),
    "penalty": ("penalty/deft", None),
}


@pytest.fixture(scope="module")
def smoke():
    """The smoke experiment's plain config, complete."""
    config = composer.compose(["+experiment=smoke", "task.path=rows.jsonl"])
    return OmegaConf.to_container(config, resolve=True)


def content(file):
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{file}.yaml"))


def put(config, key, value):
    *parents, last = key.split(".")
    for part in parents:
        config[part] = config.get(part) or {}
        config = config[part]
    config[last] = value


def satisfy(config, condition):
    """Change a plain config so that a condition holds."""
    if holds(condition, config):
        return
    negated, key, sign, expected = _CONDITION.match(condition).group("no", "key", "sign", "value")
    if key in ("@trains_adapter", "@trains"):
        target = "adapters.full.Nothing" if negated else "adapters.lora.LoRA"
        put(config, "adapter._target_", target)
    elif key == "@several_processes":
        put(config, "lightning.devices", 1 if negated else 2)
    elif key == "@schedule_free":
        put(config, "optimizer._target_", "schedulefree.AdamWScheduleFree")
    elif key in SET and sign is None and not negated:
        file, part = SET[key]
        put(config, key, content(file) if part is None else content(file)[part])
    elif sign is None:
        put(config, key, None if negated else True)
    elif sign == "<":
        put(config, key, float(expected) - 1)
    elif sign == "=":
        first = expected.split("|")[0].replace("*", "x")
        put(config, key, None if first == "null" else first)
    else:
        put(config, key, "something else")


def test_the_table_has_exactly_the_rows_of_the_list():
    """A row that is lost from conf/, or that takes other conditions, is noticed here. For one that
    is new, or that is meant to go, change tests/config/conflict_rows.txt too."""
    rows = [f"{row.file}: {' and '.join(row.conditions)}" for row in ROWS]
    listed = ROOT.joinpath("tests/config/conflict_rows.txt").read_text("utf-8").splitlines()
    assert set(listed) - set(rows) == set(), "conf/ lacks these"
    assert set(rows) - set(listed) == set(), "tests/config/conflict_rows.txt lacks these"
    assert len(set(rows)) == len(rows)


@pytest.mark.long
def test_each_row_can_be_reached(smoke):
    assert len(ROWS) > 50
    for row in ROWS:
        config = copy.deepcopy(smoke)
        group = row.file.partition("/")[0]
        if row.target is not None:
            config[group] = content(row.file)
        for condition in row.conditions:
            satisfy(config, condition)
        assert row.applies(config), row
        assert row.explain(config) in list(conflicts.conflicts(config)), row


def opposite(condition):
    negated, key, sign, expected = _CONDITION.match(condition).group("no", "key", "sign", "value")
    if sign is None:
        return key if negated else f"!{key}"
    return {"=": f"{key}!={expected}", "!=": f"{key}={expected}"}[sign]


@pytest.mark.long
def test_each_condition_counts(smoke):
    """A condition that always holds would make a row wider than it reads."""
    for row in ROWS:
        for condition in row.conditions:
            config = copy.deepcopy(smoke)
            if row.target is not None:
                config[row.file.partition("/")[0]] = content(row.file)
            for other in row.conditions:
                satisfy(config, other)
            assert row.applies(config), row
            if "<" in condition:
                put(config, condition.partition("<")[0], 100)
            elif condition == "@schedule_free":
                config["optimizer"] = content("optimizer/adamw")
            else:
                satisfy(config, opposite(condition))
            assert not row.applies(config), (row, condition)


def leaf_exists(key, file):
    """Whether a dotted key is one of a file of its group, or of conf/config.yaml."""
    group, _, rest = key.partition(".")
    names = [f"{group}/{name}" for name in schema.options(group)] or ["config"]
    for name in names:
        table = schema.load(name)
        for part in (rest if name != "config" else key).split("."):
            table = table.children.get(part) if isinstance(table, schema.Table) else None
        if table is not None:
            return True
    return rest in ("", "_target_") or key == "adapter.peft_type"


@pytest.mark.long
def test_each_row_names_settings_that_exist():
    classes = {
        str(
            value_of(
                content(path.relative_to(ROOT / "conf").with_suffix("").as_posix()), "_target_"
            )
        )
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    for row in ROWS:
        for condition in row.conditions:
            _, key, sign, expected = _CONDITION.match(condition).group("no", "key", "sign", "value")
            if key.startswith("@"):
                assert key[1:] in FACTS, row
                continue
            assert leaf_exists(key, row.file), (row, key)
            if sign and key.endswith("._target_"):
                for pattern in expected.split("|"):
                    assert any(fnmatchcase(name, pattern) for name in classes), (row, pattern)
        assert not conflicts._FIELD.sub("", row.message).count("{"), row


def test_a_comment_that_is_no_row_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("# not with packing and: no condition\nname: run\n")
    monkeypatch.setattr(schema, "CONF", tmp_path)
    conflicts.table.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"conf/config\.yaml: no row of conflicts"):
            conflicts.table()
    finally:
        conflicts.table.cache_clear()


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a", True), ("!a", False), ("b", False), ("!b", True), ("a=x*|3", True), ("a=4", False),
        ("a!=4", True), ("a!=3", False), ("a<4", True), ("a<3", False), ("c.d=null", True),
        ("e=true", True), ("e=True", False),
    ],
)  # fmt: skip
def test_conditions(condition, expected):
    row = Conflict("config", None, (condition,), "a is {a}")
    config = {"a": 3, "b": 0, "e": True}
    assert row.applies(config) is expected
    assert row.explain(config) == "a is 3"
