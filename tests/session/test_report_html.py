"""report.html: one file to look at, whatever the run folder holds, and nothing in it leaves the
file."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml

from tests.toys.commands import exit_code
from trainer import report
from trainer.session import report_html

pytestmark = pytest.mark.long

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" </pre></body>"
RECORD = {
    "id": "abcd1234",
    "name": "a run",
    "overrides": [],
    "identity": {"choices": {"base": "tiny", "adapter": "lora"}, "steps": 4, "precision": "fp32"},
    "starts": [
        {
            "command": "trainer seed=0",
            "time": "2026",
            "host": "here",
            "git": None,
            "versions": {"torch": "2", "wandb": None},
        }
    ],
    "config": {"base": {"seed": 0}, "task": {"path": "rows"}},
}
SPLIT = {
    "rows": 1234,
    "kept": 1200,
    "dropped": 30,
    "truncated": 2,
    "answers_lost": 3,
    "skipped": 1,
    "tokens": 98765,
    "trained_tokens": 4321,
    "longest": 77,
    "duplicates": 5,
}


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.shown: list[str] = []
        self.cells: list[list[str]] = []
        self.styles: list[str] = []
        self.inside = False  # a table's cell
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in (
                "src",
                "href",
                "srcset",
                "action",
                "data",
                "poster",
                "background",
                "xlink:href",
            ):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "style":
                self.styles.append(value)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.tags[-1:] == ["style"] and "{" in data:
            self.styles.append(data)
            return
        self.shown.append(data)
        if self.inside:
            self.cells[-1][-1] += data.strip()

    @property
    def text(self):
        return "".join(self.shown)

    def row(self, name):
        return next(cells[1:] for cells in self.cells if cells and cells[0] == name)


@pytest.fixture
def folder(tmp_path):
    """Writes a run folder's files and returns its page."""

    def built(metrics=(), samples=(), checked=None, best=None, **record):
        (tmp_path / "run.yaml").write_text(
            yaml.safe_dump(RECORD | record, allow_unicode=True), "utf-8"
        )
        for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
            if rows:
                (tmp_path / name).write_text(
                    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
                )
        if checked is not None:
            (tmp_path / "preflight.json").write_text(json.dumps(checked))
        if best is not None:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / "best.json").write_text(json.dumps({"step": best}))
        path = report_html.write(tmp_path)
        assert path == tmp_path / "report.html"
        return Page(path.read_text("utf-8"))

    return built


def step(number, **values):
    row = {
        "loss": 1 / number,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens": 10 * number,
        "tokens_per_s": 100.0,
        "trained_per_s": 50.0,
        "seconds": 6.0 * number,
    }
    return {"kind": "step", "step": number} | row | values


def evaluation(number, **values):
    return {"kind": "evaluation", "step": number, "loss": 2.0 - number / 4, "seconds": 0.5} | values


def sample(number, answer, where="rows:1", **values):
    return {
        "step": number,
        "where": where,
        "prompt": "2+2=",
        "expected": "4",
        "answer": answer,
        "scores": {"exact_match": 0.5},
    } | values


def test_a_real_runs_page_needs_nothing_outside_itself(train, chats, pictures):
    run = train(f"task.path={chats}", "max_steps=4", "callbacks.evaluation.generate=2")
    page = Page((run / "report.html").read_text("utf-8"))
    assert set(page.tags) & {"script", "link", "iframe", "object", "embed", "form", "base"} == set()
    assert page.handlers == []
    assert len(page.addresses) == page.tags.count("img") >= 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    for address in page.addresses:
        picture = ElementTree.fromstring(base64.b64decode(address.partition(",")[2]))
        assert picture.tag.endswith("svg")
        named = [
            value
            for node in picture.iter()
            for name, value in node.attrib.items()
            if name.endswith("href")
        ]
        assert all(value.startswith("#") for value in named)
    assert not any("url(" in style or "@import" in style for style in page.styles)
    assert not re.search(r"https?://", (run / "report.html").read_text("utf-8"))
    assert {"Before and after", "Curves", "Answers before and after", "Data", "Run"} <= set(
        page.shown
    )


def test_the_table_compares_first_last_and_best(folder):
    rows = [
        evaluation(0, accuracy=0.125),
        evaluation(2, accuracy=0.5),
        evaluation(4, accuracy=0.25, exact_match=1.0, words=1234),
    ]
    page = folder(rows, best=2)
    assert page.row("loss") == ["2.0000", "1.0000", "1.5000"]
    assert page.row("accuracy") == ["0.1250", "0.2500", "0.5000"]
    assert page.row("exact_match") == ["", "1.0000", ""]
    assert page.row("words") == ["", "1,234", ""]
    assert "best (step 2)" in page.text
    assert not any(cells[:1] == ["seconds"] for cells in page.cells)


def test_a_best_that_is_the_last_has_no_column_of_its_own(folder):
    page = folder([evaluation(0), evaluation(4)], best=4)
    assert page.row("loss") == ["2.0000", "1.0000"]
    assert "best" not in page.text


def test_answers_stand_beside_each_other_by_their_row(folder):
    rows = [
        sample(0, "five"),
        sample(0, "six", "rows:2"),
        sample(0, "seven", "rows:9"),
        sample(2, "between"),
        sample(4, "vier", "rows:2"),
        sample(4, "four", scores={"exact_match": 1.0}),
    ]
    page = folder(samples=rows)
    text = re.sub(r"\s+", " ", page.text)
    assert "rows:1 prompt2+2= expected4 before exact_match 0.5five after exact_match 1four" in text
    assert "before exact_match 0.5six after exact_match 0.5vier" in text
    assert "seven" not in text  # not asked again
    assert "between" not in text


def test_answers_of_one_time_alone_are_no_comparison(folder):
    assert "Answers" not in folder(samples=[sample(4, "four")]).text


def test_nothing_that_was_generated_or_configured_becomes_markup(folder):
    plain = folder(
        [evaluation(0), evaluation(4)],
        [sample(0, "a"), sample(4, "b")],
        {"data": {}, "warnings": ["w"]},
    )
    where = {"prompt": NASTY, "expected": NASTY, "where": NASTY, "scores": {NASTY: 1.0}}
    page = folder(
        [
            evaluation(0),
            evaluation(4, **{NASTY: 0.5}),
            {"kind": "stopped", "step": 4, "reason": NASTY},
        ],
        [sample(0, NASTY, **where), sample(4, NASTY, **where)],
        {"data": {}, "warnings": [NASTY]},
        name=NASTY,
        config={"base": {"path": NASTY}, "task": {"system": NASTY}},
    )
    assert set(page.tags) == set(plain.tags)
    assert page.handlers == []
    assert page.text.count(NASTY) >= 9


def test_an_answer_is_shown_to_the_letter(folder):
    answer = "  two\n\tlines \u2028 🦙 {{ 7*7 }} {% raw %} &lt; é"
    page = folder(samples=[sample(0, answer), sample(4, answer)])
    assert page.text.count(answer) == 2


@pytest.mark.parametrize("end", [NASTY, "]]>", "a & b"])
def test_a_metrics_odd_name_spoils_no_picture(folder, end):
    page = folder([evaluation(0, **{end: 0.1}), evaluation(4, **{end: 0.2})])
    for address in page.addresses:
        picture = ElementTree.fromstring(base64.b64decode(address.partition(",")[2]))
        assert not [node for node in picture.iter() if node.tag.endswith("script")]


def test_averaged_weights_have_a_curve_beside_the_others(folder):
    rows = [step(1), evaluation(0), evaluation(4)]
    for averages, shown in (
        ([], False),
        ([{"kind": "average", "step": 4, "loss": 0.9, "updates": 3, "seconds": 0.5}], True),
    ):
        picture = folder([*rows, *averages]).addresses[0]
        assert (
            "averaged"
            in "".join(
                ElementTree.fromstring(base64.b64decode(picture.partition(",")[2])).itertext()
            )
        ) is shown


def test_offsets_have_a_picture_of_their_own(folder):
    def drawn(page):
        return [
            "".join(ElementTree.fromstring(base64.b64decode(a.partition(",")[2])).itertext())
            for a in page.addresses
        ]

    rows = [
        evaluation(
            at,
            **{"offset1/loss": 2.0, "offset1/top1": 0.1 * at, "offset2/top1": 0.1, "accepted": 1.2},
        )
        for at in (0, 4)
    ]
    pictures = drawn(folder([step(1), *rows]))
    (offsets,) = (text for text in pictures if "top-1 by offset" in text)
    assert "offset1" in offsets
    assert "offset2" in offsets
    assert sum("tokens a step" in text for text in pictures) == 1
    assert not any(
        "offset" in text for text in drawn(folder([step(1), evaluation(0), evaluation(4)]))
    )


def test_a_cooldown_is_said(folder):
    page = folder(
        [
            step(3),
            {
                "kind": "cooldown",
                "step": 3,
                "steps": 2,
                "level": 1.0,
                "reason": "SIGUSR2 was received",
            },
            step(4),
        ]
    )
    assert "The rate cools down from step 3 on, over 2 steps: SIGUSR2 was received." in page.shown


def test_a_run_that_did_nothing_has_a_page(folder):
    page = folder()
    assert "a run" in page.shown
    assert "0 of 4 steps" in page.text
    assert "Before and after" not in page.text
    assert page.row("git revision") == ["unknown"]
    assert page.row("versions") == ["torch 2"]


@pytest.mark.parametrize(
    "metrics",
    [
        [evaluation(0)],
        [step(1)],
        [step(1, grad_norm=None, loss=None)],
        [step(1, grad_norm=0.0)],
        [evaluation(0, loss=float("nan")), step(1), evaluation(1, loss=float("inf"))],
        [{"kind": "skipped", "step": 1, "loss": "nan", "grad_norm": "nan", "rows": ["rows:1"]}],
        [{"kind": "stopped", "step": 0, "reason": "none"}],
        [evaluation(0, exact_match=0.0), step(1)],
    ],
)
def test_little_is_enough_for_a_page(folder, metrics):
    page = folder(metrics, samples=[sample(0, "")], checked={})
    assert len(page.addresses) >= 4
    for address in page.addresses:
        ElementTree.fromstring(base64.b64decode(address.partition(",")[2]))


def test_what_was_lost_is_said(folder):
    rows = [{"kind": "skipped", "step": number, "loss": "nan"} for number in (2, 3)]
    page = folder(
        [*rows, step(4), {"kind": "stopped", "step": 4, "reason": "max_time=1 minutes have passed"}]
    )
    assert "Stopped after step 4: max_time=1 minutes have passed." in page.shown
    assert "2 steps were skipped because their loss or gradient was not finite." in page.shown


def test_data_counts_and_warnings_are_those_of_preflight(folder):
    checked = {
        "data": {"train": SPLIT, "eval": SPLIT | {"rows": 7}, "shared": 3},
        "warnings": ["3 rows of evaluation"],
        "model": {"parameters": 1234567, "trainable": 8901},
    }
    page = folder([step(2), step(4)], checked=checked)
    assert page.row("rows read") == ["1,234", "7"]
    assert page.row("trained tokens") == ["4,321", "4,321"]
    assert page.row("duplicates") == ["5", "5"]
    assert "3 rows of evaluation" in page.shown
    assert page.row("parameters") == ["1,234,567, 8,901 trained"]
    assert page.row("trained for") == ["0.4 minutes, 40 tokens, median 100 tokens/s"]


def test_every_start_is_counted_and_the_last_is_told(folder):
    page = folder(
        starts=[
            RECORD["starts"][0],
            RECORD["starts"][0] | {"command": "trainer resume=auto", "git": "abc with changes"},
        ]
    )
    assert page.row("command") == ["trainer resume=auto"]
    assert page.row("started") == ["2026 on here, start 2 of this run"]
    assert page.row("git revision") == ["abc with changes"]


def test_the_same_folder_gives_the_same_page(train, chats, pictures):
    run = train(f"task.path={chats}", "max_steps=2")
    before = (run / "report.html").read_text("utf-8")
    assert report.main([f"run={run}"]) == 0
    again = (run / "report.html").read_text("utf-8")
    identifiers = re.compile(r"base64,[\w+/=]+")  # matplotlib numbers its clip paths at random
    assert identifiers.sub("", again) == identifiers.sub("", before)


def test_the_verb_says_where_the_page_is(folder, tmp_path, capsys):
    folder([step(1)])
    (tmp_path / "report.html").unlink()
    assert report.main([f"run={tmp_path}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()


def test_the_verb_refuses_what_is_no_run(tmp_path, capsys):
    assert exit_code(report.main, [f"run={tmp_path}"]) == 2
    assert "is no run folder: it has no run.yaml" in capsys.readouterr().err
