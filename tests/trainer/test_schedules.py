"""Every file of conf/schedule: in bounds, pure, and its closed form at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT
from trainer import assembly
from trainer.schedules import length, warmed_up
from trainer.schedules.cooldown import SHAPES

NAMES = sorted(path.stem for path in (ROOT / "conf" / "schedule").glob("*.yaml"))
STEPS = [1, 2, 3, 7, 20, 100, 1000]


def make(name: str, **changes: Any) -> Callable[..., float]:
    return assembly.instantiate(OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "schedule" / f"{name}.yaml")) | changes)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("warmup", [0, 0.05, 0.5, 1, 3, 50])
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_in_bounds_learn_from_the_start_and_depend_on_the_step_alone(name, warmup, steps):
    factor, other = make(name, warmup=warmup), make(name, warmup=warmup)
    forwards = [factor(step, steps=steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in forwards)
    assert [other(step, steps=steps) for step in reversed(range(steps))][::-1] == forwards
    assert 0 <= factor(steps, steps=steps) <= 1  # a run that is made longer asks for one more


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("warmup", "steps", "rise"), [(0.05, 100, 5), (0.5, 10, 5), (7, 100, 7), (1, 100, 1), (0, 100, 0), (0.01, 20, 0)]
)
def test_warm_up_rises_in_equal_parts_to_the_peak(name, warmup, steps, rise):
    factor = make(name, warmup=warmup)
    for step in range(rise):
        assert factor(step, steps=steps) == pytest.approx((step + 1) / rise)
    if rise:
        assert factor(rise - 1, steps=steps) == 1.0
    assert factor(rise, steps=steps) == 1.0


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine(steps, final):
    factor, rise = make("cosine", warmup=0.1, final=final), round(0.1 * steps)
    for step in range(rise, steps):
        angle = math.pi * (step - rise) / (steps - rise)
        assert factor(step, steps=steps) == pytest.approx(final + (1 - final) * 0.5 * (1 + math.cos(angle)))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_linear(steps, final):
    factor, rise = make("linear", warmup=0.1, final=final), round(0.1 * steps)
    for step in range(rise, steps):
        left = (steps - step) / (steps - rise)
        assert factor(step, steps=steps) == pytest.approx(final + (1 - final) * left)


@pytest.mark.parametrize("steps", STEPS)
def test_constant(steps):
    assert {make("constant", warmup=0)(step, steps=steps) for step in range(steps)} == {1.0}


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize(
    ("cooldown", "of"), [(0.3, lambda steps: round(0.3 * steps)), (4, lambda steps: 4), (0, lambda steps: 0)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_cooldown_holds_the_peak_and_then_falls_as_its_shape(steps, cooldown, of, shape, final):
    factor, down = make("cooldown", warmup=0, cooldown=cooldown, shape=shape, final=final), of(steps)
    for step in range(steps - down):
        assert factor(step, steps=steps) == 1.0
    for i in range(down):
        x = i / down
        wanted = {"1-sqrt": 1 - x**0.5, "linear": 1 - x, "cosine": math.cos(math.pi * x / 2) ** 2}[shape]
        assert factor(steps - down + i, steps=steps) == pytest.approx(final + (1 - final) * wanted)


def test_a_cooldown_longer_than_the_run_starts_within_it():
    factor = make("cooldown", warmup=0, cooldown=10, shape="linear", final=0.0)
    assert [factor(step, steps=4) for step in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_longer_run_shares_the_past_of_a_shorter_one_until_it_cools_down():
    factor = make("cooldown", warmup=10, cooldown=0.2)
    assert [factor(step, steps=100) for step in range(80)] == [factor(step, steps=1000) for step in range(80)]
    assert factor(90, steps=100) < factor(90, steps=1000) == 1.0


@pytest.mark.parametrize(
    ("value", "steps", "wanted"), [(0.3, 10, 3), (0.05, 1, 0), (0.5, 3, 2), (1, 10, 1), (12, 10, 12), (0, 10, 0)]
)
def test_lengths_below_one_are_fractions(value, steps, wanted):
    assert length(value, steps) == wanted
    assert warmed_up(0, length(value, steps)) == (1.0 if wanted == 0 else pytest.approx(1 / wanted))
