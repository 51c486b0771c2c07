"""Lengths of a run that do not fit together: steps, epochs, warm-up, cooldown, milestones.

Exclusions without arithmetic are rows of conf/; see trainer.config.conflicts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any


def problems(config: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each pair of lengths of a plain config that do not fit together."""
    yield from _milestones(config["schedule"])
    yield from _epochs(config)
    yield from _branch(config)
    yield from _trigger(config)
    yield from _open_end(config)
    yield from _warmup_and_cooldown(config)
    averaging, steps = config["callbacks"].get("averaging"), config["max_steps"]
    if averaging and steps is not None and averaging["start"] >= max(1, steps):
        yield (
            f"callbacks.averaging.start={averaging['start']} is not before the end of"
            f" max_steps={steps}: set fewer steps, or a fraction of the run"
        )


def _milestones(schedule: dict[str, Any]) -> Iterator[str]:
    if schedule["_target_"] != "trainer.schedules.multistep.multistep":
        return
    milestones, factors = schedule["milestones"], schedule["factors"]
    if len(milestones) != len(factors):
        yield (
            f"schedule.milestones has {len(milestones)} entries and schedule.factors"
            f" {len(factors)}: each milestone needs a factor"
        )
    if any(late <= early for early, late in itertools.pairwise(milestones)):
        yield f"schedule.milestones={milestones} do not rise: give them in rising order"
    elif milestones and (milestones[0] < 1) != (milestones[-1] < 1):
        yield (
            f"schedule.milestones={milestones} mix fractions of the run with steps: give all below"
            " 1, or all in steps"
        )


def _epochs(config: dict[str, Any]) -> Iterator[str]:
    epochs = config["max_epochs"]
    if config["task"].get("streaming") and epochs is not None and epochs % 1:
        yield (
            "task.streaming=true does not know where half an epoch ends:"
            f" max_epochs={epochs} must be whole, or null"
        )


def _branch(config: dict[str, Any]) -> Iterator[str]:
    branch = config.get("branch")
    if branch and config["max_steps"] != branch["step"] + branch["steps"]:
        yield (
            f"max_steps={config['max_steps']} is not branch.step + branch.steps ="
            f" {branch['step'] + branch['steps']}, where the cooldown ends: python -m"
            " trainer.cooldown sets both"
        )


def _trigger(config: dict[str, Any]) -> Iterator[str]:
    trigger, max_time = config["callbacks"].get("cooldown"), config["max_time"]
    if not trigger or trigger["deadline"] != "max_time":
        return
    if max_time is None or max_time <= trigger["reserve"]:
        yield (
            "callbacks.cooldown.deadline=max_time needs a max_time above"
            f" callbacks.cooldown.reserve={trigger['reserve']:g} minutes; it is"
            f" {max_time or 'null'}"
        )


def _open_end(config: dict[str, Any]) -> Iterator[str]:
    """Yield a fault if a run without a known number of steps has settings in fractions of it."""
    lengths = [config[key] for key in ("max_steps", "max_epochs", "max_tokens")]
    if config["max_time"] is None or any(length is not None for length in lengths):
        return
    schedule = config["schedule"]
    open_ended = schedule["_target_"].endswith((".constant", ".inverse_sqrt"))
    if not open_ended or 0 < schedule["warmup"] < 1:
        yield (
            "a run that ends by max_time alone has no known number of steps, and this schedule"
            " needs one: set schedule=constant schedule.warmup=20 (in steps), and"
            " callbacks=[default,cooldown] callbacks.cooldown.deadline=max_time for a cooldown at"
            " its end"
        )


def _warmup_and_cooldown(config: dict[str, Any]) -> Iterator[str]:
    schedule, steps = config["schedule"], config["max_steps"]
    ramps = [schedule[key] for key in ("warmup", "cooldown") if schedule.get(key) is not None]
    if config.get("branch") or steps is None or len(ramps) < 2:
        return
    if sum(ramp if ramp >= 1 else ramp * steps for ramp in ramps) > steps:
        yield (
            f"schedule.warmup={ramps[0]} and schedule.cooldown={ramps[1]} take more than the"
            f" run's {steps} steps: set fewer, or fractions of the run"
        )
