"""Which tests count as runs, and what light tests wait for."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import marks, ranks
from tests.conftest import ROOT


def starts_a_process():
    return subprocess.run(["true"])


def starts_it_inside():
    def inner():
        return starts_a_process()

    return inner


class Starter:
    def go(self):
        return ranks.spawn(print, ROOT)


def item(function, names=(), fixtures=()):
    """A collected test, as pytest gives it."""
    definitions = {str(n): [SimpleNamespace(func=f)] for n, f in enumerate(fixtures)}
    info = SimpleNamespace(names_closure=[*names], name2fixturedefs=definitions)
    return SimpleNamespace(function=function, _fixtureinfo=info)


@pytest.mark.parametrize(
    "case",
    [
        item(starts_a_process),
        item(starts_it_inside),
        item(lambda: Starter()),
        item(len, names=["train"]),
        item(len, names=["program"]),
        item(lambda: None, fixtures=[starts_it_inside]),
    ],
)
def test_a_test_that_trains_or_starts_a_process_is_a_run(case):
    assert marks.runs(case)


def test_other_tests_are_no_runs():
    assert not marks.runs(item(lambda: subprocess.PIPE))
    assert not marks.runs(item(lambda: ROOT, names=["tmp_path"], fixtures=[lambda: item]))


COLLECT = """
import sys
import pytest


class Ends:
    def pytest_collection_finish(self, session):
        runs = [item for item in session.items if item.get_closest_marker("run")]
        heavy = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
        print(f"ANSWER {len(session.items) > 0} {len(runs) > 0} {heavy}")


words = ["-q", "--collect-only", "-n", "0", "-p", "no:cacheprovider", *sys.argv[1:]]
sys.exit(pytest.main(words, plugins=[Ends()]))
"""


def collected(*words):
    """Whether there are tests, whether some of them are runs, and the heavy modules imported."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))


def test_tests_of_configs_do_not_wait_for_torch():
    assert collected("tests/config") == "ANSWER True True []"


def test_a_test_that_trains_is_marked_when_collected():
    assert collected("tests/runs/test_run.py").startswith("ANSWER True True")
