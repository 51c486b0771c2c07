"""How tests are spread over processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import spreading


def item(name, *markers):
    """A collected test, as pytest gives it."""
    by_name = {marker.name: marker for marker in markers}
    return SimpleNamespace(nodeid=name, get_closest_marker=by_name.get)


def option(dist):
    return SimpleNamespace(option=SimpleNamespace(dist=dist, loadscopereorder=True))


def test_the_longest_file_comes_first_and_tests_of_a_file_stay_together_in_order():
    run, slow = pytest.mark.run.mark, pytest.mark.slow.mark
    light = [item(f"tests/light.py::{number}") for number in range(9)]
    runs = [item("tests/runs.py::b", run), item("tests/runs.py::a", run)]
    slows = [item("tests/slow.py::a", slow, run)]
    limits = [item("tests/limit.py::a", pytest.mark.timeout(900).mark, run)]
    mixed = [light[0], runs[0], *light[1:], *slows, runs[1], *limits]
    assert spreading.longest_first(mixed) == [*limits, *slows, *runs, *light]


def test_other_ways_of_spreading_are_xdists():
    assert spreading.scheduler(option("worksteal"), None) is None
