"""The load of other processes is separated from that of the run itself."""

from __future__ import annotations

import logging
import time

import pytest

from trainer.speed import cpu_load
from trainer.speed.cpu_load import Seconds


@pytest.mark.parametrize(
    ("others", "own", "threads", "count", "advised"),
    [
        (10.0, 10.0, 2, 2, 1),  # one process that never stops
        (10.0, 0.0, 8, 8, 7),
        (25.0, 5.0, 8, 8, 6),  # two and a half of them
        (90.0, 5.0, 4, 4, 1),  # more than there is
        (10.0, 10.0, 1, 2, None),  # one thread has a core of its own
        (4.0, 16.0, 2, 2, None),  # now and then
        (0.0, 20.0, 2, 2, None),
        (-0.5, 20.0, 2, 2, None),  # clocks tick apart
    ],
)
def test_the_advice_leaves_the_others_their_cores(others, own, threads, count, advised):
    then = Seconds(100.0, 1000.0, 7.0)
    now = Seconds(110.0, 1000.0 + others + own, 7.0 + own)
    advice = cpu_load.crowded(then, now, threads, count)
    assert (advice is None) if advised is None else f"threads={advised} may be" in advice


@pytest.mark.long
def test_what_this_process_uses_is_its_own():
    then = cpu_load.seconds()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    now = cpu_load.seconds()
    assert 0.4 < now.own - then.own < 0.8
    assert now.all - then.all > 0.9 * (now.own - then.own) - 0.1
    assert now.clock > then.clock
    assert cpu_load.available() >= 1


def test_a_run_says_it(train, chats, monkeypatch, caplog):
    monkeypatch.setattr(
        cpu_load, "crowded", lambda then, now, threads, count: f"{threads} of {count} are too many"
    )
    with caplog.at_level(logging.WARNING, "trainer"):
        train(f"task.path={chats}", "max_steps=1", "callbacks.evaluation=null")
    assert f"1 of {cpu_load.available()} are too many" in caplog.text
