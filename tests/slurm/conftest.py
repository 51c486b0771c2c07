"""The cluster, and scenarios that run in it at the same time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, sums, write_rows
from tests.slurm.cluster import PROGRAMS, Cluster, actual, wait

STEPS = 40
AT_ONCE = 4  # scenarios


def missing() -> str | None:
    """Why there can be no cluster here."""
    names = [name for name in PROGRAMS if actual(name) is None]
    if names:
        packages = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
        return (
            f"{', '.join(names)} not found. On Debian: apt-get install --no-install-recommends"
            f" {packages}"
        )
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        if os.environ.get("GRAFT_REQUIRE_SLURM") == "1":
            pytest.fail(f"GRAFT_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Lab:
    """A folder from which runs are submitted, and what became of them."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        write_rows(folder / "rows.jsonl", sums(60))
        (folder / "site").mkdir()
        shutil.copy(ROOT / "tests/slurm/slowed.py", folder / "site/sitecustomize.py")
        before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (folder / "site", ROOT, *before)))
        }
        self.said: dict[str, str] = {}  # what trainer.submit has printed, by job

    def submit(self, *overrides: str, pause: float = 0, partition: str = "usual") -> str:
        """The number of a job that trains STEPS steps, each taking `pause` seconds more."""
        command = [
            sys.executable,
            "-m",
            "trainer.submit",
            "+experiment=smoke",
            "task.path=rows.jsonl",
            "lightning=cpu",
            f"max_steps={STEPS}",
            "precision=fp32",
            "threads=1",
            "callbacks.checkpoints.every=5",
            f"slurm.partition={partition}",
            "slurm.cpus_per_task=1",
            f"slurm.setup=[export MASTER_ADDR=127.0.0.1, export PAUSE={pause}]",
            *overrides,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=self.environment
        )
        assert done.returncode == 0, done.stderr
        job = re.match(r"job (\d+)\n", done.stdout).group(1)
        self.said[job] = done.stdout
        return job

    def run(self, job: str) -> Path:
        """The folder of a job's run, a task of an array given as JOB-TASK."""
        return self.folder / "runs" / f"smoke-{job}"

    def log(self, job: str) -> str:
        file = self.folder / "runs/slurm" / f"smoke-{job}.log"
        return file.read_text() if file.exists() else ""

    def step(self, job: str) -> int:
        """The last step that a run has logged."""
        return step_of(self.run(job))

    def reached(self, job: str, step: int, timeout: float = 300) -> None:
        """Wait for a step of a run."""
        wait(
            lambda: self.step(job) >= step,
            timeout,
            lambda: (
                f"job {job} is at step {self.step(job)}:"
                f" {self.cluster.job(job)}\n{self.log(job)[-3000:]}"
            ),
        )

    def result(self, job: str) -> str:
        """The digest of the adapter that a run has left, or why there is none."""
        file = self.run(job) / "adapter/adapter_model.safetensors"
        return (
            sha256(file.read_bytes()).hexdigest()
            if file.exists()
            else f"no adapter\n{self.log(job)[-3000:]}"
        )

    def ended(self, job: str) -> dict[str, Any]:
        """What SLURM and the run say when all is over."""
        actual = self.cluster.ended(job)
        return {
            "state": actual["JobState"],
            "restarts": int(actual["Restarts"]),
            "exit": actual["ExitCode"],
            "job": job,
        }


def step_of(run: Path) -> int:
    """The last step that a run has logged."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max((row["step"] for row in rows if row["kind"] == "step"), default=0)


@pytest.fixture(scope="session")
def lab(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(cluster, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def outcome(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """What a scenario came to. Those that the chosen tests name begin with the first of them, a few
    at a time."""
    from tests.slurm import scenarios

    chosen = {
        item.callspec.params["scenario"]
        for item in request.session.items
        if "outcome" in getattr(item, "fixturenames", ())
    }
    names = [name for name in scenarios.ORDER if name in {*chosen, "alone"}]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        going = {name: pool.submit(getattr(scenarios, name), lab) for name in names}
        yield lambda name: going[name].result()
        pool.shutdown(wait=False, cancel_futures=True)
