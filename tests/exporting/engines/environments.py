"""Engines' own Python code in environments of its own, made once a user and never in the one that
the tests run in.

An environment takes torch from the running interpreter, and before it what was installed into it:
wheels without their dependencies, so that nothing brings another torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft-tests"
HERE = Path(__file__).parent

SPECULATORS = (
    "speculators==0.9.0",
    "hs-connectors==0.9.0",
    "loguru==0.7.3",
    "pydantic-settings==2.16.3",
    "openai==3.54.0",
    "jiter==0.19.0",
    "distro==1.9.0",
)
# vLLM 0.33 takes transformers from 5.16.1 to below 5.21.
VLLM = (
    "transformers==5.19.0",
    "cbor2==6.2.1",
    "pyzmq==27.3.0",
    "msgspec==0.22.0",
    "cachetools==8.0.1",
    "prometheus_client==0.26.0",
    "blake3==1.0.11",
    "py-cpuinfo==9.0.0",
    "openai-harmony==0.0.8",
    "pybase64==1.5.1",
    "cloudpickle==3.1.2",
    "uvloop==0.23.0",
    "xgrammar==0.2.8",
    "apache-tvm-ffi==0.1.15.post2",
    "fastapi==0.165.0",
    "starlette==1.10.0",
    "partial-json-parser==0.2.1.1.post7",
    "llguidance==1.9.1",
    "einops==0.8.2",
    "openai==3.54.0",
    "jiter==0.19.0",
    "distro==1.9.0",
)


def python(name: str, packages: tuple[str, ...], sources: str | None = None) -> Path:
    """The interpreter of an environment with these packages, and of the wheel `sources` what is
    written in Python only; the test is skipped where pip cannot bring them."""
    content = " ".join((*packages, sources or "", sys.version, torch.__version__, *_hosts()))
    place = CACHE / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{place.name}.lock"):  # of several test processes one makes it
        if not place.exists():
            _make(place, packages, sources)
    return place / "bin" / "python"


def _make(place: Path, packages: tuple[str, ...], sources: str | None) -> None:
    built = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=CACHE))
    try:
        venv.create(built, with_pip=False, symlinks=True)
        site = next(built.glob("lib/python*/site-packages"))
        (site / "host.pth").write_text("\n".join(_hosts()) + "\n")
        _pip("install", "--target", str(site), *packages)
        if sources is not None:
            _unpack(sources, built / "wheel", site)
        built.chmod(0o755)
        built.rename(place)
    finally:
        shutil.rmtree(built, ignore_errors=True)


def _hosts() -> list[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def _unpack(wheel: str, folder: Path, site: Path) -> None:
    _pip("download", "--dest", str(folder), wheel)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(site, [name for name in archive.namelist() if name.endswith(".py")])
    shutil.rmtree(folder)


def _pip(verb: str, *arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        verb,
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        *arguments,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip {verb} took longer than 20 minutes")
    if done.returncode:
        pytest.skip(
            f"pip {verb} failed:"
            f" {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no word from it'}"
        )


MODULES = {
    "vllm": ("by_vllm", "vllm.model_executor.models.llama_eagle3",
             "vllm.model_executor.models.qwen3_dflash"),
    "speculators": ("speculators", "speculators.models.dspark.core",
                    "speculators.models.peagle.core"),
}  # fmt: skip
SECONDS = 1500
_started: list[subprocess.Popen[str]] = []


@functools.cache  # one process for each environment: its imports are the longest part of a test
def _server(interpreter: Path) -> subprocess.Popen[str]:
    """A process that has imported an engine and runs jobs in forks, until this one ends."""
    engine = interpreter.parent.parent.name.partition("-")[0]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    process = subprocess.Popen(
        [str(interpreter), str(HERE / "forks.py"), *MODULES[engine]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"TOKENIZERS_PARALLELISM": "false"},
    )
    _started.append(process)
    return process


def end() -> None:
    """End the processes that `run` has started."""
    for process in _started:
        process.communicate()  # the end of its jobs ends it
    _started.clear()
    _server.cache_clear()


def run(interpreter: Path, script: str, *arguments: object, place: Path) -> str:
    """Standard output of a script of this folder, run in an environment."""
    server = _server(interpreter)
    log, out = place / "engine.log", place / "engine.out"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment |= {
        "VLLM_CACHE_ROOT": str(place),
        "VLLM_CONFIG_ROOT": str(place),
        "TOKENIZERS_PARALLELISM": "false",
    }
    job = {
        "words": [str(HERE / script), *map(str, arguments)],
        "environment": environment,
        "place": str(place),
        "log": str(log),
        "out": str(out),
    }
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], SECONDS)
    assert ready, f"{script} took longer than {SECONDS} s"
    code = server.stdout.readline().strip()
    assert code == "0", log.read_text()[-4000:] if log.exists() else f"the engine ended: {code!r}"
    return out.read_text()
