"""The command for machines with a GPU, as far as a machine without one can run it."""

from __future__ import annotations

import json
import math
import sys
import time

import psutil
import pytest

from scripts.gpu import __main__ as gpu
from scripts.gpu import measure

QUICK = measure.DEFAULTS | {"shape": "tiny", "device": "cpu", "seconds": 0, "length": 64}


def side(speed, loss=6.2):
    return {"tokens_per_s": speed, "peak_gb": 2.0, "first_loss": loss, "steps": 5}


def test_what_a_failing_part_says_is_kept(tmp_path):
    words = [sys.executable, "-c", "import sys; print('no device'); sys.exit(3)"]
    result = gpu.run("broken", words, 30, tmp_path)
    assert result["state"] == "failed with exit code 3"
    assert result["last_lines"] == ["no device"]
    assert (tmp_path / "broken.log").read_text() == "no device\n"


@pytest.mark.long
def test_a_part_that_takes_too_long_is_stopped_with_what_it_has(tmp_path):
    file = tmp_path / "slow.json"
    text = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(file)!r}).write_text('{{\"a\": 1}}')\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    result = gpu.run("slow", [sys.executable, "-c", text], 3, tmp_path)
    assert time.monotonic() - began < 20
    assert result["state"] == "stopped after 3 s"
    assert result["measured"] == {"a": 1}
    child = int(result["last_lines"][0])
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            return
        time.sleep(0.05)
    pytest.fail("its child is still running")


def test_the_table_has_ratios_and_problems():
    measured = {
        "about": "H100",
        "peer": "HF + PEFT",
        "sides": {"ours": side(3000.0), "HF + PEFT": side(2000.0)},
        "problems": {},
    }
    broken = {**measured, "sides": {"ours": side(1000.0)}, "problems": {"HF + PEFT": "no memory"}}
    results = [
        {"part": "tests", "state": "done", "last_lines": [], "measured": None},
        {"part": "lora", "state": "done", "last_lines": [], "measured": measured},
        {"part": "rosa", "state": "failed", "last_lines": ["why"], "measured": broken},
    ]
    decoded = {"tokens_per_s": 90.0, "peak_gb": None, "first_loss": None, "steps": 7}
    decoded |= {"peer": "plain"}
    sides = {"ours": side(10.0), "drafted": decoded, "plain": decoded | {"tokens_per_s": 60.0}}
    both = {"part": "head", "state": "done", "last_lines": [],
            "measured": measured | {"peer": "gone", "sides": sides}}  # fmt: skip
    assert "| head | drafted | 90 | 1.50 |  |  |  | 7 |" in gpu.table([both])
    assert "| head | ours | 10 |  | 2.00 |  | 6.2000 | 5 |" in gpu.table([both])
    text = gpu.table(results)
    assert "| lora | ours | 3000 | 1.50 | 2.00 | 1.00 | 6.2000 | 5 |" in text
    assert "| rosa | ours | 1000 |  | 2.00 |  | 6.2000 | 5 |" in text
    assert "| rosa | HF + PEFT: no memory |" in text
    assert "rosa: failed\n\n```text\nwhy\n```" in text
    assert gpu.table(results[:1]).startswith("nothing was measured")


def test_parts_run_one_after_the_other_within_the_time(tmp_path, monkeypatch, capsys):
    limits = {}

    def run(name, words, limit, out):
        limits[name] = limit
        return {
            "part": name,
            "state": "done" if name != "lora_1b_packed" else "failed",
            "seconds": 0.0,
            "command": words,
            "last_lines": [],
            "measured": None,
        }

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main([f"out={tmp_path}", "device=cpu"]) == 1  # one has failed, all have run
    assert list(limits) == ["tests", *gpu.PARTS]
    assert all(0 < limit <= 470 for limit in limits.values())
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["part"] for result in results] == list(limits)
    assert "shape=tiny" in results[1]["command"]
    assert "--collect-only" in results[0]["command"]  # no test runs without its device
    assert "--collect-only" not in gpu.command("tests", "python", "cuda", 9, tmp_path)
    assert gpu.main(["wheel=x"]) == gpu.main(["parts=lora"]) == 2
    assert "no option wheel" in (said := capsys.readouterr().err)
    assert "no part lora; parts: tests, lora_8b_packed" in said


def test_torchs_own_wheels_stay_those_of_the_machine(tmp_path, monkeypatch):
    for name in ("torch-2.13.0-x.whl", "nvidia_nccl-1-x.whl", "peft-0.21.2-x.whl"):
        (tmp_path / name).touch()
    scripts = []
    monkeypatch.setattr(gpu, "run", lambda name, words, *_: scripts.append(words[-1]))
    gpu.install(tmp_path, tmp_path)
    (script,) = scripts
    assert "peft-0.21.2" in script
    assert "torch-2.13.0" not in script
    assert "nvidia_nccl" not in script


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "packed"), [("lora", True), ("lora", False), ("qlora", True), ("rosa", True)]
)
def test_both_sides_start_from_the_same_loss(method, packed):
    options = QUICK | {"method": method, "packed": packed}
    batch = measure.batch_of(options, 512)
    numbers = {
        maker.__name__: measure.measured(maker(options), batch, options)
        for maker in (measure.ours, measure.with_peft)
    }
    first = [number["first_loss"] for number in numbers.values()]
    assert first[0] == pytest.approx(first[1], rel=5e-3)  # bf16
    assert first[0] == pytest.approx(math.log(512), rel=0.1)
    for number in numbers.values():
        assert number["steps"] >= 2
        assert number["losses"][-1] < number["first_loss"]


@pytest.mark.long
def test_each_part_starts_with_the_options_that_it_is_given(monkeypatch, tmp_path):
    """A dry run of every part as far as its two sides: models, adapters and a batch are made."""
    sides: dict[str, list[str]] = {}
    for name in gpu.PARTS:
        words = gpu.command(name, "python", "cpu", 60, tmp_path)[3:]
        monkeypatch.setattr("sys.argv", ["measure", *words])
        options = measure.parse(measure.DEFAULTS, None)
        assert options["shape"] == "tiny"
        assert options["seconds"] == 1
        options["length"] = 64
        if options["method"] == "eagle3":
            sides[name] = list(measure.eagle3(options))
            continue
        sides[name] = list(measure.trained(options))
        batch = measure.batch_of(options, 512)
        for maker in (measure.ours, measure.with_peft):
            trained, loss_of = maker(options)
            assert trained
            assert loss_of(batch).isfinite()
    assert {len(names) for names in sides.values()} == {2, 4}


def test_files_with_tests_for_a_gpu_are_the_only_ones_collected():
    files = gpu.gpu_tests()
    assert {"tests/speed/test_varlen.py", "tests/training/test_late.py"} <= set(files)
    assert "tests/test_pins.py" not in files
    assert set(files) <= set(gpu.command("tests", "python", "cuda", 9, gpu.ROOT))


def test_results_are_strict_json(tmp_path):
    """Other tools read them, and JSON has no NaN."""
    options = QUICK | {"method": "eagle3"}
    sides = measure.eagle3(options)
    json.dumps(sides["decoding without a draft"](), allow_nan=False)


@pytest.mark.long
def test_a_head_is_distilled_and_decodes(tmp_path):
    options = QUICK | {"method": "eagle3", "profile": str(tmp_path / "profile.txt")}
    sides = measure.eagle3(options)
    numbers = {name: run() for name, run in sides.items()}
    assert numbers["ours"]["first_loss"] == pytest.approx(
        numbers["all logits"]["first_loss"], rel=5e-3
    )
    assert all(number["tokens_per_s"] > 0 for number in numbers.values())
    assert "aten::" in (tmp_path / "profile.txt").read_text()
