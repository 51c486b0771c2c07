"""Run a suite with the oldest and the newest version of each bounded package, in environments of
their own.

    python -m scripts.matrix [only=NAME,...] [suite=light|all] [tests=PATH,...] [list=true]
                             [folder=FOLDER] [out=FILE.md]

NAME is oldest, or a package with newest or pre, as transformers-newest and hydra-core-pre. An
environment changes one package, and what that needs; all others are those that run this script, so
torch is not installed again. torch itself is tried only where the index has a build for CPUs.

The light suite is tests/drafters, decoding, adapters, data, models and config without those that
train or start a process. The result is docs/developer/versions.md. Exit code 1: a suite fails.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers", "peft", "lightning", "datasets", "hydra-core", "torch")
LIGHT = tuple(
    f"tests/{name}" for name in ("drafters", "decoding", "adapters", "data", "models", "config")
)
SUITES = {"light": "not run and not slow and not gpu and not slurm", "all": "not slow and not gpu"}
SUMMARY = re.compile(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)


@dataclass(frozen=True)
class Environment:
    """A name, the requirements to install on top, and why it is left out, if it is."""

    name: str
    pins: tuple[str, ...]
    left_out: str = ""


@dataclass(frozen=True)
class Result:
    """The result of a suite in an environment."""

    environment: Environment
    outcome: str  # of pytest, or why it did not run
    passed: bool


def bounds() -> dict[str, Requirement]:
    """Return the requirements of pyproject.toml by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    parsed = [Requirement(text) for text in project["dependencies"]]
    return {requirement.name: requirement for requirement in parsed}


def oldest(requirement: Requirement) -> Version:
    """Return the lower bound of a requirement."""
    return max(Version(s.version) for s in requirement.specifier if s.operator == ">=")


def environments(available: dict[str, list[Version]]) -> Iterator[Environment]:
    """Yield the environments: the lower bounds, and for each package its newest release within the
    bound and its newest release candidate after that, where there is one."""
    required = bounds()
    pins = {name: oldest(required[name]) for name in PACKAGES}
    yield Environment("oldest", tuple(f"{name}=={version}" for name, version in pins.items()))
    for name in PACKAGES:
        within = [
            v for v in available[name] if v in required[name].specifier and not v.is_prerelease
        ]
        newest = max(within, default=pins[name])
        if newest != pins[name]:
            yield Environment(f"{name}-newest", (f"{name}=={newest}",), cuda_only(name, newest))
        candidates = [v for v in available[name] if v.is_prerelease and not v.is_devrelease]
        if (latest := max(candidates, default=newest)) > newest:
            yield Environment(f"{name}-pre", (f"{name}=={latest}",), cuda_only(name, latest))


def versions(name: str) -> list[Version]:
    """Return all versions of a package that the index has."""
    listing = _pip("index", "versions", "--pre", name).stdout
    line = re.search(r"^Available versions: (.*)$", listing, re.MULTILINE)
    return [Version(text) for text in line[1].split(", ")] if line else []


def cuda_only(name: str, version: Version) -> str:
    """Return why a version of torch is not installed: the index may have builds for CUDA alone."""
    if name != "torch" or version.local == "cpu":
        return ""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "-q"]
    report = _pip(*command, "--report", "-", f"torch=={version}").stdout
    requires = json.loads(report)["install"][0]["metadata"].get("requires_dist", [])
    needed = [text for text in requires if re.match(r"nvidia-|cuda-", text)]
    return f"the index has a CUDA build alone ({len(needed)} CUDA packages)" if needed else ""


def make(environment: Environment, folder: Path) -> Path:
    """Return the interpreter of a new environment with the pins, over this one's packages.

    Raises:
        RuntimeError: the pins cannot be installed together with the other packages.
    """
    place = folder / environment.name
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    changed = {Requirement(pin).name for pin in environment.pins} | {"omegaconf"}
    others = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0].lower() not in changed and not line.startswith("#")
    ]
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(others) + "\n")
    pre = ["--pre"] if environment.name.endswith("-pre") else []
    installed = _pip(
        "--python",
        str(python),
        "install",
        "-q",
        *pre,
        "-c",
        str(constraints),
        *environment.pins,
    )
    if installed.returncode:
        raise RuntimeError(installed.stderr.strip().splitlines()[-1])
    return python


def run(environment: Environment, folder: Path, suite: str, tests: list[str]) -> Result:
    """Run the suite in an environment that is made first."""
    if environment.left_out:
        return Result(environment, f"not run: {environment.left_out}", True)
    try:
        python = make(environment, folder)
    except RuntimeError as error:
        return Result(environment, f"cannot be installed: {error}", False)
    command = [str(python), "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", SUITES[suite], *tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    (folder / f"{environment.name}.log").write_text(done.stdout + done.stderr)
    counts = SUMMARY.findall(done.stdout)
    outcome = counts[-1] if counts else f"pytest ended with code {done.returncode}"
    return Result(environment, outcome, done.returncode == 0)


def page(results: list[Result], suite: str, tests: list[str]) -> str:
    """Return the results as a page."""
    rows = [f"| {r.environment.name} | {_shown(r.environment)} | {r.outcome} |" for r in results]
    return "\n".join(
        [
            "# Versions",
            "",
            "`make test-matrix` runs a suite with the oldest version of each bound in",
            "`pyproject.toml`, and with the newest one of each package alone. The bounds are no",
            "wider than what passed.",
            "",
            f"Suite {suite}: {', '.join(tests)}. Run on {datetime.date.today()}, Python"
            f" {sys.version.partition(' ')[0]}, CPU.",
            "",
            "| environment | versions | tests |",
            "|---|---|---|",
            *rows,
            "",
            "A package without a row has one version within its bound, which `oldest` has.",
            "",
        ]
    )


def _shown(environment: Environment) -> str:
    return environment.pins[0] if len(environment.pins) == 1 else "all lower bounds"


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    known = {"only", "suite", "tests", "list", "folder", "out"}
    if len(options) != len(argv) or options.keys() - known:
        print(__doc__)
        return 2
    suite = options.get("suite", "light")
    tests = options["tests"].split(",") if "tests" in options else list(LIGHT)
    folder = Path(options.get("folder", ROOT / ".matrix")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    every = list(environments({name: versions(name) for name in PACKAGES}))
    names = options["only"].split(",") if "only" in options else [e.name for e in every]
    if unknown := set(names) - {e.name for e in every}:
        print(f"{', '.join(sorted(unknown))}: no such environment. There are:", file=sys.stderr)
        print(", ".join(e.name for e in every), file=sys.stderr)
        return 2
    if options.get("list") == "true":
        for environment in every:
            print(environment.name, *environment.pins, environment.left_out)
        return 0
    results = []
    for environment in (e for e in every if e.name in names):
        results.append(run(environment, folder, suite, tests))
        print(environment.name, *environment.pins, "|", results[-1].outcome, flush=True)
    if "only" not in options or "out" in options:
        out = Path(options.get("out", ROOT / "docs" / "developer" / "versions.md"))
        out.write_text(page(results, suite, tests))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
