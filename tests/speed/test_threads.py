"""Threads by the cores that are free, and how those that wait do."""

from __future__ import annotations

import sys

import pytest

from trainer.speed import cpu_load, threads
from trainer.speed.cpu_load import Seconds

THEN = Seconds(100.0, 1000.0, 7.0)


def watched(monkeypatch, others: float, own: float = 3.0, cores: int = 8) -> None:
    """Let ten seconds pass, in which other processes keep some cores busy."""
    now = Seconds(110.0, 1000.0 + 10 * others + own, 7.0 + own)
    monkeypatch.setattr(cpu_load, "seconds", lambda: now)
    monkeypatch.setattr(cpu_load, "available", lambda: cores)
    monkeypatch.setattr(threads, "quota", lambda: None)
    monkeypatch.setattr(threads.time, "monotonic", lambda: 110.0)


@pytest.mark.parametrize(
    ("others", "most", "cores", "count"),
    [
        (0.0, 8, 8, 8),
        (1.0, 2, 2, 1),  # one busy process on two cores
        (0.4, 2, 2, 2),  # now and then
        (2.6, 8, 8, 5),
        (2.6, 4, 8, 4),  # torch takes one a physical core, or the user says so
        (9.0, 8, 8, 1),
        (-0.3, 8, 8, 8),  # clocks tick apart
    ],
)
def test_threads_are_as_many_as_free_cores(others, most, cores, count, monkeypatch):
    watched(monkeypatch, others, cores=cores)
    assert threads.choose(THEN, most)[0] == count


def test_a_quota_is_no_more_than_it_says(monkeypatch):
    watched(monkeypatch, 0.0)
    for share, count in ((2.0, 2), (2.5, 3), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr(threads, "quota", lambda share=share: share)
        chosen, reason = threads.choose(THEN, 8)
        assert chosen == count
        assert ("control group" in reason) == (share < 8)


def test_others_are_watched_for_a_moment(monkeypatch):
    watched(monkeypatch, 1.0)
    slept: list[float] = []
    monkeypatch.setattr(threads.time, "sleep", slept.append)
    threads.choose(THEN._replace(clock=109.8), 8)
    threads.choose(THEN, 8)
    assert threads.choose(THEN, 1) == (1, "torch has one")
    assert slept == [pytest.approx(threads.WINDOW - 0.2), 0.0]


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"a/b/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1.0),
        ({"cpu.max": "400000 100000"}, 4.0),  # a container sees its own group as the root
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"cpu,cpuacct/c/cpu.cfs_quota_us": "50000"}, 0.5),
        ({"cpu,cpuacct/c/cpu.cfs_quota_us": "-1"}, None),
        ({"cpu.max": "what"}, None),
        ({}, None),
    ],
)
def test_quotas_of_control_groups_are_read(files, share, tmp_path):
    own, root = tmp_path / "own", tmp_path / "groups"
    own.write_text("4:memory:/x\n3:cpu,cpuacct:/c\n0::/a/b\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        if name.endswith("quota_us"):
            (root / name).with_name("cpu.cfs_period_us").write_text("100000")
    assert threads.quota(own, root) == share
    assert threads.quota(tmp_path / "none", root) is None


def test_waiting_threads_yield_next_to_other_work(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    watched(monkeypatch, 1.0)
    environment: dict[str, str] = {}
    assert threads.let_waiting_yield(THEN, environment)
    assert environment == threads.SHORT_SPIN
    for user in ({"OMP_NUM_THREADS": "1"}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}):
        before = dict(user)
        assert not threads.let_waiting_yield(THEN, user)
        assert user == before
    watched(monkeypatch, 0.2)
    assert not threads.let_waiting_yield(THEN, {})
    watched(monkeypatch, 1.0)
    monkeypatch.setitem(sys.modules, "torch", threads)  # it has read its environment
    assert not threads.let_waiting_yield(THEN, {})
