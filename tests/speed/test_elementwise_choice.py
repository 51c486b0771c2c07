"""What C computes of a step: measured once, cached, and recorded."""

from __future__ import annotations

import json

import pytest
import torch

from trainer.speed import elementwise, elementwise_choice
from trainer.speed.elementwise_choice import Choice, Shape, choose, recorded

SHAPE = Shape(576, 1536, 64, 49152, "bfloat16", 1)
FASTER = {kind: [2.0, 1.0] for kind in elementwise.KINDS}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The shapes that were measured, with times in which torch is faster for norms."""
    shapes = []

    def measure(shape):
        shapes.append(shape)
        return FASTER | {"norms": [1.0, 1.2], "gates": [1.0, 1.05]}

    monkeypatch.setattr(elementwise_choice, "measure", measure)
    monkeypatch.setattr(elementwise, "library", lambda: object())
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    return shapes


def test_the_faster_of_each_kind_is_taken_and_cached(measured):
    first = choose("auto", SHAPE)
    assert first.kinds == ("gates", "rotations", "losses")
    assert choose("auto", SHAPE) == first
    assert measured == [SHAPE]
    choose("auto", SHAPE._replace(threads=2))
    assert len(measured) == 2
    assert "norms by torch (1200.0 and 1000.0 ms)" in first.describe()
    assert "losses by C" in first.describe()


def test_the_setting_decides(measured, monkeypatch):
    assert choose("c", SHAPE).kinds == elementwise.KINDS
    assert choose("torch", SHAPE) is None
    assert choose("auto", SHAPE._replace(hidden=128)) is None
    assert choose("auto", SHAPE._replace(dtype="float16")) is None
    assert not measured
    monkeypatch.setattr(elementwise, "library", lambda: None)
    assert choose("c", SHAPE) is choose("auto", SHAPE) is None


def test_a_record_is_taken_on_the_same_machine(measured, monkeypatch):
    choice = choose("auto", SHAPE)
    record = json.loads(json.dumps(choice.record()))
    assert recorded(record) == choice
    wrong = (
        {"machine": "x"},
        {"kinds": ["norms", "dances"]},
        {"times": {"norms": 1}},
        {"kinds": 1},
    )
    assert all(recorded(record | change) is None for change in wrong)
    assert recorded(None) is None
    monkeypatch.setattr(elementwise, "library", lambda: None)
    assert recorded(record) is None
    assert recorded(Choice(elementwise_choice.machine(), ()).record()) is not None


def test_a_shape_needs_the_sizes_of_a_model():
    class Config:
        hidden_size, intermediate_size, num_attention_heads, vocab_size = 64, 100, 4, 50

    shape = elementwise_choice.shape_of(Config, torch.bfloat16)
    assert shape == (64, 100, 16, 50, "bfloat16", torch.get_num_threads())
    Config.intermediate_size = None
    assert elementwise_choice.shape_of(Config, torch.bfloat16) is None


@pytest.mark.skipif(elementwise.library() is None, reason="no C compiler")
def test_each_kind_is_timed_by_both():
    state = torch.get_rng_state()
    times = elementwise_choice.measure(Shape(64, 96, 16, 300, "float32", 1))
    assert times.keys() == {*elementwise.KINDS}
    assert all(0 < seconds < 10 for pair in times.values() for seconds in pair)
    assert torch.get_rng_state().equal(state)
