"""Runs as jobs of a real SLURM: whatever happens to one, it ends with the bits of the run that
nobody disturbed."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests.slurm.conftest import STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("scenario", ["alone"])
def test_a_run_is_submitted_and_ends(lab, outcome, scenario):
    actual = outcome(scenario)
    assert (actual["state"], actual["restarts"], actual["exit"]) == ("COMPLETED", 0, "0:0"), (
        lab.log(actual["job"])
    )
    assert lab.step(actual["job"]) == STEPS
    for asked in (
        "TresPerNode=gres:gpu:1",
        "MinMemoryNode=500M",
        "Comment=some words",
        "NumNodes=1",
        "JobName=smoke",
    ):
        assert asked in actual["record"]
    said = lab.said[actual["job"]]
    assert f"runs/smoke-{actual['job']}\n" in said
    assert f"scancel {actual['job']}" in said


@pytest.mark.parametrize(
    "scenario", ["time_limit", "preempted", "interrupted_three_times", "node_crash", "queued_again"]
)
def test_a_run_goes_on_and_ends_with_the_same_bits(lab, outcome, scenario):
    actual, reference = outcome(scenario), outcome("alone")
    job = actual["job"]
    assert (actual["state"], actual["exit"]) == ("COMPLETED", "0:0"), lab.log(job)
    assert actual["restarts"] >= 1
    assert lab.step(job) == STEPS
    assert lab.result(job) == lab.result(reference["job"])


@pytest.mark.parametrize("scenario", ["time_limit", "preempted", "interrupted_three_times"])
def test_a_signal_costs_no_step(lab, outcome, scenario):
    job = outcome(scenario)["job"]
    saved = [int(step) for step in re.findall(r"saved after step (\d+) of", lab.log(job))]
    assert len(saved) >= (3 if scenario == "interrupted_three_times" else 1)
    assert {int(step) for step in re.findall(r"resuming after step (\d+) of", lab.log(job))} == set(
        saved
    )
    # A time limit may end in the last evaluation, after all steps.
    assert all(0 < step <= STEPS for step in saved)


@pytest.mark.parametrize("scenario", ["preempted"])
def test_a_run_that_gives_way_is_never_taken_for_done(lab, outcome, scenario):
    actual = outcome(scenario)
    assert "PENDING" in actual["states"]
    assert not {"COMPLETED", "FAILED", "CANCELLED"} & set(actual["states"]), lab.log(actual["job"])


@pytest.mark.parametrize("scenario", ["node_crash"])
def test_a_crash_costs_what_came_after_the_last_checkpoint(lab, outcome, scenario):
    job = outcome(scenario)["job"]
    (step,) = re.findall(r"resuming after step (\d+) of", lab.log(job))
    assert int(step) in (10, 15, 20)


@pytest.mark.parametrize("scenario", ["cancelled"])
def test_a_cancelled_run_is_saved_and_does_not_come_back(lab, outcome, scenario):
    actual = outcome(scenario)
    log = lab.log(actual["job"])
    assert (actual["state"], actual["restarts"]) == ("CANCELLED", 0), log
    assert "saved after step" in log
    assert log.count("run folder:") == 1
    assert lab.cluster.ask("squeue", "-h", "--job", actual["job"]) == ""


@pytest.mark.parametrize("scenario", ["two_nodes"])
def test_two_nodes_are_one_run(lab, outcome, scenario):
    actual = outcome(scenario)
    job = actual["job"]
    assert (actual["state"], actual["exit"]) == ("COMPLETED", "0:0"), lab.log(job)
    assert actual["restarts"] >= 1
    assert lab.step(job) == STEPS
    assert f"resuming after step {actual['at']} of {STEPS}" in lab.log(job)
    rows = [json.loads(line) for line in (lab.run(job) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == sorted(
        {row["step"] for row in rows if row["kind"] == "step"}
    )
    assert list(lab.run(job).parent.glob(f"smoke-{job}-*")) == []


@pytest.mark.parametrize("scenario", ["array"])
def test_an_array_is_a_run_for_each_combination(lab, outcome, scenario):
    actual = outcome(scenario)
    job = actual["job"]
    assert actual["states"] == ["COMPLETED"] * 3, "\n".join(
        lab.log(f"{job}-{task}") for task in range(3)
    )
    assert actual["most"] == 2
    results = [lab.result(f"{job}-{task}") for task in range(3)]
    assert len(set(results)) == 3
    assert results[0] == lab.result(outcome("alone")["job"])  # seed=0 is the default


@pytest.mark.parametrize("scenario", ["other_tasks"])
def test_tasks_that_are_not_the_runs_processes_are_refused(lab, outcome, scenario):
    actual = outcome(scenario)
    assert (actual["state"], actual["exit"]) == ("FAILED", "2:0")
    log = lab.log(actual["job"])
    assert (
        "are 1 processes, and srun has started 2. Start as many: --nodes=1 --ntasks-per-node=1"
        in log
    )
    assert not (lab.run(actual["job"]) / "run.yaml").exists()


@pytest.mark.parametrize("scenario", ["mistaken"])
def test_a_mistake_that_all_processes_find_is_not_queued_again(lab, outcome, scenario):
    actual = outcome(scenario)
    log = lab.log(actual["job"])
    assert (actual["state"], actual["exit"], actual["restarts"]) == ("FAILED", "2:0", 0), log
    assert "nowhere" in log


@pytest.mark.parametrize("scenario", ["launcher"])
def test_the_launchers_runs_are_saved_at_its_signal_and_go_on(lab, outcome, scenario):
    if os.environ.get("GRAFT_REQUIRE_SLURM") != "1":
        pytest.importorskip("submitit")
    actual = outcome(scenario)
    assert actual["code"] == 0, actual["said"]
    for task in (0, 1):
        log = actual["logs"][task]
        assert "SIGUSR2: saved after step" in log, log
        assert f"of {STEPS}" in log
        assert "resuming after step" in log, log
    assert actual["results"][0] == lab.result(outcome("alone")["job"])
    assert len(set(actual["results"])) == 2
