"""YAML beyond its limits, links that lead out, and work without end are refused; what is within
them is taken."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import yaml

from tests.conftest import ROOT
from trainer.config.limits import (
    LOADER,
    LimitExceeded,
    limited,
    load_yaml,
    refuse_bomb,
    strange_entry,
)
from trainer.config.schema import CONF


def bomb(levels):
    """Nine aliases a level: 9**levels values when they are written out."""
    lines = ["a0: &a0 [x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels + 1)
    ]
    return "\n".join(lines)


def written_out(node):
    """The number of values of a parsed file, each counted as often as it is reached."""
    if isinstance(node, dict):
        return 1 + sum(written_out(part) for pair in node.items() for part in pair)
    return 1 + sum(map(written_out, node)) if isinstance(node, list) else 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "more than 10,000 values"),
        (bomb(60), "more than 10,000 values"),
        (
            "x: &x {a: 1}\ny: &y {<<: *x, b: [*x, *x]}\n"
            + "\n".join(f"z{i}: [{', '.join(['*y'] * 30)}]" for i in range(40)),
            "more than 10,000",
        ),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: {c: *a}}", "contains itself"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ("[" * 100_000, "more than 64 levels"),
        ("- " * 5000 + "x", "more than 64 levels"),
        ("a: " + "x" * (1 << 20), "at most 1,048,576"),
        ("[" + "1," * 10_000 + "]", "more than 10,000 values"),
    ],
    ids=[
        "bomb",
        "high",
        "merged",
        "itself",
        "its part",
        "deep",
        "deeper",
        "dashes",
        "long",
        "many",
    ],
)
def test_what_grows_is_refused_at_once(text, message):
    started = time.process_time()
    with pytest.raises(LimitExceeded, match=message):
        refuse_bomb(text, "it")
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "file", [*CONF.rglob("*.yaml"), ROOT / "tests/data/runs_0.1/runs/branch/run.yaml"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_libyaml_reads_what_pyyaml_reads_at_the_same_places(file):
    text = file.read_text("utf-8")
    assert yaml.load(text, Loader=LOADER) == yaml.safe_load(text)

    def places(node):
        """(line, column) where each node begins and ends."""
        yield from ((mark.line, mark.column) for mark in (node.start_mark, node.end_mark))
        for part in node.value if isinstance(node.value, list) else ():
            for each in part if isinstance(part, tuple) else (part,):
                yield from places(each)

    if (node := yaml.compose(text, Loader=LOADER)) is not None:
        assert [*places(node)] == [*places(yaml.compose(text))]


def test_the_count_is_of_what_is_written_out():
    text = bomb(3) + "\nb: {c: *a2, d: [*a0, 1, {e: f}]}\n"
    count = written_out(yaml.safe_load(text))
    refuse_bomb(text, "it", (1 << 20, count))
    with pytest.raises(LimitExceeded):
        refuse_bomb(text, "it", (1 << 20, count - 1))


def test_a_record_of_many_starts_is_read(tmp_path):
    start = {"time": "t", "command": "c", "versions": {f"package {i}": "1" for i in range(9)}}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"starts": [start] * 300 + [dict(start, n=i) for i in range(500)]})
    )
    assert len(load_yaml(tmp_path / "run.yaml")["starts"]) == 800


def test_links_that_lead_out(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    (run / "wandb" / "offline-1").mkdir(parents=True)
    (run / "deep" / "er").mkdir(parents=True)
    other.mkdir()
    (run / "wandb" / "latest-run").symlink_to("offline-1")
    (run / "wandb" / "offline-1" / "debug.log").symlink_to(other / "debug.log")  # as W&B makes one
    (tmp_path / "by another name").symlink_to(run)
    assert strange_entry(run, "wandb") is None
    assert strange_entry(tmp_path / "by another name", "wandb") is None
    assert strange_entry(tmp_path / "missing", "wandb") is None
    for place, leads in (
        ("checkpoints", other),
        ("deep/gone", tmp_path / "missing"),
        ("deep/er/up", "../../.."),
        ("run-2", f"{run}-2"),
    ):
        (run / place).symlink_to(leads)
        assert strange_entry(run, "wandb").startswith(f"{run / place} is a link that leads out")
        (run / place).unlink()
    (run / "wandb").rename(run / "before")
    (run / "before" / "offline-1" / "debug.log").unlink()
    (run / "wandb").symlink_to(other)
    assert strange_entry(run, "wandb").startswith(f"{run / 'wandb'} is a link")


def endless():
    while True:
        pass


@pytest.mark.long
def test_work_without_end_is_stopped_and_the_signal_given_back():
    handler = signal.getsignal(signal.SIGVTALRM)
    with (
        pytest.raises(LimitExceeded, match=r"counting took more than 0\.1 s"),
        limited(0.1, "counting"),
    ):
        endless()
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    with limited(0.1, "waiting"):
        time.sleep(0.3)  # that is no computing


def test_elsewhere_than_in_the_main_thread_nothing_is_limited():
    actual = []

    def work():
        with limited(0.01, "it"):
            actual.append(sum(range(100_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(actual) == 1
