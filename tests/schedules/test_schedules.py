"""Every file of conf/schedule: in bounds, pure, and its closed form at each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import ROOT
from trainer import schedules
from trainer.assembly.build import instantiate
from trainer.schedules import length, warmed_up
from trainer.schedules.cooldown import SHAPES, RuntimeCooldown

NAMES = sorted(path.stem for path in (ROOT / "conf" / "schedule").glob("*.yaml"))
STEPS = [1, 2, 3, 7, 100]


def make(name: str, **changes: Any) -> Callable[..., float]:
    return instantiate(
        OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "schedule" / f"{name}.yaml"))
        | changes
    )


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_in_bounds_learn_from_the_start_and_depend_on_the_step_alone(name):
    for warmup, steps in itertools.product([0, 0.05, 0.5, 1, 3, 50], STEPS):
        factor, other = make(name, warmup=warmup), make(name, warmup=warmup)
        forwards = [factor(step, steps=steps) for step in range(steps)]
        case = f"warmup {warmup}, {steps} steps: {forwards}"
        assert all(0 < value <= 1 for value in forwards), case
        assert [other(step, steps=steps) for step in reversed(range(steps))][::-1] == forwards, case
        # a run that is made longer asks for one more
        assert 0 <= factor(steps, steps=steps) <= 1, case


# (warmup, steps of the run, steps of the warm-up)
RISES = [(0.05, 100, 5), (0.5, 10, 5), (7, 100, 7), (1, 100, 1), (0, 100, 0), (0.01, 20, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_in_equal_parts_to_the_peak(name):
    for warmup, steps, rise in RISES:
        factor = make(name, warmup=warmup)
        for step in range(rise):
            assert factor(step, steps=steps) == pytest.approx((step + 1) / rise), (warmup, step)
        if rise:
            assert factor(rise - 1, steps=steps) == 1.0, warmup
        assert factor(rise, steps=steps) == 1.0, warmup


# What is left of the peak, less the final factor, when the share x of the way down is done.
LEFT = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - x**0.5,
}


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_what_falls_after_the_warm_up_is_its_closed_form(name, final):
    factor = make(name, warmup=0.1, final=final)
    for steps in STEPS:
        rise = round(0.1 * steps)
        for step in range(rise, steps):
            right = final + (1 - final) * LEFT[name]((step - rise) / (steps - rise))
            assert factor(step, steps=steps) == pytest.approx(right), (steps, step)


def test_constant():
    factor = make("constant", warmup=0)
    assert {factor(step, steps=steps) for steps in STEPS for step in range(steps)} == {1.0}


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_cooldown_holds_the_peak_and_then_falls_as_its_shape(shape, final):
    lengths = [(10, 0.3, 3), (100, 0.3, 30), (10, 4, 4), (100, 4, 4), (10, 0, 0), (100, 0, 0)]
    for steps, cooldown, down in lengths:
        factor = make("cooldown", warmup=0, cooldown=cooldown, shape=shape, final=final)
        assert {factor(step, steps=steps) for step in range(steps - down)} == {1.0}, cooldown
        for i in range(down):
            right = final + (1 - final) * LEFT[shape](i / down)
            assert factor(steps - down + i, steps=steps) == pytest.approx(right), (cooldown, i)


@pytest.mark.parametrize("final", [0.01, 0.5, 1.0])
def test_an_exponential_cooldown_falls_by_the_same_share_in_each_step(final):
    factor = make("cooldown", warmup=0, cooldown=0.3, shape="exponential", final=final)
    for steps, down in [(10, 3), (100, 30)]:
        right = 1.0
        for step in range(steps - down, steps + 1):
            assert factor(step, steps=steps) == pytest.approx(right), (steps, step)
            right *= math.exp(math.log(final) / down)
        # not a share of 1 - final on top of it
        assert factor(steps, steps=steps) == pytest.approx(final), steps


@pytest.mark.parametrize(
    ("warmup", "timescale", "tau"),
    [(5, None, 5), (0, None, 1), (5, 40, 40), (5, 0.1, 10), (0, 0.001, 1)],
)
def test_inverse_sqrt(warmup, timescale, tau):
    factor = make("inverse_sqrt", warmup=warmup, timescale=timescale)
    for after in range(100 - warmup):
        assert factor(warmup + after, steps=100) == pytest.approx((1 + after / tau) ** -0.5)
    assert factor(warmup + 3 * tau, steps=100) == pytest.approx(0.5)


def test_inverse_sqrt_is_transformers_one_after_the_warm_up():
    from transformers import get_inverse_sqrt_schedule

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=10, timescale=25)
    factor = make("inverse_sqrt", warmup=10, timescale=25)
    for step in range(100):
        if step >= 10:
            assert factor(step, steps=100) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("milestones", [[0.8, 0.9], [80, 90]])
def test_multistep_holds_each_factor_from_its_milestone_on(milestones):
    factor = make("multistep", warmup=0, milestones=milestones, factors=[0.316, 0.1])
    assert [factor(step, steps=100) for step in range(100)] == [1.0] * 80 + [0.316] * 10 + [
        0.1
    ] * 10


def test_multistep_without_milestones_is_constant_and_a_milestone_may_be_in_the_warm_up():
    factor = make("multistep", warmup=4, milestones=[], factors=[])
    assert [factor(step, steps=6) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    factor = make("multistep", warmup=4, milestones=[2], factors=[0.5])
    assert [factor(step, steps=6) for step in range(6)] == [0.25, 0.5, 0.375, 0.5, 0.5, 0.5]


def test_a_cooldown_longer_than_the_run_starts_within_it():
    factor = make("cooldown", warmup=0, cooldown=10, shape="linear", final=0.0)
    assert [factor(step, steps=4) for step in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_longer_run_shares_the_past_of_a_shorter_one_until_it_cools_down():
    factor = make("cooldown", warmup=10, cooldown=0.2)
    assert [factor(step, steps=100) for step in range(80)] == [
        factor(step, steps=1000) for step in range(80)
    ]
    assert factor(90, steps=100) < factor(90, steps=1000) == 1.0


@pytest.mark.parametrize(
    ("value", "steps", "expected"),
    [(0.3, 10, 3), (0.05, 1, 0), (0.5, 3, 2), (1, 10, 1), (12, 10, 12), (0, 10, 0)],
)
def test_lengths_below_one_are_fractions(value, steps, expected):
    assert length(value, steps) == expected
    assert warmed_up(0, length(value, steps)) == (
        1.0 if expected == 0 else pytest.approx(1 / expected)
    )


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_restarted_schedule_rises_again_and_ends_where_the_run_ends(name):
    schedule = make(name, warmup=2, final=0.1)
    rates = [schedules.factor(schedule, step, 20, 8) for step in range(21)]
    assert rates[:8] == [schedule(step, steps=20) for step in range(8)]
    assert rates[8:10] == [0.5, 1.0]
    assert rates[20] == pytest.approx(0.1)
    assert all(rate > 0.1 for rate in rates[8:20])


def test_a_cooldown_takes_over_at_its_start_and_not_before():
    schedule, cooling = make("constant", warmup=0), RuntimeCooldown(6, 4, 0.5, "linear", 0.2)
    rates = [schedules.factor(schedule, step, 20, 0, cooling) for step in range(12)]
    assert rates == pytest.approx([1.0] * 6 + [0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
