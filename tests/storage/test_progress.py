"""Long work says in the log how far it is, at the latest every 15 seconds."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from trainer.callbacks.progress import ProgressBar
from trainer.storage.progress import EVERY, Progress, clock, current


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize(
    ("total", "unit", "done", "seconds", "line"),
    [
        (480, "rows", 0, 15, "evaluation: 0 of 480 rows, 0:15 so far"),
        (480, "rows", 120, 60, "evaluation: 120 of 480 rows, 3:00 left"),
        (480, "rows", 480, 60, "evaluation: 480 of 480 rows, 0:00 left"),
        (3, "rows", 5, 60, "evaluation: 5 of 3 rows, 0:00 left"),
        (12000, "", 6000, 7200, "evaluation: 6,000 of 12,000, 120:00 left"),
        (None, "batches", 7, 75, "evaluation: 7 batches, 1:15 so far"),
        (None, "", 0, 75, "evaluation: 1:15 so far"),
    ],
)
def test_a_line_has_the_count_and_the_time_left(total, unit, done, seconds, line):
    now = Clock()
    with Progress("evaluation", total, unit, now=now) as progress:
        progress.advance(done)
        now.seconds += seconds
        assert progress.line() == line


def test_the_time_before_it_was_opened_does_not_count():
    now = Clock()
    progress = Progress("evaluation", 4, now=now)
    now.seconds += 100
    with progress:
        now.seconds += 10
        progress.advance()
        assert progress.line() == "evaluation: 1 of 4, 0:30 left"


def test_what_was_done_earlier_does_not_make_it_faster():
    now = Clock()
    progress = Progress("respond", 100, "rows", done=60, now=now)
    now.seconds += 10
    assert progress.line() == "respond: 60 of 100 rows, 0:10 so far"
    progress.advance(20)
    assert progress.line() == "respond: 80 of 100 rows, 0:10 left"


@pytest.mark.long
@pytest.mark.parametrize(("level", "printed"), [(logging.NOTSET, True), (logging.WARNING, False)])
def test_a_command_prints_and_other_ranks_are_silent(capsys, monkeypatch, level, printed):
    monkeypatch.setattr(logging.getLogger("trainer"), "level", level)
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    logging.getLogger("trainer")._cache.clear()  # of isEnabledFor
    with Progress("export", every=0.01):
        time.sleep(0.2)
    logging.getLogger("trainer")._cache.clear()
    out, err = capsys.readouterr()
    assert (out, "export: 0:00 so far" in err) == ("", printed)


def test_it_speaks_at_least_four_times_a_minute():
    assert EVERY <= 15


def logged(caplog):
    return [record.getMessage() for record in caplog.records]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_slow_piece_of_work_does_not_keep_it_silent(caplog):
    with caplog.at_level(logging.INFO), Progress("merge", 2, "layers", every=0.01):
        until(lambda: len(logged(caplog)) > 2)  # nothing advances
    assert set(logged(caplog)) == {"merge: 0 of 2 layers, 0:00 so far"}


def test_what_is_short_says_nothing_and_what_is_over_no_more(caplog):
    with caplog.at_level(logging.INFO):
        with Progress("merge", 2, every=5.0):
            pass
        assert logged(caplog) == []
        with Progress("merge", 2, every=0.01):
            until(lambda: logged(caplog))
        count = len(logged(caplog))
        time.sleep(0.1)
        assert len(logged(caplog)) == count
    assert not [thread for thread in threading.enumerate() if thread.name == "progress: merge"]


def test_an_error_ends_it():
    with pytest.raises(ValueError, match="broken"), Progress("broken", every=0.01):
        raise ValueError("broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress: broken"]


def test_items_are_counted_when_they_are_done():
    progress = Progress("rows", 3)
    counts = []
    assert [(counts.append(progress.done), item)[1] for item in progress.each("abc")] == list("abc")
    assert (counts, progress.done) == ([0, 1, 2], 3)


def test_a_clock_reads_as_minutes_and_seconds():
    assert [clock(seconds) for seconds in (0, 59.9, 60, 725)] == ["0:00", "0:59", "1:00", "12:05"]


def test_the_share_of_the_next_piece_counts():
    now = Clock()
    with Progress("answers", 40, "rows", now=now) as progress:
        now.seconds += 10
        progress.within(32, 128, "tokens", 16)
        assert progress.line() == "answers: 0 of 40 rows, 32 of 128 tokens of the next, 1:30 left"
        progress.advance(16)
        now.seconds += 10
        assert progress.line() == "answers: 16 of 40 rows, 0:30 left"
        progress.within(1, 2, "tokens", 24)
        assert progress.line() == "answers: 16 of 40 rows, 1 of 2 tokens of the next, 0:08 left"


def test_of_nested_work_the_innermost_is_reported(caplog):
    with caplog.at_level(logging.INFO), Progress("outer", every=0.02) as outer:
        assert current() is outer
        with Progress("inner", every=0.01) as inner:
            assert current() is inner
            until(lambda: len(logged(caplog)) > 3)
            assert {line.partition(":")[0] for line in logged(caplog)} == {"inner"}
        caplog.clear()
        until(lambda: logged(caplog))
        assert logged(caplog)[0].startswith("outer")
    assert current() is None


@pytest.mark.long
def test_what_spoke_meanwhile_delays_the_next_line(caplog):
    """The steps of training have lines of their own."""
    with caplog.at_level(logging.INFO), Progress("training", every=0.2) as progress:
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            progress.spoke = time.monotonic()
            time.sleep(0.01)
        assert logged(caplog) == []
        until(lambda: logged(caplog))


def test_a_long_step_of_training_is_reported_by_its_micro_batches():
    run_state = SimpleNamespace(steps=10, max_minutes=None)
    trainer = SimpleNamespace(is_global_zero=True)
    module = SimpleNamespace(step=4, step_done=False)
    bar = ProgressBar(run_state, 1)
    bar.on_train_start(trainer, module)
    assert bar.ticks is not None
    try:
        bar.ticks.now = now = Clock()
        bar.ticks.started = now.seconds
        now.seconds += 30
        bar.count(module, 10, 4)
        line = "training: 4 of 10 steps, 3 of 4 micro-batches of the next, 3:30 left"
        assert bar.ticks.line() == line
        module.step, module.step_done = 5, True
        bar.count(module, 11, 4)
        assert bar.ticks.line() == "training: 5 of 10 steps, 2:30 left"
    finally:
        bar.on_exception(trainer, module, ValueError())
    assert current() is None


def test_tokenising_counts_its_rows(tmp_path, tiny):
    """And knows how many there are, where they were counted to hold some out."""
    from tests.conftest import sums, write_rows
    from tests.toys.tasks import task_of
    from trainer.assembly.rows import _count
    from trainer.data.render import Renderer
    from trainer.data.rows import tokenise

    task = task_of("sft", write_rows(tmp_path / "rows.jsonl", sums(20)), eval_fraction=0.1)
    assert (_count(task, "train"), _count(task, "eval")) == (18, 2)
    task.splits.limit = 5
    assert _count(task, "train") == 5
    with Progress("tokenising", 5, "rows") as progress:
        tokenise(task, "train", Renderer(tiny.tokenizer, task), 512, "skip", 1)
        assert progress.line() == "tokenising: 5 of 5 rows, 0:00 left"
