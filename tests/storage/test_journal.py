"""The run's numbers: appended row by row, cut back to a step when a run resumes, and complete
whatever a kill left of the last line."""

from __future__ import annotations

import csv
import json
import locale

import pytest

from tests.toys.disks import full_disk
from trainer.storage import atomic, journal
from trainer.storage.journal import Journal

# Line ends to Python but not to JSON, a character outside the BMP, quotes, and what a shell would
# mind.
ODD = 'a\u2028b\u2029c\x85d\x0be\x1ff\r\ng "h" \\n 🦙 ﷽ \u202e\x00'


class Dashboard:
    """Records its calls, and fails at chosen ones."""

    name = "a dashboard"

    def __init__(self, failing=()):
        self.sent, self.failing = [], failing

    def log(self, kind, step, tokens, values):
        self.sent.append((kind, step, tokens, values))
        if kind in self.failing:
            raise OSError("no space left\nanywhere")

    def log_samples(self, step, samples):
        self.sent.append(("samples", step, samples))
        if "samples" in self.failing:
            raise RuntimeError


@pytest.fixture
def written(tmp_path):
    """A journal with steps 1 to 4, evaluations at 0, 2 and 4 with samples, a skipped step and a
    stop."""
    built = Journal(tmp_path, [])
    built.write("evaluation", 0, {"loss": 5.0})
    for step in range(1, 5):
        built.write("step", step, {"loss": 1 / step, "text": ODD})
        if step == 3:
            built.write("skipped", step, {"rows": [ODD]})
        if step % 2 == 0:
            built.write_samples(
                step,
                [{"where": "a:1", "answer": ODD}, {"where": "a:2", "answer": '"kind": "stopped"'}],
            )
            built.write("evaluation", step, {"loss": 1.0})
    built.write("stopped", 4, {"reason": "it was enough"})
    return built


def steps(rows):
    return [(row["kind"], row["step"]) for row in rows]


ALL = [
    ("evaluation", 0),
    ("step", 1),
    ("step", 2),
    ("evaluation", 2),
    ("step", 3),
    ("skipped", 3),
    ("step", 4),
    ("evaluation", 4),
]


def test_rows_come_back_in_their_order_and_as_they_were(written):
    assert steps(written.rows()) == [*ALL, ("stopped", 4)]
    assert [row["text"] for row in written.rows("step")] == [ODD] * 4
    assert [row["loss"] for row in written.rows("step")] == [1.0, 0.5, 1 / 3, 0.25]
    assert written.rows("evaluation")[0] == {"kind": "evaluation", "step": 0, "loss": 5.0}
    assert written.rows("nothing") == []


@pytest.mark.parametrize(
    ("step", "left"), [(-1, 0), (0, 1), (1, 2), (2, 4), (3, 6), (4, 8), (99, 8)]
)
def test_what_came_after_a_step_is_forgotten_and_so_is_the_stop(written, step, left):
    written.rewind(step)
    assert steps(written.rows()) == ALL[:left]
    samples = journal.read(written.samples)
    assert [row["step"] for row in samples] == [2] * 2 * (step >= 2) + [4] * 2 * (step >= 4)
    assert all(row["answer"] == ODD for row in samples if row["where"] == "a:1")


def test_rewound_and_written_again_it_is_the_same_file(written):
    before = written.metrics.read_bytes()
    written.rewind(3)
    written.write("step", 4, {"loss": 0.25, "text": ODD})
    written.write("evaluation", 4, {"loss": 1.0})
    written.write("stopped", 4, {"reason": "it was enough"})
    assert written.metrics.read_bytes() == before


@pytest.mark.long
def test_a_file_cut_anywhere_loses_only_its_last_line(written):
    whole = written.metrics.read_bytes()
    lines = whole.split(b"\n")
    for cut in range(len(whole)):
        written.metrics.write_bytes(whole[:cut])
        complete = sum(
            sum(len(line) + 1 for line in lines[: i + 1]) - 1 <= cut for i in range(len(lines) - 1)
        )
        assert len(written.rows()) == complete


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_line_does_not_spoil_the_next(written, cut):
    written.metrics.write_bytes(written.metrics.read_bytes()[:-cut])
    written.rewind(3)
    written.write("step", 4, {"loss": 0.25})
    assert steps(written.rows()) == [*ALL[:6], ("step", 4)]
    for line in written.metrics.read_text("utf-8").split("\n")[:-1]:
        json.loads(line)


def test_a_character_cut_in_two_is_no_error(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1, "answer": "ok"}\n{"step": 2, "answer": "🦙'.encode()[:-2])
    assert journal.read(path) == [{"step": 1, "answer": "ok"}]


def test_nothing_written_is_nothing_read(tmp_path):
    assert journal.read(tmp_path / "metrics.jsonl") == []
    built = Journal(tmp_path, [])
    built.rewind(3)
    built.write_samples(1, [])
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_nothing(tmp_path):
    dashboard = Dashboard()
    built = Journal(tmp_path, [dashboard], writes=False)
    built.write("step", 1, {"loss": 2.0})
    built.write_samples(1, [{"where": "a:1"}])
    built.write_csv()
    assert list(tmp_path.iterdir()) == []
    assert dashboard.sent == []
    assert built.last == {"loss": 2.0}  # what the progress bar shows


def test_dashboards_get_every_row_with_the_tokens_until_then(tmp_path):
    first, second = Dashboard(), Dashboard()
    built = Journal(tmp_path, [first, second])
    built.write("evaluation", 0, {"loss": 3.0})
    built.tokens = 9
    built.write("step", 7, {"loss": 2.0})
    built.write_samples(7, [{"answer": "a"}])
    built.write_samples(8, [])
    assert first.sent == [
        ("evaluation", 0, None, {"loss": 3.0}),
        ("step", 7, 9, {"loss": 2.0}),
        ("samples", 7, [{"answer": "a"}]),
    ]
    assert second.sent == first.sent


def test_a_dashboard_that_fails_is_told_of_once_and_costs_no_row(tmp_path, caplog):
    bad, good = Dashboard(failing=("step", "samples")), Dashboard()
    built = Journal(tmp_path, [bad, good])
    for step in range(3):
        built.write("step", step, {"loss": 1.0})
    built.write_samples(3, [{"answer": "a"}])
    built.write("evaluation", 3, {"loss": 1.0})
    assert bad.sent == good.sent
    assert steps(built.rows()) == [("step", 0), ("step", 1), ("step", 2), ("evaluation", 3)]
    assert [record.message for record in caplog.records] == [
        f"a dashboard: no space left. The run continues; {built.metrics} holds everything that it"
        " logs"
    ]


def test_the_newest_step_is_remembered(written):
    assert written.last == {"loss": 0.25, "text": ODD}


def test_the_table_has_a_column_for_every_name_that_occurs(written):
    written.write_csv()
    with written.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["kind", "step", "loss", "text", "rows", "reason"]
    assert [(row["kind"], int(row["step"])) for row in rows] == steps(written.rows())
    assert [float(row["loss"]) for row in rows if row["kind"] == "step"] == [1.0, 0.5, 1 / 3, 0.25]
    assert {row["text"] for row in rows if row["kind"] == "step"} == {ODD}
    assert rows[0]["text"] == ""


def test_the_table_of_nothing_is_empty(tmp_path):
    built = Journal(tmp_path, [])
    built.write_csv()
    assert built.csv.read_text().strip() == ""


def test_a_full_disk_in_a_rewind_leaves_the_journal(written, monkeypatch):
    before = written.metrics.read_bytes()
    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        written.rewind(2)
    assert written.metrics.read_bytes() == before


@pytest.fixture
def ascii_locale():
    """The locale of a machine on which none is set."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        if locale.getencoding().lower().replace("-", "") == "utf8":
            pytest.skip("this Python takes text for UTF-8 whatever the locale")
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_text_is_the_same_in_every_locale(written, ascii_locale):
    before = written.metrics.read_bytes()
    written.write_samples(5, [{"answer": ODD}])
    written.rewind(9)
    written.write_csv()
    assert before.startswith(written.metrics.read_bytes())
    assert journal.read(written.samples)[-1]["answer"] == ODD
    assert ODD in written.csv.read_bytes().decode("utf-8").replace('""', '"')
