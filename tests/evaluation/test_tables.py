"""Tables in three forms, numbers of several runs, and pictures that are the same each time."""

from __future__ import annotations

import base64
import statistics
from xml.etree import ElementTree

import pytest

from trainer.evaluation.pictures import Curve, picture
from trainer.evaluation.tables import LONGEST, Table, duration, mean_sd, size, spread


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.25], "0.2500"),
        ([1.0, 2.0, 4.0], f"2.3333 ± {statistics.stdev([1, 2, 4]):.4f}"),
        ([1.0, None], "1.0000"),
        ([float("nan"), None], ""),
        ([], ""),
    ],
)
def test_a_mean_has_its_deviation(values, text):
    assert mean_sd(values) == text


def test_counts_sizes_and_times():
    assert [spread([]), spread([40, 40]), spread([None, 1200, 40])] == ["", "40", "40–1,200"]  # noqa: RUF001
    assert [size(None), size(999), size(1234), size(3.5e9)] == ["", "999 B", "1.2 kB", "3.5 GB"]
    assert [duration(None), duration(99), duration(235), duration(7200)] == [
        "",
        "99 s",
        "3.9 min",
        "2.0 h",
    ]


def test_a_cell_cannot_break_a_table(capsys):
    from rich.console import Console

    table = Table(["run", "loss"], [["a|b\nc\\", "1"], ["x" * 50, "[red]2"]])
    assert table.markdown().splitlines() == [
        "| run | loss |",
        "| --- | ---: |",
        "| a\\|b c\\\\ | 1 |",
        f"| {'x' * 50} | [red]2 |",
    ]
    Console(width=100).print(table.rich())
    shown = capsys.readouterr().out
    assert "x" * (LONGEST - 1) + "…" in shown
    assert "[red]2" in shown


@pytest.mark.long
def test_a_picture_is_the_same_each_time_and_holds_its_curves():
    curves = [Curve("first", [(0, 1.0), (1, 0.5)]), Curve("", [(0, 2.0)], "o-", "#123456")]
    one, two = picture("loss", curves), picture("loss", curves)
    assert one == two
    assert picture("loss", curves[:1]) != one
    text = base64.b64decode(one["data"]).decode()
    ElementTree.fromstring(text)
    assert "first" in text
    assert "#123456" in text
