"""Several machines: two network namespaces with addresses of their own, and torchrun in each of
them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, sums, write_rows
from trainer.storage import journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HOSTS = {"graft-a": "10.213.77.1", "graft-b": "10.213.77.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    try:
        for name in HOSTS:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    try:
        ends = [f"veth-{name[-1]}" for name in HOSTS]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for (name, address), end in zip(HOSTS.items(), ends, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(HOSTS)
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun(
    host: str, number: int, folder: Path, *settings: str, processes: int = 1
) -> subprocess.Popen[str]:
    """One machine's part of a run."""
    command = [
        "ip",
        "netns",
        "exec",
        host,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--nproc-per-node={processes}",
        f"--node-rank={number}",
        "--master-addr=10.213.77.1",
        "--master-port=29777",
        "-m",
        "trainer",
        "+experiment=smoke",
        f"task.path={folder}/chats.jsonl",
        "precision=fp32",
        "lightning=cpu",
        f"lightning.devices={processes}",
        "lightning.num_nodes=2",
        "lightning.strategy=ddp",
        "lightning.timeout=3",
        *settings,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": f"veth-{host[-1]}",
        "OMP_NUM_THREADS": "1",
    }
    environment["GRAFT_CACHE"] = str(folder / f"cache-{number}")  # as on a machine's own disk
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def together(hosts: list[str], folder: Path, *settings: str) -> list[tuple[int, str]]:
    """(exit code, output) of both machines."""
    started = [torchrun(host, number, folder, *settings) for number, host in enumerate(hosts)]
    try:
        reported = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, reported, strict=True)]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]


def test_two_machines_are_one_run(hosts, tmp_path, program):
    write_rows(tmp_path / "chats.jsonl", sums(60))
    ended = together(
        hosts, tmp_path, "batch_size=4", "max_steps=4", "callbacks.checkpoints.every=2"
    )
    assert [code for code, _ in ended] == [0, 0], ended
    assert "run folder:" in ended[0][1]
    assert "run folder:" not in ended[1][1]  # the first process speaks for all
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["smoke"]
    common = [
        "+experiment=smoke",
        f"task.path={tmp_path}/chats.jsonl",
        "precision=fp32",
        "lightning=cpu",
    ]
    done = program(*common, "batch_size=8", "max_steps=4", "name=alone")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs/smoke") == pytest.approx(
        losses(tmp_path / "runs/alone"), rel=1e-5
    )
    ended = together(
        hosts, tmp_path, "batch_size=4", "max_steps=6", "schedule=constant", "resume=auto"
    )
    # another schedule: refused on both machines, and neither waits for the other
    assert all(code != 0 for code, _ in ended)
    assert "holds another run" in ended[0][1]


def test_processes_of_two_machines_are_not_guessed(program, tmp_path):
    write_rows(tmp_path / "chats.jsonl", sums(20))
    done = program(
        "+experiment=smoke",
        f"task.path={tmp_path}/chats.jsonl",
        "lightning=cpu",
        "lightning.num_nodes=2",
    )
    assert done.returncode == 2
    assert "torchrun or srun" in done.stdout + done.stderr
