"""The kernels of a run's attention: chosen once, recorded, and kept when the run is resumed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.session import kernels
from trainer.speed import attention_choice, cpu_load, elementwise, elementwise_choice


def recipe(longest: int = 300, packing: bool = False, device: str = "cpu", **config: Any) -> Any:
    settings = {
        "fused": True,
        "cpu_attention": "auto",
        "cpu_elementwise": "auto",
        "compile": False,
        "deterministic": False,
        "max_length": 512,
        "packing": packing,
    }
    base = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=None
    )
    return SimpleNamespace(
        config=settings | config,
        device=torch.device(device),
        precision="fp32",
        dtype=torch.float32,
        base=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: base)),
        data=SimpleNamespace(
            train=SimpleNamespace(rows=SimpleNamespace(lengths=np.array([5, longest])))
        ),
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[Any]:
    """The calls of a measurement that takes no time."""
    calls: list[Any] = []

    def measure(shape: Any, lengths: list[int]) -> Any:
        calls.append((shape, lengths))
        return {str(length): [[1.0, 2.0], [0.5, 3.0], [1.0, 6.0]] for length in lengths}

    monkeypatch.setattr(attention_choice, "_measure", measure)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    return calls


def test_only_lengths_of_the_run_are_timed(measured, caplog):
    with caplog.at_level("INFO", logger="trainer"):
        kernels.attention_of(recipe(longest=300), None)
    assert "rows of 128, 256: forward by flash, backward by blocks" in caplog.text
    kernels.attention_of(recipe(longest=50, packing=True), None)  # sequences of max_length
    assert [lengths for _, lengths in measured] == [[128, 256], [512]]
    threads = torch.get_num_threads()
    assert {shape for shape, _ in measured} == {(2, 8, "float32", threads)}


def test_a_resumed_run_keeps_its_kernels(measured):
    first = kernels.attention_of(recipe(), None)
    assert first["times"].keys() == {"128", "256"}
    first["times"]["128"][1] = [9.0, 9.0]
    assert kernels.attention_of(recipe(longest=600), {"attention": first}) == first
    assert len(measured) == 1


def test_a_run_without_a_record_resumes_with_blocks(measured):
    assert kernels.attention_of(recipe(), {"config": {}}) is None
    assert not measured


def test_another_machine_measures_for_itself(measured):
    first = kernels.attention_of(recipe(), None)
    other = kernels.attention_of(recipe(), {"attention": first | {"machine": "other"}})
    assert other == first


@pytest.mark.parametrize(
    "changes",
    [
        {"fused": False},
        {"fused": "liger"},
        {"device": "meta"},
        {"deterministic": True},
        {"cpu_attention": "blocks"},
        {"longest": 100},
    ],
)
def test_nothing_is_timed_where_nothing_is_chosen(measured, changes):
    assert kernels.attention_of(recipe(**changes), None) is None
    assert not measured


@pytest.mark.parametrize(
    ("earlier", "count"),
    [
        (None, 3),  # as many as are free
        ({"threads": 1}, 1),
        ({}, 5),  # of an older version: what torch takes
        ({"threads": 10**6}, 5),
        ({"threads": "2"}, 5),
    ],
)
def test_a_run_that_continues_has_the_same_threads(earlier, count, monkeypatch, caplog):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(kernels.threads, "choose", lambda before, most: (most - 2, "two are busy"))
    with caplog.at_level("INFO", logger="trainer"):
        kernels.set_threads(recipe(), earlier, cpu_load.seconds())
    assert chosen == [count]
    assert f"threads: {count} (" in caplog.text
    kernels.set_threads(recipe(device="meta"), earlier, cpu_load.seconds())
    assert chosen == [count]


def test_a_setting_decides_even_in_a_resumed_run(measured):
    first = kernels.attention_of(recipe(), None)
    measured.clear()
    for setting in ("mixed", "flash"):
        record = kernels.attention_of(recipe(cpu_attention=setting), {"attention": first})
        choice = attention_choice.recorded(record)
        assert choice.fixed == attention_choice.NAMES[setting]
    assert kernels.attention_of(recipe(cpu_attention="blocks"), {"attention": first}) is None
    assert not measured


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A recipe of a model that is wide enough to be measured, which takes no time."""
    monkeypatch.setattr(
        elementwise_choice, "measure", lambda _: {kind: [2.0, 1.0] for kind in elementwise.KINDS}
    )
    monkeypatch.setattr(elementwise, "library", lambda: object())
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))

    def made(**config: Any) -> Any:
        made = recipe(**config)
        text = made.base.config.get_text_config()
        text.hidden_size, text.intermediate_size, text.vocab_size = 512, 1024, 97
        return made

    return made


def test_elementwise_parts_are_chosen_recorded_and_kept(wide, caplog):
    with caplog.at_level("INFO", logger="trainer"):
        first = kernels.elementwise_of(wide(), None)
    assert "elementwise: gates by C (1000.0 and 2000.0 ms), norms by C" in caplog.text
    assert first["kinds"] == list(elementwise.KINDS)
    fewer = first | {"kinds": ["norms"]}
    assert kernels.elementwise_of(wide(), {"elementwise": fewer}) == fewer
    assert kernels.elementwise_of(wide(), {"elementwise": fewer | {"machine": "other"}}) == first
    assert kernels.elementwise_of(wide(), {"config": {}}) is None  # torch, as it had


@pytest.mark.parametrize(
    "config",
    [
        {"fused": False},
        {"fused": "liger"},
        {"compile": True},
        {"device": "cuda"},
        {"deterministic": True},
        {"cpu_elementwise": "torch"},
    ],
    ids=str,
)
def test_elementwise_parts_are_torchs(wide, config):
    assert kernels.elementwise_of(wide(**config), None) is None
    assert kernels.elementwise_of(wide(cpu_elementwise="c", deterministic=True), None) is not None
