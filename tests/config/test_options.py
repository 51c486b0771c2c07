"""Options of commands: words into a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from trainer import study
from trainer.config.options import option, parse, rest, values_of


@dataclass(frozen=True)
class Options:
    run: str = option("the run", value="FOLDER")
    n: int = option("a count", 3, at_least=1)
    share: float = option("a share", 0.5, above=0, at_most=1)
    compare: bool = option("both", False)
    rows: int | None = option("how many", None, value="N", at_least=1)
    strength: float | Literal["auto"] | None = option("how much", None, value="auto|NUMBER")
    kind: Literal["chain", "static"] = option("of what", "chain")
    source: str | None = option("where from", None, key="from", value="RUN")
    out: Path | None = option("where to", None, value="FILE", writes=True)
    overrides: tuple[str, ...] = rest("the rest", "task.KEY=VALUE", lambda key: "task." in key)

    def faults(self):
        if self.n > 8 and self.compare:
            yield "n and compare do not go together"


def read(*words):
    return parse(Options, list(words), "Do it.\n\n    graft do run=FOLDER\n", "graft do")


def test_the_words_become_values_of_their_types(tmp_path):
    options = read(
        "run=a=b", "n=4", "share=1", "compare=TRUE", "rows=7", "strength=2", "kind=static",
        "from=x y", f"out={tmp_path}/o.json", "task.path=a (1)", "~task.columns",
    )  # fmt: skip
    expected = Options(
        run="a=b", n=4, share=1.0, compare=True, rows=7, strength=2.0, kind="static",
        source="x y", out=tmp_path / "o.json", overrides=("task.path=a (1)", "~task.columns"),
    )  # fmt: skip
    assert options == expected
    assert type(options.share) is float
    assert values_of(options)["from"] == "x y"
    assert "overrides" not in values_of(options)


def test_defaults_and_null(tmp_path):
    assert read("run=null", "rows=null", "out=null", "from=null") == Options(run="null")
    assert read("run=a", "strength=auto").strength == "auto"
    assert read("run=a", "out=~/x").out == Path.home() / "x"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=a", "comapre=true"], "comapre=true: there is no such option. Did you mean compare?"),
        (["run=a", "zzz=1"], "zzz=1: there is no such option. Known: run, n, share, compare,"),
        (["run=a", "run"], "run: expected KEY=VALUE, in quotes if it has spaces"),
        (["n=4"], "missing: run=FOLDER"),
        ([], "missing: run=FOLDER"),
        (["run=a", "n=four"], "n=four: expected a whole number, at least 1"),
        (["run=a", "n=4.5"], "n=4.5: expected a whole number, at least 1"),
        (["run=a", "n=0"], "n=0: expected a whole number, at least 1"),
        (["run=a", "share=x"], "share=x: expected a number, above 0 and at most 1"),
        (["run=a", "share=0"], "share=0: expected a number, above 0 and at most 1"),
        (["run=a", "share=1.1"], "share=1.1: expected a number, above 0 and at most 1"),
        (["run=a", "share=nan"], "share=nan: expected a number"),
        (["run=a", "share=inf"], "share=inf: expected a number"),
        (["run=a", "compare=yes"], "compare=yes: expected true or false"),
        (["run=a", "rows=0"], "rows=0: expected a whole number, at least 1, or null"),
        (["run=a", "strength=x"], "strength=x: expected a number, or auto, or null"),
        (["run=a", "kind=sttic"], "expected one of chain, static. Did you mean static?"),
        (["run=a", "out=/no/where/x"], "out=/no/where/x: there is no folder /no/where"),
        (["run=a", "out=/"], "out=/: it is a folder, expected the name of a file"),
        (["run=a", "n=9", "compare=true"], "n and compare do not go together"),
    ],
)
def test_the_fault_is_last_after_one_line_of_advice(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        read(*words)
    first, *others = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert first == "graft do --help shows the options"
    assert len(others) == 1
    assert message in others[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("minuts=3", "minuts=3: there is no such option or setting. Did you mean minutes?"),
        ("paralel=2", "paralel=2: there is no such option or setting. Did you mean parallel?"),
    ],
)
def test_a_misspelt_option_is_no_setting(capsys, word, message):
    argv = ["file=methods", word]
    with pytest.raises(SystemExit):
        parse(study.Options, argv, study.__doc__, "graft study")
    assert message in capsys.readouterr().err


def test_settings_are_no_misspelt_options():
    words = ("max_steps=3", "runs=x", "adapter.rank=2", "seeds=1", "+tables=1")
    options = parse(study.Options, ["file=methods", *words], "", "graft study")
    assert options.overrides == words


def test_all_faults_are_said_at_once(capsys):
    with pytest.raises(SystemExit):
        read("n=0", "kind=x")
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_the_text_and_each_option(capsys, word):
    with pytest.raises(SystemExit) as end:
        read("n=0", word)
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert out.startswith("Do it.\n\n    graft do run=FOLDER\n\nOptions\n")
    for line in ("run=FOLDER", "n=3", "share=0.5", "compare=false", "from=RUN", "task.KEY=VALUE"):
        assert f"\n    {line} " in out
    assert "the run (required)" in out
    assert "of what (chain, static)" in out
