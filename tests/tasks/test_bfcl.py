"""The function-calling rows, from a wheel made here: what is asked, what is learned, and which
calls are right."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tasks import bfcl, wheel
from tasks.bfcl import BFCL, matches, parsed_call
from tasks.reading import DataError
from tasks.task import Conversation

AREA = {
    "name": "area",
    "parameters": {"properties": {"base": {"type": "integer"}, "unit": {"type": "string"}}},
}


def question(number: int) -> dict[str, Any]:
    return {
        "id": f"simple_{number}",
        "question": [[{"role": "user", "content": f"Base {number}?"}]],
        "function": [AREA],
    }


def answer(number: int) -> dict[str, Any]:
    return {
        "id": f"simple_{number}",
        "ground_truth": [{"area": {"base": [number], "unit": ["m", ""]}}],
    }


LIVE = {
    "id": "live_0",
    "question": [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Größe?"}]
    ],
    "function": [AREA, {"name": "größe", "parameters": {}}],
}
LIVE_ANSWER = {
    "id": "live_0",
    "ground_truth": [
        {
            "größe": {
                "of": [{"shape": ["box", "cube"], "side": [2, ""]}],
                "parts": [["a", {"n": [1]}]],
                "maybe": [],
            }
        }
    ],
}


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with twelve simple rows and a live one, in a folder; the cache is empty."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    file = shipped / "bfcl_eval-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "bfcl_eval-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: bfcl-eval\nVersion: 1.0\n",
        )
        archive.writestr(
            "bfcl_eval-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("bfcl_eval-1.0.dist-info/RECORD", "")
        rows = {
            "simple": ([question(n) for n in range(12)], [answer(n) for n in reversed(range(12))])
        }
        rows["live"] = ([LIVE], [LIVE_ANSWER])
        for category, (questions, answers) in rows.items():
            for folder, lines in (("", questions), ("possible_answer/", answers)):
                text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
                archive.writestr(f"bfcl_eval/data/{folder}BFCL_v4_{category}.json", text)
    return file


@pytest.fixture
def cached(packed: Path) -> Path:
    """The wheel, put into the cache by hand."""
    folder = wheel.cache_dir() / "wheels" / "bfcl-eval-1.0"
    folder.mkdir(parents=True)
    packed.rename(folder / packed.name)
    return folder / packed.name


def task(file: Path | None, **changes: Any) -> BFCL:
    digest = wheel.sha256(file) if file is not None else "0" * 64
    settings = {
        "package": "bfcl-eval",
        "version": "1.0",
        "sha256": digest,
        "categories": ["simple"],
        "eval_rows": 4,
        "split_seed": 0,
        "limit": None,
        "on_lost": "error",
        "chat_template_kwargs": {},
    }
    return BFCL(**settings | changes)


def names(actual: BFCL, split: str) -> list[str]:
    return [example.where for example in actual.examples(split)]


# fetching


@pytest.fixture
def pip(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip, which finds the wheel's folder and nothing else."""
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packed.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return packed


@pytest.mark.long
def test_the_wheel_is_fetched_once_and_then_taken_from_the_cache(pip):
    digest = wheel.sha256(pip)
    first = names(task(pip), "train")
    pip.unlink()
    assert len(first) == 8
    assert names(task(None, sha256=digest), "train") == first
    assert [file.name for file in wheel.cache_dir().glob("wheels/*/*")] == [
        "bfcl_eval-1.0-py3-none-any.whl"
    ]


@pytest.mark.long
def test_a_version_that_the_index_lacks_is_explained(pip):
    with pytest.raises(
        wheel.FetchError,
        match=r"bfcl-eval 2\.0 could not be fetched.*No matching distribution found",
    ):
        task(pip, version="2.0")
    assert not list(wheel.cache_dir().glob("wheels/bfcl-eval-2.0/*"))


@pytest.mark.long
def test_without_a_network_the_message_says_how_to_bring_the_wheel(packed, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = wheel.cache_dir() / "wheels" / "bfcl-eval-1.0"
    with pytest.raises(wheel.FetchError) as caught:
        task(packed)
    assert f"pip download --no-deps bfcl-eval==1.0  and put the .whl into {folder}" in str(
        caught.value
    )
    folder.mkdir()
    packed.rename(folder / packed.name)
    assert len(names(task(folder / packed.name), "train")) == 8


def test_a_missing_pip_is_named(packed, monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(
        wheel.FetchError,
        match=f"is fetched with pip, which {bare} does not have. Install it: {bare} -m ensurepip",
    ):
        task(packed)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(wheel.FetchError, match="pip could not be started"):
        task(packed)


def test_a_wheel_with_another_digest_is_refused_and_removed(cached):
    digest = wheel.sha256(cached)
    with pytest.raises(
        wheel.FetchError,
        match=f"has the digest {digest}, expected {'0' * 64}. It was removed from the cache",
    ):
        task(None)
    assert not cached.exists()


def test_an_unknown_category_lists_the_known_ones(cached):
    with pytest.raises(DataError, match=r"task\.categories: 'simpel' is none of: live, simple"):
        task(cached, categories=["simple", "simpel"])


# rows


def test_a_row_asks_with_its_functions_and_answers_with_the_first_accepted_call(cached):
    actual = {
        example.where: example
        for split in ("train", "eval")
        for example in task(cached).examples(split)
    }
    assert actual["simple:simple_3"] == Conversation(
        [
            {"role": "system", "content": bfcl.SYSTEM + json.dumps([AREA], separators=(",", ":"))},
            {"role": "user", "content": "Base 3?"},
            {"role": "assistant", "content": '{"name": "area", "arguments": {"base": 3}}'},
        ],
        "simple:simple_3",
        None,
        ("area", {"base": [3], "unit": ["m", ""]}),
    )
    assert len(actual) == 12


def test_a_rows_own_instructions_and_nested_values_are_kept(cached):
    (live,) = task(cached, categories=["live"], eval_rows=1).examples("eval")
    assert live.messages[0]["content"].endswith('"größe","parameters":{}}]\nBe kind.')
    assert [m["role"] for m in live.messages] == ["system", "user", "assistant"]
    call = json.loads(live.messages[-1]["content"])
    assert call == {
        "name": "größe",
        "arguments": {"of": {"shape": "box"}, "parts": ["a", {"n": 1}]},
    }


@pytest.mark.parametrize("categories", [["simple"], ["live", "simple"]])
def test_every_answer_that_is_learned_is_graded_right(cached, categories):
    actual = task(cached, categories=categories)
    for example in [*actual.examples("train"), *actual.examples("eval")]:
        assert actual.grade(example, example.messages[-1]["content"]) == {
            "function_name": 1.0,
            "exact_call": 1.0,
        }


def test_the_splits_are_fixed_disjoint_and_complete(cached):
    train, held_out = names(task(cached), "train"), names(task(cached), "eval")
    assert (len(train), len(held_out)) == (8, 4)
    assert sorted(train + held_out) == sorted(f"simple:simple_{n}" for n in range(12))
    assert names(task(cached, limit=3), "train") == train[:3]
    assert names(task(cached, limit=3), "eval") == held_out
    assert names(task(cached, split_seed=1), "eval") != held_out


@pytest.mark.parametrize(
    "change",
    [{"limit": 3}, {"eval_rows": 5}, {"split_seed": 1}, {"categories": ["live", "simple"]}],
)
def test_the_digest_follows_the_settings(cached, change):
    assert task(cached).fingerprint("train") != task(cached, **change).fingerprint("train")
    assert (
        task(cached).fingerprint("train")
        == task(cached).fingerprint("train")
        != task(cached).fingerprint("eval")
    )


def test_the_digest_follows_the_wheels_content_and_not_its_name(cached):
    before = [task(cached).fingerprint(split) for split in ("train", "eval")]
    renamed = cached.rename(cached.with_name("renamed.whl"))
    assert [task(renamed).fingerprint(split) for split in ("train", "eval")] == before
    with zipfile.ZipFile(renamed, "a") as archive:
        archive.writestr("bfcl_eval/data/more.json", "")
    assert not set(before) & {task(renamed).fingerprint(split) for split in ("train", "eval")}


# grades


@pytest.mark.parametrize(
    ("completion", "name", "call"),
    [
        ('{"name": "area", "arguments": {"base": 3}}', 1.0, 1.0),
        ('Here: {"name": "area", "arguments": {"base": 3, "unit": "M."}} done {', 1.0, 1.0),
        ('{"name": "area", "arguments": {"base": 4}}', 1.0, 0.0),
        ('{"name": "area", "arguments": {}}', 1.0, 0.0),
        ('{"name": "area", "arguments": {"base": 3, "height": 1}}', 1.0, 0.0),
        ('{"name": "volume", "arguments": {"base": 3}}', 0.0, 0.0),
        ("area(base=3)", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_a_completion_is_graded_by_its_function_and_its_arguments(cached, completion, name, call):
    actual = task(cached)
    example = Conversation([], "here", reference=("area", {"base": [3], "unit": ["m", ""]}))
    assert actual.grade(example, completion) == {"function_name": name, "exact_call": call}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"name": "f", "arguments": {"a": [1, {"b": null}]}}', ("f", {"a": [1, {"b": None}]})),
        ('x {"name": "f", "arguments": {}} {"name": "g", "arguments": {}}', ("f", {})),
        ('{"name": "f", "arguments": "{}"}', None),
        ('{"name": 5, "arguments": {}}', None),
        ('{"arguments": {}}', None),
        ('{"name": "f", "arguments": {', None),
        ('{"name": "f", "arguments": ' + '{"a": ' * 100_000, None),
        ('{"name": "f", "arguments": {"a": ' + "9" * 5_000 + "}}", None),
        ("[1]", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_first_json_object_is_the_call(completion, expected):
    assert parsed_call(completion) == expected


@pytest.mark.parametrize(
    ("arguments", "accepted", "right"),
    [
        ({}, {}, True),
        ({"a": 1}, {"a": [1]}, True),
        ({"a": 1.0}, {"a": [1]}, True),
        ({"a": 2}, {"a": [1, 2]}, True),
        ({"a": "1"}, {"a": [1]}, False),
        ({"a": True}, {"a": [1]}, False),
        ({"a": 1}, {"a": [True]}, False),
        ({"a": True}, {"a": [True]}, True),
        ({"a": "New York, NY"}, {"a": ["new-york ny"]}, True),
        ({"a": "New York"}, {"a": ["New Work"]}, False),
        ({}, {"a": [1, ""]}, True),
        ({}, {"a": []}, True),
        ({}, {"a": [1]}, False),
        ({"b": 1}, {}, False),
        ({"a": [1, "X"]}, {"a": [[1, "x"]]}, True),
        ({"a": [1]}, {"a": [[1, 2]]}, False),
        ({"a": ["x", 1]}, {"a": [[1, "x"]]}, False),
        ({"a": {"n": 2}}, {"a": [{"n": [1, 2], "m": [3, ""]}]}, True),
        ({"a": {"n": 3}}, {"a": [{"n": [1, 2]}]}, False),
        ({"a": {"n": 1}}, {"a": [{"n": 1}]}, True),
        ({"a": None}, {"a": [None]}, True),
        ({"a": None}, {"a": [0]}, False),
    ],
)
def test_arguments_are_known_accepted_and_complete(arguments, accepted, right):
    assert matches(arguments, accepted) is right
