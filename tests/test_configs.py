"""Every file of conf/: it describes itself, composes, and fits what it names."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import yaml
from omegaconf import OmegaConf

from trainer.config import schema

FILES = sorted(
    str(path.relative_to(schema.CONF).with_suffix("")) for path in schema.CONF.rglob("*.yaml")
)
GROUPED = [name for name in FILES if "/" in name and not name.startswith(("experiment/", "hydra/"))]
EXPERIMENTS = [name.partition("/")[2] for name in FILES if name.startswith("experiment/")]

# What a file leaves to the user.
NEEDED = {
    "branch/cooldown": ["branch.run=runs/x", "branch.step=8", "branch.steps=2", "max_steps=10"],
    "base/hf": ["base.path=ORG/NAME"],
    "task/mixture": ["task.parts={a: {path: rows.jsonl}}"],
    "adapter/peft": ["adapter.peft_type=LOHA"],
    "adapter/loftq": ["base.quantization=nf4"],
    "optimizer/schedulefree": ["schedule=constant"],
    "drafter/uno": ["adapter=none"],
    "drafter_adapter/lora": ["drafter=eagle3", "target.draft=runs/x"],
    "drafter/ppd": ["adapter=none"],
    "drafter/native": [
        "adapter=none",
        "objective=distill",
        "callbacks.evaluation.monitor=accepted",
        "callbacks.evaluation.mode=max",
    ],
    "objective/distill": ["adapter=none", "drafter=mtp_shared"],
    "objective/heal": ["objective.teacher=ORG/NAME"],
    "experiment/smoke": ["task.path=rows.jsonl"],
    "experiment/hyperfit": ["task.path=rows.jsonl"],
    "experiment/mtp_bytes": ["task.path=rows.jsonl"],
    **{
        f"experiment/heal_{adapter}": ["task.path=rows.jsonl", "objective.teacher=ORG/NAME"]
        for adapter in ("lora", "rosa")
    },
    **{
        f"experiment/{head}_chat": ["task.path=rows.jsonl"]
        for head in (
            "clover",
            "dspark",
            "eagle",
            "eagle3",
            "medusa",
            "medusa2",
            "hydra",
            "hydra_plus",
            "uno",
            "native",
            "ppd",
        )
    },
}
# What code gives when it calls what a file names; the first comments say so.
GIVEN = {
    "objective": {
        "model",
        "adapter",
        "optimizer",
        "schedule",
        "steps",
        "labelled",
        "accumulate",
        "seed",
        "penalty",
        "drafter",
        "runtime_cooldown",
    },
    "penalty": {"model"},
    "drafter": {"model"},
    "optimizer": {"params"},
    "schedule": {"step", "steps"},
    "callbacks": {"run_state"},
    "logger": {"folder", "run_id", "name", "config", "start"},
}

BOUND = r"( (>|>=|<|<=) \S+| in [\[(]\S+, \S+[\])])?"
# true and false are no words: bool
SCALAR = (
    rf"(null|str|bool|(int|float){BOUND}|(?!int |float |list |mapping |(true|false)\b)[\w.:-]+)"
)
# These classes are made in Python too, where most callers leave these out.
ALSO_IN_PYTHON = {"context_window", "start", "end", "ramp", "prompt_tokens"}
TYPE = re.compile(rf"({SCALAR}|mapping|list|list\[{SCALAR}( \| {SCALAR})*\])")


def content(name):
    """A file's values, those of the file that it varies included."""
    own = OmegaConf.to_container(OmegaConf.load(schema.CONF / f"{name}.yaml"))
    result = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            result |= content(f"{name.rpartition('/')[0]}/{entry}")
    own.pop("hydra", None)
    return result | own


def leaves(table, values, where=""):
    """(place, leaf, the file's own value) of every knob."""
    for key, child in table.children.items():
        if isinstance(child, schema.Leaf):
            yield where + key, child, values[key]
        else:
            yield from leaves(child, values[key], f"{where}{key}.")


def nodes(name):
    """(place, values) of everything that a file makes."""
    values = content(name)
    entries = {name: values} | {f"{name}.{key}": value for key, value in values.items()}
    return [
        (place, node)
        for place, node in entries.items()
        if isinstance(node, dict) and "_target_" in node
    ]


def knobs_say_their_type_and_meaning(name):
    values = content(name)
    for place, leaf, value in leaves(schema.load(name), values):
        assert leaf.doc, f"{place} has no comment"
        for alternative in schema.alternatives(leaf.type):
            assert TYPE.fullmatch(alternative), (
                f"{place}: {alternative!r} is not in the grammar of trainer/schema.py"
            )
        assert value == "???" or schema.accepts(value, leaf.type), (
            f"{place} is {value!r}, but must be {leaf.type}"
        )


@pytest.mark.parametrize(
    "written",
    [
        "int>= 1",
        "floats in [0, 1)",
        "float in [0 1)",
        "one of these",
        "int or null",
        "list[int",
        "auto | true",
    ],
)
def test_a_type_outside_the_grammar_is_noticed(written):
    assert not all(TYPE.fullmatch(part) for part in schema.alternatives(written))


@pytest.mark.parametrize("name", ["config", "slurm"])
def test_every_common_knob_says_its_type_and_meaning(name):
    knobs_say_their_type_and_meaning(name)


@pytest.mark.long
@pytest.mark.parametrize("name", GROUPED)
def test_an_option_describes_itself_composes_and_fits_what_it_names(compose, name):
    knobs_say_their_type_and_meaning(name)
    targets_take_the_keys_of_the_file(name)
    no_knob_has_a_second_default_in_python(name)
    a_partial_says_what_it_is_called_with(name)
    group, _, option = name.partition("/")
    task = [] if name in ("task/bfcl", "task/mixture") else ["task.path=rows.jsonl"]
    # It goes back to a checkpoint, which the default callbacks save.
    entry = "[default,rollback]" if name == "callbacks/rollback" else option
    cfg = compose(f"{group}={entry}", *task, *NEEDED.get(name, []))
    assert entry != option or cfg.hydra.runtime.choices[group] == option
    assert all(
        OmegaConf.select(cfg, f"{group}.{key}") is not None
        for key, value in content(name).items()
        if value == "???"
    )


def targets_take_the_keys_of_the_file(name):
    by_code = GIVEN.get(name.partition("/")[0], set())
    for place, node in nodes(name):
        module, _, attribute = node["_target_"].rpartition(".")
        target = getattr(importlib.import_module(module), attribute)
        # adapter.from is a word of Python: the program reads it, and no class does.
        apart = {*schema.INSTANTIATE_KEYS, "from"}
        keys = {key: value for key, value in node.items() if key not in apart}
        signature = inspect.signature(target)
        signature.bind_partial(**keys)
        assert not keys.keys() & by_code, f"{place} sets what code gives"
        signature.bind(**keys, **dict.fromkeys(by_code))  # nothing without a default is missing
        assert bool(node.get("_partial_")) == bool(by_code), f"{place} is called by code, or is not"


def no_knob_has_a_second_default_in_python(name):
    for place, node in nodes(name):
        module, _, attribute = node["_target_"].rpartition(".")
        if module.split(".")[0] not in ("adapters", "tasks", "trainer"):
            continue
        parameters = inspect.signature(
            getattr(importlib.import_module(module), attribute)
        ).parameters
        twice = [
            key
            for key in node
            if key in parameters and parameters[key].default is not inspect.Parameter.empty
        ]
        twice = [key for key in twice if key not in ALSO_IN_PYTHON]
        assert twice == [], f"{place}: the file has the default of {twice}"


def a_partial_says_what_it_is_called_with(name):
    text = (schema.CONF / f"{name}.yaml").read_text()
    first = text.splitlines()[0]
    if "_partial_: true" in text:
        assert re.match(r"# .*\b[Cc]alled with (the|its) \w+", first), first


@pytest.mark.long
def test_all_that_vary_a_file_change_something_in_it():
    for name in GROUPED:
        text = (schema.CONF / f"{name}.yaml").read_text()
        if parents := re.findall(
            r"^defaults: \[(\w+), (?:\{override /\S+: \w+\}, )?_self_\]$", text, re.MULTILINE
        ):
            assert content(name) != content(f"{name.rpartition('/')[0]}/{parents[0]}")
        else:
            assert "defaults" not in yaml.safe_load(text), (
                f"{name} has a defaults list that this test does not read"
            )


@pytest.mark.long
def test_an_experiment_composes_with_a_plus_and_without(compose):
    needed = NEEDED["experiment/smoke"]
    plus, plain = compose("+experiment=smoke", *needed), compose("experiment=smoke", *needed)
    assert OmegaConf.masked_copy(plus, [k for k in plus if k != "hydra"]) == OmegaConf.masked_copy(
        plain, [k for k in plain if k != "hydra"]
    )


@pytest.mark.long
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_files_name_composes_and_repeats_no_default(compose, name):
    assert compose(f"+experiment={name}", *NEEDED.get(f"experiment/{name}", [])).name == name
    own = OmegaConf.to_container(OmegaConf.load(schema.CONF / f"experiment/{name}.yaml"))
    choices = {
        k: v
        for entry in own.pop("defaults", [])
        if isinstance(entry, dict)
        for k, v in entry.items()
    }
    groups = [f"{key.removeprefix('override /')}={value}" for key, value in choices.items()]
    # native's own settings of evaluation are what it needs, and no repetition
    groups = ["drafter=medusa" if word == "drafter=native" else word for word in groups]
    groups += [word for word in NEEDED.get("objective/heal", ()) if "objective=heal" in groups]
    default = compose("task.path=x", *groups) if "task=bfcl" not in groups else compose(*groups)

    def values(node, where=""):
        for key, value in node.items():
            yield from (
                values(value, f"{where}{key}.")
                if isinstance(value, dict)
                else [(where + key, value)]
            )

    repeated = [
        place
        for place, value in values(own)
        if value != "???" and OmegaConf.select(default, place) == value
    ]
    assert repeated == []
    assert (
        "# @package _global_"
        in (schema.CONF / f"experiment/{name}.yaml").read_text().splitlines()[0]
    )


def test_every_file_is_looked_at():
    hydra = {"hydra/job_logging/graft", "hydra/launcher/slurm"}
    assert set(FILES) == {
        "config",
        "slurm",
        *GROUPED,
        *(f"experiment/{name}" for name in EXPERIMENTS),
        *hydra,
    }
    assert len(GROUPED) > 30
