"""The marker `run`: tests that train, decode texts or start a process.

It is read from their code, so that nobody has to remember it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest

FIXTURES = {"train", "train_in", "program", "warm_socket", "worker_processes"}
# By module and name of a function or class, as Python gives them.
CALLS = {
    "subprocess.run",
    "subprocess.Popen",
    "tests.adapters.test_rosa.train",
    "tests.toys.adapters.train",
    "tests.toys.finetuning.Run",
    "torch.multiprocessing.spawn.spawn",
    "trainer.decoding.plugin.assist",
    "trainer.decoding.speculative.generate",
    "trainer.decoding.speculative.generate_batch",
    "trainer.respond.main",
    "trainer.run.run",
    "trainer.serving.listening.serve",
}

HEAVY = ("run", "slow", "gpu", "slurm")
# Test file -> how many of its tests train nothing.
LIGHT = pytest.StashKey[dict[str, int]]()


def light_tests(items: list[pytest.Item]) -> dict[str, int]:
    """The value of LIGHT."""
    counts = dict.fromkeys((item.nodeid.partition("::")[0] for item in items), 0)
    for item in items:
        if not any(item.get_closest_marker(mark) for mark in HEAVY):
            counts[item.nodeid.partition("::")[0]] += 1
    return counts


def runs(item: pytest.Item) -> bool:
    """Whether a test, a fixture that it takes or a function of tests/ that these call uses one of
    FIXTURES or CALLS."""
    info = getattr(item, "_fixtureinfo", None)
    if info is None:
        return False
    if FIXTURES & set(info.names_closure):
        return True
    fixtures = [definitions[-1].func for definitions in info.name2fixturedefs.values()]
    return any(reaches(function) for function in [item.function, *fixtures])  # type: ignore[attr-defined]


@functools.cache  # each case of a test asks again
def reaches(function: Any) -> bool:
    """Whether a function uses one of CALLS, by itself or through functions of tests/."""
    seen, waiting = set(), [function]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for value in used(current):
            if f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}" in CALLS:
                return True
            if str(getattr(value, "__module__", "")).startswith("tests."):
                waiting.append(value)
    return False


def used(function: Any) -> Iterator[Any]:
    """Yield the globals that a function or the methods of a class name, and the attributes of
    modules among them."""
    if isinstance(function, type):
        for member in vars(function).values():
            yield from used(member)
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return
    names = set(names_of(function.__code__))
    modules = [types.SimpleNamespace(**function.__globals__)]
    for module in modules:
        for name in names & set(vars(module)):
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                yield value
            elif value not in modules:
                modules.append(value)
    for cell in function.__closure__ or ():
        yield cell.cell_contents


def names_of(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a piece of code and the functions within it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_of(constant)
