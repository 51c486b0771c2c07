"""Spreads the tests over the processes of pytest-xdist: whole files, so that a module's fixture is
built once, and the longest files first, so that no process waits long for the last one.
"""

from __future__ import annotations

from typing import Any

import pytest

# Seconds of a test by its first marker of these, by order of magnitude. A limit that a test
# declares is at most five times what it takes.
SECONDS = {"slurm": 60.0, "slow": 30.0, "run": 3.0, "long": 1.0}
LIGHT = 0.05
SHARE_OF_LIMIT = 0.2


def seconds(item: pytest.Item) -> float:
    """Estimate what a test takes, in seconds."""
    limit = item.get_closest_marker("timeout")
    if limit is not None and limit.args:
        return float(limit.args[0]) * SHARE_OF_LIMIT
    marked = (SECONDS[name] for name in SECONDS if item.get_closest_marker(name))
    return next(marked, LIGHT)


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Order tests by the estimated time of their file, longest first; within a file they stay in
    order."""
    totals: dict[str, float] = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        totals[file] = totals.get(file, 0.0) + seconds(item)
    return sorted(items, key=lambda item: -totals[item.nodeid.partition("::")[0]])


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Give out files in the order in which they were collected; None where another way of
    spreading was asked for."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist not in ("load", "loadfile"):
        return None
    config.option.loadscopereorder = False  # that order is by the number of tests
    return LoadFileScheduling(config, log)
