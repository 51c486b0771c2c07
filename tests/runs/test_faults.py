"""A share of the faults that scripts/faults injects, so that a change that breaks what they show is
seen here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from scripts.faults import cases, kills, ledger
from tests.conftest import ROOT

# A process of its own: what is forked there must not hold the threads that other tests have left.
FEW = [
    "kills:lora:SIGKILL",
    "kills:lora:random draws",
    "points:lora:mid_write",
    "damage:lora:cache of tokens with a bit",
]
MANY = [
    "kills",
    "points:rosa",
    "points:spiel",
    "disk:lora",
    "damage:eagle3",
    "loader",
    "memory:spiel",
    "nonfinite:lora",
    "clock:rosa:back",
]


def injected(folder, only, kills):
    """The lines of a harness that found everything as it should be."""
    command = [
        sys.executable,
        "-m",
        "scripts.faults",
        f"out={folder}",
        f"only=[{','.join(only)}]",
        f"kills={kills}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRAFT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=1400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]


def test_a_few_faults_cost_nothing_but_the_work_since_the_last_save(tmp_path):
    rows = injected(tmp_path, FEW, kills=1)
    assert {row["family"] for row in rows} == {"kills", "points", "damage"}
    assert sum(row.get("killed", False) for row in rows) >= 1 + 1
    assert all(row["same"] for row in rows if "same" in row)
    assert "| lora | mid_write | 1 |" in (tmp_path / "faults.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_many_faults_cost_nothing_but_the_work_since_the_last_save(tmp_path):
    rows = injected(tmp_path, MANY, kills=20)
    assert sum(row.get("killed", False) for row in rows) >= 20
    assert {row["case"] for row in rows} >= {
        "lora",
        "rosa",
        "spiel",
        "mtp",
        "eagle3",
        "cooldown",
        "respond",
    }


def test_the_table_tells_what_went_wrong(tmp_path):
    book = ledger.Ledger(tmp_path)
    book.add("points", "lora", "mid_write", killed=True, lost=2, same=True, ok=True)
    assert book.write([])
    with book.file.open("a") as file:
        file.write('{"family": "points", "ca')  # as a kill leaves it
    book = ledger.Ledger(tmp_path, ["points:lora", "disk"])
    assert len(book.rows) == 1
    assert not book.due("points", "lora", "mid_write")
    assert book.due("points", "lora", "mid_window")
    assert not book.due("points", "rosa", "mid_write")
    book.add("points", "lora", "mid_write", killed=True, lost=3, same=False, ok=False)
    assert not book.write([])
    assert (
        "| lora | mid_write | 2 | 3 |  | **no** (1 of 2) | **no** |"
        in (tmp_path / "faults.md").read_text()
    )
    assert [json.loads(line)["lost"] for line in book.file.read_text().splitlines()] == [2, 3]


@pytest.mark.parametrize("number", [0, 1, 20, 57, 200])
def test_kills_are_shared_among_the_phases_alike(number):
    shares = kills.shared(number, list(cases.PHASES_OF))
    counts = [count for share in shares.values() for count in share.values()]
    assert sum(counts) == number
    assert max(counts) - min(counts) <= 1
    assert {case: tuple(share) for case, share in shares.items()} == cases.PHASES_OF


def test_kills_that_are_not_spread_evenly_fail_the_harness(tmp_path):
    book = ledger.Ledger(tmp_path)
    book.expected = {"lora": {"training": 1, "saving": 1}}
    for count, (phase, good) in enumerate([("training", False), ("saving", True)]):
        book.add("kills", "lora", f"SIGKILL while {phase}", killed=True, phase=phase, ok=True)
        assert book.write([]) == good, count
    book.add("kills", "lora", "SIGKILL while saving", killed=True, phase="saving", ok=True)
    assert not book.write([])
    text = (tmp_path / "faults.md").read_text()
    assert "lora, saving: 2 kills instead of 1" in text
    assert "| lora | 3 | training 1, saving 2 |" in text


class Phases:
    """A child that enters phases by being looked at, and is killed only while it is stopped."""

    def __init__(self, phases: list[str]):
        self.phases, self.at, self.stopped, self.killed = phases, 0, False, None
        self.marks = self

    @property
    def phase(self) -> str:
        return self.phases[self.at]

    def count(self, phase: str) -> int:
        return self.phases[: self.at + 1].count(phase)

    def poll(self) -> int | None:
        if not self.stopped and self.at < len(self.phases) - 1:
            self.at += 1
        return 0 if self.at == len(self.phases) - 1 else None

    def stop(self) -> None:
        self.at, self.stopped = min(self.at + self.late, len(self.phases) - 1), True

    def resume(self) -> None:
        self.stopped, self.late = False, 0

    def kill(self) -> None:
        self.killed = self.phase


@pytest.mark.parametrize("late", [0, 1])
def test_a_child_is_killed_in_the_phase_that_was_aimed_for_and_in_no_other(late):
    child = Phases(["starting", "saving", "training", "saving", "training", "exporting", "end"])
    child.late = late  # phases that pass before it stops
    assert kills.strike(child, "exporting", random.Random(0)) == (late == 0)
    assert child.killed == ("exporting" if late == 0 else None)
    child = Phases(["starting", "training", "saving", *["training", "saving"] * 12, "end"])
    child.late = late
    assert kills.strike(child, "saving", random.Random(0))
    assert child.killed == "saving"
