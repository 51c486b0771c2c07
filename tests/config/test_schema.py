"""conf/ as a schema: the grammar of the comments, and what is said of a value that does not fit."""

from __future__ import annotations

import math
import re

import pytest

from trainer.config import schema
from trainer.config.groups import default_choices
from trainer.config.overrides import groups


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """Writes a file of conf/ and returns its schema."""

    def written(name, text):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return schema.load(name)

    monkeypatch.setattr(schema, "CONF", tmp_path)
    schema.load.cache_clear()
    yield written
    schema.load.cache_clear()


FITS = [
    ("int", [0, -3, 10**12], [1.0, "1", None, [], True]),
    ("float", [0, -1.5, 1e-300], ["1.0", None, False, math.inf, -math.inf, math.nan]),
    ("str", ["", "1", "none"], [1, None, True, ["a"]]),
    ("bool", [True, False], [0, 1, "true", None]),
    ("null", [None], [0, "", "null", False, []]),
    ("list", [[], [1, "a", None]], ["a", None, {}]),
    ("mapping", [{}, {"a": {"b": 1}}], [[], None, "a"]),
    ("int >= 1", [1, 5], [0, -1, 1.5]),
    ("int <= 3", [3, -4], [4]),
    ("float > 0", [1e-9, 1], [0, 0.0, -1, math.nan, math.inf]),
    ("float < 0", [-1e-9], [0]),
    ("float in [0, 1)", [0, 0.999], [1, 1.0, -1e-9]),
    ("float in (0, 1]", [1, 1e-9], [0, 1.1]),
    ("float in [0, 1]", [0, 1], [1.1, -0.1]),
    ("int in [2, 4]", [2, 3, 4], [1, 5, 3.0]),
    ("none | nf4 | int8", ["none", "nf4", "int8"], ["int4", "", None, 8, "nf4 "]),
    ("float32 | bfloat16", ["float32", "bfloat16"], [32.0, "float", 1.0]),
    ("1-sqrt | linear", ["1-sqrt", "linear"], ["sqrt", 1]),
    ("16-mixed", ["16-mixed"], [16]),
    ("int | null", [1, None], ["null", 1.5]),
    ("float in [0, 1) | null", [0.5, None], [1, "null"]),
    ("null | float in [0, 1)", [0.5, None], [1]),
    ("list[int]", [[], [1, 2]], [[1.5], ["a"], [True], [None], 1]),
    ("list[int|str]", [[1, "a"]], [[1.5], [None]]),
    ("list[int|float|str]", [[1, 1.5, "a"]], [[[1]], [{}]]),
    ("list[float in [0, 1)]", [[0, 0.5]], [[0.5, 1]]),
    ("list[int >= 1 | null]", [[1, None]], [[0]]),
    ("str | list[str]", ["a", ["a", "b"]], [["a", 1], 1, None]),
    ("int >= 1 | float in (0, 1)", [1, 20, 0.5], [0, 0.0, 1.0, 20.0, 2.5]),
    ("list[float in (0, 1) | int >= 1]", [[0.5, 2]], [[1.0], [20.0], [0]]),
    ("int >= 1 | str | list[int]", [1, "auto", [0, 1]], [0, [0.5], None]),
]


@pytest.mark.parametrize(("type_", "good", "bad"), FITS, ids=[case[0] for case in FITS])
def test_types_take_what_they_say(type_, good, bad):
    assert [value for value in good if not schema.accepts(value, type_)] == []
    assert [value for value in bad if schema.accepts(value, type_)] == []


def test_one_and_the_whole_run_are_told_apart_by_every_length():
    """1 is one step, and 1.0 is refused with the way out, in each file of conf/."""
    lengths = {}
    for file in sorted(schema.CONF.glob("*/*.yaml")):
        if file.parent.name in ("experiment", "hydra"):
            continue
        where = f"{file.parent.name}/{file.stem}"
        for place, leaf in leaves_of(schema.load(where)):
            number = schema.accepts(2, leaf.type) and schema.accepts(0.5, leaf.type)
            if number and re.search(r"or (as )?a fraction of|or a share of them", leaf.doc):
                lengths[f"{where} {place}"] = leaf
    assert {"schedule/cooldown cooldown", "schedule/linear warmup", "adapter/rosa mask_steps",
            "callbacks/default evaluation.every"} <= lengths.keys()  # fmt: skip
    for place, leaf in lengths.items():
        assert schema.counts_steps(leaf.type), place
        assert schema.accepts(1, leaf.type), place
        (message,) = schema.problems(1.0, leaf, "schedule.warmup")
        assert "one below 1 a fraction: write 1." in message


def leaves_of(table, prefix=""):
    for key, child in table.children.items():
        if isinstance(child, schema.Table):
            yield from leaves_of(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child


def test_a_bound_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match=r"in \[0; 1\]"):
        schema.accepts(0.5, "float in [0; 1]")


TEXT = """\
# Something.
_target_: some.where.Thing
_partial_: true
rank: 16               # int >= 1: inner dimension
dropout: 0.0           # float in [0, 1): of the input
shape: linear          # linear | cosine | 1-sqrt: how it falls
names: [a, "# b"]      # list[str]: with a # in it
every: null            # int >= 1 | null: steps
options: {a: 1}        # mapping: anything
path: ???              # str: where it is
inner:
  depth: 1             # int: of it
"""
GOOD = {
    "_target_": "some.where.Thing",
    "_partial_": True,
    "rank": 1,
    "dropout": 0.5,
    "shape": "cosine",
    "names": [],
    "every": None,
    "options": {"b": 2},
    "path": "x",
    "inner": {"depth": 3},
}


def test_a_file_is_its_own_schema(conf):
    thing = conf("group/thing", TEXT)
    assert thing.target == "some.where.Thing"
    assert {
        name: leaf.type for name, leaf in thing.children.items() if isinstance(leaf, schema.Leaf)
    } == {
        "rank": "int >= 1",
        "dropout": "float in [0, 1)",
        "shape": "linear | cosine | 1-sqrt",
        "names": "list[str]",
        "every": "int >= 1 | null",
        "options": "mapping",
        "path": "str",
    }
    assert thing.children["names"].doc == "with a # in it"
    assert thing.children["inner"].children["depth"] == schema.Leaf(
        "int", "of it", "conf/group/thing.yaml"
    )
    assert (thing.children["names"].default, thing.children["path"].default) == (
        ["a", "# b"],
        "???",
    )
    assert schema.problems(GOOD, thing, "thing") == []


FAULTS = {
    "unknown key": ({"rnak": 3}, "thing.rnak: there is no such key. Did you mean rank?"),
    "unknown key like none": ({"zzz": 3}, "thing.zzz: there is no such key. Known: rank, dropout,"),
    "unknown key within": (
        {"inner": {"depth": 1, "dept": 2}},
        "thing.inner.dept: there is no such key. Did you mean depth?",
    ),
    "wrong type": ({"rank": "four"}, "thing.rank is 'four', but must be int >= 1."),
    "out of bounds": ({"rank": 0}, "thing.rank is 0, but must be int >= 1."),
    "at an open bound": ({"dropout": 1.0}, "thing.dropout is 1.0, but must be float in [0, 1)."),
    "misspelt choice": (
        {"shape": "liner"},
        "thing.shape is 'liner', but must be linear | cosine | 1-sqrt. Did you mean linear?",
    ),
    "bool is no int": ({"rank": True}, "thing.rank is True, but must be int >= 1."),
    "null where it may not be": ({"rank": None}, "thing.rank is None, but must be int >= 1."),
    "not given": (
        {"path": "???"},
        "thing.path is missing. It must be set: thing.path=... (where it is)",
    ),
    "a value for a mapping": (
        {"inner": 3},
        "thing.inner is 3, but must be a mapping with the keys depth",
    ),
    "another target": (
        {"_target_": "os.system"},
        "thing._target_ is 'os.system'. conf/group/thing.yaml has 'some.where.Thing'",
    ),
    "not partial": (
        {"_partial_": False},
        "thing._partial_ is False. conf/group/thing.yaml has True",
    ),
    "not recursive": (
        {"_recursive_": False},
        "thing._recursive_ is False. conf/group/thing.yaml has None",
    ),
    "an object in a mapping": (
        {"options": {"a": [{"_target_": "x"}]}},
        "and no object may be created there",
    ),
    "an object in a list": ({"names": [{"_target_": "x"}]}, "and no object may be created there"),
    "an object for a value": ({"rank": {"_target_": "x"}}, "and no object may be created there"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_names_place_value_and_remedy(conf, case):
    changed, message = FAULTS[case]
    (fault,) = schema.problems(GOOD | changed, conf("group/thing", TEXT), "thing")
    assert message in fault
    assert "conf/group/thing.yaml" in fault or case == "not given"


def test_every_key_must_be_there(conf):
    without = {key: value for key, value in GOOD.items() if key not in ("rank", "_target_")}
    faults = schema.problems(without | {"inner": {}}, conf("group/thing", TEXT), "thing")
    assert [fault.split(" (")[0] for fault in faults] == [
        (
            "thing._target_ is None. conf/group/thing.yaml has 'some.where.Thing', and only that"
            " is allowed"
        ),
        "thing.inner.depth is missing",
        "thing.rank is missing",
    ]


def test_all_faults_are_told_at_once(conf):
    faults = schema.problems(
        GOOD | {"rank": 0, "shape": "x", "zzz": 1}, conf("group/thing", TEXT), "thing"
    )
    assert len(faults) == 3


def test_a_config_that_is_only_shown_may_lack_values(conf):
    thing = conf("group/thing", TEXT)
    assert schema.problems(GOOD | {"path": "???"}, thing, "thing", incomplete=True) == []
    assert schema.problems(GOOD | {"path": "???", "rank": 0}, thing, "thing", incomplete=True)


def test_what_an_older_version_lacks_is_what_the_file_has(conf):
    thing = conf("group/thing", TEXT)
    older = {"_target_": "some.where.Thing", "_partial_": True, "rank": 4, "inner": {}, "gone": 1}
    places = schema.complete(older, thing, "thing")
    assert places == [
        f"thing.{name}" for name in ("dropout", "shape", "names", "every", "options", "inner.depth")
    ]
    assert older == {
        "_target_": "some.where.Thing",
        "_partial_": True,
        "rank": 4,
        "inner": {"depth": 1},
        "gone": 1,
        "dropout": 0.0,
        "shape": "linear",
        "names": ["a", "# b"],
        "every": None,
        "options": {"a": 1},
    }
    faults = schema.problems(older, thing, "thing")
    # it has no default
    assert [fault.split(" (")[0] for fault in faults][1:] == ["thing.path is missing"]
    assert faults[0].startswith("thing.gone: there is no such key")
    older["options"]["a"] = 2
    schema.complete(another := dict(older, inner=None), thing)  # what is no mapping stays as it is
    assert another["inner"] is None
    del another["options"]
    schema.complete(another, thing)
    assert another["options"] == {"a": 1}


def test_a_whole_group_that_is_missing_is_made_and_an_entry_is_not(conf):
    entries = conf(
        "group/entries",
        "first:\n  _target_: a.B\n  _partial_: true\n  every: 1e-3  # float: steps\n",
    )
    root = schema.Table(
        {"callbacks": entries, "thing": conf("group/thing", TEXT)}, None, "conf/config.yaml"
    )
    older = {"callbacks": {}}
    assert schema.complete(older, root) == ["thing"]
    assert schema.problems(older, root, "") == ["thing.path is missing (conf/group/thing.yaml)"]
    assert older["callbacks"] == {}
    older["callbacks"]["first"] = {"_target_": "a.B", "_partial_": True}
    assert schema.complete(older, root) == ["callbacks.first.every"]
    assert older["callbacks"]["first"]["every"] == 0.001


def test_null_takes_an_entry_out_of_a_group_and_not_the_group(conf):
    entries = conf("group/entries", "first:\n  _target_: a.B\n  every: 1  # int: steps\n")
    assert schema.problems({"first": None}, entries, "callbacks") == []
    assert schema.problems({}, entries, "callbacks") == []
    assert "adapter is None" in schema.problems(None, conf("group/thing", TEXT), "adapter")[0]


def test_a_variant_inherits_types_and_changes_values(conf):
    conf(
        "group/lora",
        "_target_: a.Lora\nrank: 16  # int >= 1: inner dimension\ninner:\n  depth: 1  # int: of"
        " it\n",
    )
    variant = conf(
        "group/wide",
        "defaults: [lora, _self_]\nrank: 64\nown: 1  # float: its own\ninner:\n  depth: 2\n",
    )
    assert variant.target == "a.Lora"
    assert variant.children["rank"] == schema.Leaf(
        "int >= 1", "inner dimension", "conf/group/wide.yaml"
    )
    assert variant.children["inner"].children["depth"].type == "int"
    assert (
        variant.children["rank"].default,
        variant.children["inner"].children["depth"].default,
    ) == (64, 2)
    arguments = {"_target_": "a.Lora", "rank": 0, "own": 1, "inner": {"depth": 1}}
    assert schema.problems(arguments | {"rank": 8}, variant, "x") == []
    assert "int >= 1" in schema.problems(arguments, variant, "x")[0]


def test_a_variant_of_an_open_file_is_open(conf):
    conf(
        "group/any",
        "# open: the rest is checked elsewhere\n_target_: a.Any\nkind: ???  # str: of it\n",
    )
    variant = conf("group/one", "defaults: [any, _self_]\nkind: ONE\n")
    arguments = {"_target_": "a.Any", "kind": "ONE", "whatever": [1]}
    assert schema.problems(arguments, variant, "x") == []
    assert (
        "no object may be created"
        in schema.problems(arguments | {"whatever": [{"_target_": "b.C"}]}, variant, "x")[0]
    )


def test_options_are_the_files_of_a_group(conf):
    conf("group/b", "x: 1  # int: x\n")
    conf("group/a", "x: 1  # int: x\n")
    assert schema.options("group") == ["a", "b"]


@pytest.mark.long
def test_the_files_are_read_as_omegaconf_reads_them():
    """The schema reads them by PyYAML's own parser in C, which takes a tenth of the time."""
    import yaml
    from omegaconf import OmegaConf

    files = sorted(schema.CONF.rglob("*.yaml"))
    assert len(files) > 50
    for file in files:
        content = yaml.load(file.read_text("utf-8"), Loader=schema._Loader) or {}
        assert repr(content) == repr(OmegaConf.to_container(OmegaConf.load(file))), file
    assert yaml.load("[1e-4, 1E3, 2.5e+1, 12, 1_0e2, e3]", Loader=schema._Loader) == [
        1e-4, 1e3, 25.0, 12, 1e3, "e3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "group", "sentence"),
    [
        ("lr", "", "Did you mean optimizer.lr?"),
        ("path", "", "Did you mean base.path or task.path?"),
        ("learning_rate", "", "Here it is optimizer.lr."),
        ("epochs", "", "Here it is max_epochs."),
        ("lora_alpha", "", "Here it is adapter.alpha."),
        ("packign", "", "Did you mean packing?"),
        ("save_strategy", "", "Here: callbacks.checkpoints.every counts steps or a fraction of"),
        ("r", "adapter", "Here it is adapter.rank."),
        ("lora_alpha", "adapter", "Here it is adapter.alpha."),
        ("within", "adapter", "It is a key of adapter="),
        ("path", "base", "It is a key of base=hf."),
        ("repeat_random", "task", "Did you mean repeat_random, which is in no group?"),
        ("ranks", "adapter", "Did you mean rank?"),
    ],
)
def test_an_unknown_key_is_named_as_it_is_called_here(key, group, sentence):
    known = schema.load(f"{group}/{default_choices()[group]}" if group else "config").children
    names = known if group else sorted({*known, *groups()})
    assert schema.hint(key, names, group).startswith(sentence)
