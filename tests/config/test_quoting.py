"""Values of a command line reach the config as the shell hands them over."""

from __future__ import annotations

import shlex

import pytest
from hydra.errors import HydraException

from trainer.config.errors import ConfigError, explain
from trainer.config.overrides import rewrite

NAMES = [
    "my data (1).jsonl",
    "a=b.jsonl",
    "ü Größe 数据.jsonl",
    "[draft] rows.jsonl",
    "rows[1].jsonl",
    "{old}.jsonl",
    "it's.jsonl",
    'say "hi".jsonl',
    "a,b.jsonl",
    "a, b (c), d.jsonl",
    "~/rows.jsonl",
    "50% & more; really!.jsonl",
    "#1 @home^2.jsonl",
    "data(1)",
    "choice.jsonl",
    "back\\slash.jsonl",
    "end\\",
    "tab\there (x).jsonl",
    "*.jsonl",
    "a?b|c.jsonl",
    "`x`<y>.jsonl",
    "s3://bucket/key=1/rows.jsonl",
    "-leading.jsonl",
    "a:b.jsonl",
    "$HOME.jsonl",
]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_path_arrives_as_it_was_written(compose, name):
    assert compose("experiment=smoke", f"task.path={name}").task.path == name


def test_a_path_with_an_interpolation_and_brackets(compose):
    cfg = compose("experiment=smoke", "task.path=${name} (1).jsonl")
    assert cfg.task.path == "smoke (1).jsonl"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("task.path=[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("task.path=[my data (1).jsonl,b.jsonl]", ["my data (1).jsonl", "b.jsonl"]),
        ("task.path='quoted, already (1)'", "quoted, already (1)"),
        ("task.path=${name}", "smoke"),
        ("task.path=null", None),
        ("task.columns={a: b}", {"a": "b"}),
        ("task.columns={a: [b, c]}", {"a": ["b", "c"]}),
        ("optimizer.lr=1e-3", 1e-3),
    ],
)
def test_what_hydra_can_read_stays_what_it_is(word, value):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(rewrite([word])[0])
    read = OmegaConf.create({"name": "smoke", "value": parsed.value()})
    assert OmegaConf.to_container(read, resolve=True)["value"] == value


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("optimizer.lr=1e-3,1e-4", ["0.001", "0.0001"]),
        ("adapter=lora,rosa", ["lora", "rosa"]),
        ("task.path=a (1).jsonl,b.jsonl", ["'a (1).jsonl'", "b.jsonl"]),
        ("seed=choice(1,2)", ["1", "2"]),
        ("seed=range(1,3)", ["1", "2"]),
        ("task.path=[a,b],[c]", ["[a,b]", "[c]"]),
    ],
)
def test_a_sweep_stays_a_sweep(word, values):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(rewrite([word], sweep=True)[0])
    assert list(parsed.sweep_string_iterator()) == values


def test_several_values_without_multirun_are_a_sweep_that_was_forgotten():
    """Unless the setting takes any text, which a comma may be part of."""
    assert rewrite(["optimizer.lr=1e-3,1e-4", "adapter=lora,rosa", "name=a,b"]) == [
        "++optimizer.lr=1e-3,1e-4",
        "adapter=lora,rosa",
        "++name='a,b'",
    ]


@pytest.mark.long
@pytest.mark.parametrize("value", ["[a", "{a: b", "'a b", '"a', "${name", "[a (1), {b]"])
def test_what_cannot_be_read_says_how_to_write_it(compose, value):
    with pytest.raises(HydraException) as raised:
        compose("experiment=smoke", f"task.path={value}")
    message = explain(raised.value)
    assert f"task.path={value}" in message
    advice = message.partition("If this is text, write ")[2]
    assert compose("experiment=smoke", *shlex.split(advice)).task.path == value


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("experiments=smoke", "Did you mean experiment?"),
        ("+experiments=smoke", "Did you mean experiment?"),
        ("adaptr=lora", "Did you mean adapter?"),
        ("adaptr.rank=4", "Did you mean adapter?"),
        ("max_stps=3", "Did you mean max_steps?"),
        ("slurm.time=3", "graft submit"),
        ("zzz=1", "Known: "),
    ],
)
def test_a_name_that_conf_does_not_have(word, text):
    with pytest.raises(ConfigError, match=r"there is no such key|is for jobs") as raised:
        rewrite(["seed=1", word])
    assert text in str(raised.value)
