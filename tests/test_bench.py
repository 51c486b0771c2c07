"""What scripts/bench/train.py makes of its arguments and of its contestants' results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import train
from scripts.bench.peers import contestants, measuring, runs, table, work
from tests.conftest import ROOT
from trainer.models import flops


def run(
    name,
    seconds,
    memory,
    losses=(3.0, 2.0, 1.0),
    processed=(10, 20, 30),
    supervised=(1, 2, 3),
    first=8.0,
):
    """A contestant's result of three steps."""
    return {
        "name": name,
        "seconds": list(seconds),
        "losses": list(losses),
        "processed": list(processed),
        "supervised": list(supervised),
        "peak_rss": memory,
        "peak_gpu": 7e6,
        "gpu": None,
        "threads": 2,
        "first": first,
        "versions": {"torch": "2.13.0"},
    }


def options(*arguments):
    return contestants.parsed(["steps=3", "warm=1", *arguments])


RESULTS = {
    "ours": [run("ours", [1.0, 1.0], 100e6, first=4.0), run("ours", [2.0, 2.0], 120e6, first=6.0)],
    "ours_packed": [run("ours_packed", [0.5, 0.5], 80e6, supervised=(4, 4, 4), first=4.0)],
    "bare": [],
    "hf": [run("hf", [3.0, 2.0], 200e6, losses=(3.0, 2.25, 1.0)), run("hf", [3.0, 5.0], 200e6)],
}


def test_options():
    assert options("data=packed")["length"] == 256
    assert options("lr=1e-3", "threads=2")["lr"] == 1e-3
    big = options("shape=8b", "device=cuda", "batch_size=4")
    assert (big["data"], big["batch_size"], big["length"]) == ("packed", 4, 2048)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("speed=3", "no option speed"),
        ("precision=fp16", "precision=fp16: it is one of auto, fp32, bf16"),
        ("warm=3", "warm=3"),
        ("contestants=[ours,axolotl]", "no contestant axolotl"),
        ("variants.fast=[hf,optimizer.lr=1]", "variants.fast: optimizer.lr=1"),
    ],
)
def test_wrong_options(argument, text):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        options(argument)


def test_contestants():
    actual = contestants.contestants(
        options(
            "variants.a=[compile=true]",
            "variants.b=[hf,autocast=true]",
            "variants.c=[ours_packed,x=1]",
        )
    )
    assert actual["a"] == ("ours", ["compile=true"])
    assert actual["b"] == ("hf", ["autocast=true"])
    assert actual["c"] == ("ours_packed", ["x=1"])
    assert "ours_packed" not in contestants.contestants(options("data=packed"))


def test_the_strongest_peer_leads(monkeypatch, tmp_path):
    """It has bf16 adapters and our setting of malloc, which the plain one has not."""
    from trainer.speed import malloc

    actual = contestants.contestants(options())
    assert list(actual)[:2] == ["ours", "hf_strongest"]
    assert set(malloc.USER_SETTINGS) > set(contestants.ALLOCATOR)
    environments, specs = [], []

    def waited(command, env):
        environments.append(env)
        specs.append(json.loads(Path(command[-2]).read_text()))
        Path(command[-1]).write_text(json.dumps({"ends": [2.0, 3.0]}))
        return 1.0, None

    monkeypatch.setattr(runs, "waited", waited)
    (tmp_path / "rows.json").write_text("[]")
    for name in ("hf_strongest", "hf"):
        kind, settings = actual[name]
        runs.run_peer(options("envs=here"), {"rows": str(tmp_path / "rows.json")}, kind, settings)
    assert [spec["adapter_dtype"] for spec in specs] == ["bfloat16", "float32"]
    assert environments[0].items() > contestants.ALLOCATOR.items()
    assert not (set(environments[1]) - set(os.environ)) & set(contestants.ALLOCATOR)


def test_the_figures_can_be_posted():
    made = table.figures(options(), RESULTS, "a machine")
    assert json.loads(json.dumps(made)) == made
    assert list(made["contestants"]) == ["ours", "ours_packed", "hf"]
    assert made["ours over"] == {"hf": table.ratios(made["contestants"], "ours", "hf")}


def test_a_result_is_of_its_settings():
    def keys(*arguments):
        made = options(*arguments)
        return [train.result_key(made, kind, []) for kind in ("ours", "hf")]

    plain = keys()
    assert keys("rounds=9", "out=elsewhere", "warm=2") == plain
    extra = keys("extra=[x=1]")
    assert (extra[0] != plain[0], extra[1] != plain[1]) == (True, False)
    for argument in ("seed=1", "adapter_dtype=bfloat16", "batch_size=3"):
        assert not set(keys(argument)) & set(plain)


def test_each_round_begins_with_another_one():
    assert train.turns(["a", "b"], 3) == [
        (0, "a"),
        (0, "b"),
        (1, "b"),
        (1, "a"),
        (2, "a"),
        (2, "b"),
    ]


def test_packing_keeps_the_tokens_of_a_step():
    assert "batch_size=2" in runs.packed({"batch_size": 8, "mean_length": 260.0}, 1024)
    assert "batch_size=1" in runs.packed({"batch_size": 2, "mean_length": 100.0}, 1024)


def test_a_row_predicts_from_its_second_token_on():
    assert work.labelled([5, 6, 7], [True, False, True]) == {
        "input_ids": [5, 6, 7],
        "labels": [-100, -100, 7],
    }


def test_padding():
    rows = [{"input_ids": [1] * 9, "labels": [1] * 9}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    made = measuring.padded(rows, 0)
    assert {len(row) for rows in made.values() for row in rows} == {16}
    assert made["input_ids"][1] == [1, 2] + [0] * 14
    assert made["labels"][1] == [-100, 2] + [-100] * 14
    assert made["attention_mask"][0] == [1] * 9 + [0] * 7
    assert "attention_mask" not in measuring.padded([{"input_ids": [1] * 8, "labels": [1] * 8}], 0)


def test_the_warm_steps_are_counted():
    actual = table.summary(RESULTS["hf"], 1, cuda=False)
    assert actual["step"] == [2.5, 4.0]
    assert actual["processed"] == [50 / 5, 50 / 8]
    assert actual["supervised"] == [1.0, 5 / 8]
    assert actual["memory"] == [200.0, 200.0]
    assert table.summary(RESULTS["hf"], 2, cuda=True)["step"] == [2.0, 5.0]
    assert table.summary(RESULTS["hf"], 2, cuda=True)["memory"] == [7.0, 7.0]


def test_curves_are_compared_where_the_batches_are_the_same():
    ours = RESULTS["ours"][0]
    assert table.difference(RESULTS["hf"][0], ours) == 0.25
    assert table.difference(RESULTS["ours_packed"][0], ours) is None
    assert table.difference(ours, None) is None


def test_the_table():
    text = table.table(
        options("contestants=[ours,ours_packed,bare,hf]"),
        RESULTS,
        {"bare": "no such package"},
        "about",
        {"flop": [1e12, 2e12, 3e12], "peak": 5e12},
    )
    lines = {
        line.split(" |")[0].strip("| "): line
        for line in text.splitlines()[:8]
        if line.startswith("|")
    }
    assert text.startswith("about\n")
    numbers = (
        "1.500 (1.000-2.000) | 18.8 (12.5-25.0) | 1.9 (1.2-2.5) | 110 (100-120) | 5.00 (4.00-6.00)"
        " | 1.0000 | 0.0e+00 | 1.875 (1.250-2.500) | 37.5% (25.0%-50.0%) | 2"
    )
    assert lines["ours"] == f"| ours | {numbers} |"
    assert lines["ours_packed"].endswith("| other batches |  |  | 1 |")
    assert "skipped: no such package" in lines["bare"]
    # Over hf in the two rounds: 2.5 and 2 times the speed, 0.5 and 0.6 of the memory, 0.5 and 0.75
    # of the time to the first step.
    assert "\n| hf | 2.25x, 0.55x, 0.62x | " in text
    pairs = table.ratios(
        {name: table.summary(runs, 1, False) for name, runs in RESULTS.items() if runs},
        "ours",
        "hf",
    )
    assert pairs == pytest.approx({"speed": 2.25, "memory": 0.55, "start": 0.625})


def test_what_the_plot_shows():
    panels = table.bars(options("contestants=[ours,bare,hf]"), RESULTS)
    assert panels["peak memory, MB"] == (["ours", "hf"], [[100.0, 120.0], [200.0, 200.0]])
    assert panels["seconds to the first step"][1][0] == [4.0, 6.0]


def test_what_was_measured_is_told(tmp_path):
    rows = [
        [
            {"input_ids": [1] * 9, "labels": [-100] * 7 + [1, 1]},
            {"input_ids": [1, 2], "labels": [-100, 2]},
        ]
    ] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = {"rows": str(tmp_path / "rows.json"), "precision": "bf16-true", "dtype": "bfloat16"}
    text = table.described(options(), spec, RESULTS, "the command")
    assert "FLOP" not in text
    known = spec | {"flop": [1.0], "peak": 2e11, "peak_source": "measured"}
    assert "The peak is 0.2 TFLOP/s, measured." in table.described(options(), known, RESULTS, "")
    counts = flops.Counts(10.0, 1.0, 7.0, False, ((3, None),))
    assert work.flop(counts, rows[0]) == 46 * 11 + 28 * 3 + 12 * 3 * (45 + 3)
    assert "2 rows, 32 positions, 11 of them tokens, 3 of these supervised" in text
    assert "torch 2.13.0" in text
    assert "adapters in float32 (LitGPT: bfloat16)" in text


@pytest.mark.long
def test_our_program_goes_on_after_its_run(tmp_path):
    """`main` of the program ends the process: a contestant writes its result afterwards."""
    result, words = tmp_path / "result.json", ["--cfg", "job", "task=sft", "task.path=x"]
    script = ROOT / "scripts/bench/peers/ours.py"
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(script), str(result), *words], env=environment, check=True,
        capture_output=True,
    )  # fmt: skip
    assert json.loads(result.read_text())["peak_rss"] > 0


def test_no_script_ends_with_the_program():
    for path in (ROOT / "scripts").rglob("*.py"):
        assert "__main__ import main" not in path.read_text("utf-8"), path
