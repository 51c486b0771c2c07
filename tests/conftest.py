"""Fixtures of all tests: a tiny base, a small chat file, and the program, in this process or in a
new one. Tests that need no torch do not wait for it: nothing here imports it before a fixture does.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One thread a process, set before torch reads it: OpenMP's spinning threads of several processes on
# few cores make steps many times slower.
# GRAFT_TEST_THREADS=2 imitates a machine with more cores, which adds in other orders.
os.environ["OMP_NUM_THREADS"] = os.environ.get("GRAFT_TEST_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)

import pytest
from omegaconf import DictConfig

from tests import marks, quick, spreading

ROOT = Path(__file__).resolve().parent.parent
THREADS = int(os.environ["OMP_NUM_THREADS"])


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Mark the tests that train, decode or start a process, which `make check` leaves out, and put
    the longest files first where several processes share them."""
    for item in items:
        if marks.runs(item):
            item.add_marker(pytest.mark.run)
    config.stash[marks.LIGHT] = marks.light_tests(items)
    yield  # here pytest leaves out what -m does not select
    if hasattr(config, "workerinput"):
        items[:] = spreading.longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give out whole files, the longest first."""
    return spreading.scheduler(config, log)


def pytest_collection() -> None:
    """Collect without garbage collections: imports create millions of objects, and all stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what the imports have created."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this session's own, so that no test depends on what the user's holds."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["GRAFT_CACHE"] = str(folder)
    quick.install()
    return folder


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> None:
    """Configs of conf/ are composed quickly, as tests.composing says."""
    from tests import composing

    composing.install()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same random numbers, whatever ran before it in its process."""
    quick.between_tests()
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True)
def no_closed_logs() -> None:
    """Without handlers that a test before has left with a stream of its own, now closed: they would
    tell of it in this one."""
    for name in (None, "trainer", "adapters", "tasks"):
        logger = logging.getLogger(name)
        for handler in [
            h for h in logger.handlers if getattr(getattr(h, "stream", None), "closed", False)
        ]:
            logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Any:
    """conf/base/tiny.yaml's base."""
    from trainer.models import tiny as tiny_module

    return tiny_module.tiny(0, 2, 16, 512, "auto", "sdpa", "none", True, [])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats that add two numbers."""
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(count)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}="},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a, b in pairs
    ]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that every hostile payload would create."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 6 + "cafe")
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Sixty short chats."""
    return write_rows(tmp_path / "chats.jsonl", sums(60))


def composed(*overrides: str) -> DictConfig:
    """Compose and check a config, as the program does, with Hydra's node."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from trainer.config.compose import install, rewrite

    install()
    with initialize_config_dir(
        config_dir=str(ROOT / "conf"), version_base="1.3", job_name="trainer"
    ):
        return hydra_compose("config", overrides=rewrite(list(overrides)), return_hydra_config=True)


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """`composed`, for tests."""
    return composed


@pytest.fixture
def pictures() -> Iterator[None]:
    """Reports of runs have their pictures. Drawing them takes as long as the rest of a short run:
    other tests leave them out."""
    drawn.append(True)
    yield
    drawn.pop()


drawn: list[bool] = []  # not empty: reports of runs have their pictures


@contextlib.contextmanager
def plain_reports() -> Iterator[None]:
    """Reports and model cards without pictures."""
    from trainer.exporting import card
    from trainer.session import report_html

    draw, curves = report_html._plots, card._curves
    if not drawn:
        report_html._plots = lambda rows: []
        card._curves = lambda source: []
    try:
        yield
    finally:
        report_html._plots, card._curves = draw, curves


@pytest.fixture(scope="session")
def train_in() -> Callable[..., Path]:
    """Run the program in this process on the smoke experiment, with run folders in a given folder;
    returns the new one. Fixtures of a module share a run with it."""

    def trained(folder: Path, *overrides: str) -> Path:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf, open_dict

        from trainer.cluster.signals import Signals
        from trainer.run import run

        cfg = composed(
            "+experiment=smoke",
            f"runs={folder / 'runs'}",
            "precision=fp32",
            f"threads={THREADS}",
            *overrides,
        )
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
        HydraConfig.instance().set_config(cfg)
        job = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        with Signals() as signals, plain_reports():
            run(job, signals)
        return Path(cfg.hydra.runtime.output_dir)

    return trained


@pytest.fixture
def train(train_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Run the program in this process on the smoke experiment; returns the run folder."""
    return functools.partial(train_in, tmp_path)


@pytest.fixture(scope="session")
def warm_python(warm_socket: str) -> str:
    """What sys.executable is where processes of Graft's modules are to have the imports already,
    also those that they start."""
    from tests import warm

    return warm.python(warm_socket)


@pytest.fixture(scope="session")
def warm_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a process waits that runs commands with everything imported; see tests.warm."""
    place = str(tmp_path_factory.mktemp("warm") / "socket")
    command = [sys.executable, "-m", "tests.warm", place]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        while not os.path.exists(place):
            assert server.poll() is None, "it has ended"
            time.sleep(0.1)
        yield place
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with a command that does not end
        server.wait()


@pytest.fixture
def warm_program(
    tmp_path: Path, warm_python: str
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `graft ...`, or with `module` `python -m ...`, in a process that has the imports already,
    as those have that `python -m` starts."""

    def ran(*words: str, module: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        command = [warm_python, *(["-m", module] if module else ["graft"]), *words]
        environment = os.environ | options.pop("env", {})
        options = {"timeout": 300} | options
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, **options
        )

    return ran


@pytest.fixture
def worker_processes() -> int:
    """How many processes a test starts to tokenise rows; tests.marks knows it by this."""
    return 2


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m trainer[.VERB] ...` as a user would, in a process of its own."""

    def ran(*arguments: str, verb: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trainer" + (f".{verb}" if verb else ""), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
        options = {"timeout": 300} | options
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, **options
        )

    return ran
