"""The tested versions and the oldest allowed ones are not below those that fix known weaknesses."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

FLOORS = {
    "lightning": ("2.6.6", "CVE-2026-58659"),
    "pytorch-lightning": ("2.6.6", "CVE-2026-58659"),
    "transformers": ("5.10.0", "CVE-2026-9856, CVE-2026-5241, CVE-2026-4372, CVE-2026-1839"),
    "torch": ("2.10.1", "CVE-2026-24747, PYSEC-2026-139"),
    "datasets": ("5.0.1", "PYSEC-2026-3716"),
    "wandb": ("0.29.0", "CVE-2026-91771"),
    "hydra-core": ("1.3.6", "GHSA-37p2"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "filelock": ("3.20.3", "CVE-2025-68146, CVE-2026-22701"),
    "sentencepiece": ("0.2.1", "CVE-2026-1260"),
}
NEVER = {
    "lightning": ("2.6.2", "2.6.3"),
    "pytorch-lightning": ("2.6.2", "2.6.3"),
}  # malware: CVE-2026-44484, GHSA-w37p-236h-pfx3

LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {
    name.lower().replace("_", "-"): version
    for name, _, version in (line.partition("==") for line in LINES)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]


def test_every_pin_is_of_one_version():
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+]+", line)] == []
    assert len(PINS) == len(LINES)


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_weakness(name):
    floor, advisory = FLOORS[name]
    requested = [each for each in ASKED if each.name.lower() == name]
    if name in PINS:
        assert Version(PINS[name]) >= Version(floor), advisory
    for each in requested:
        lowest = [
            Version(part.version) for part in each.specifier if part.operator in (">=", "==", "~=")
        ]
        assert name in PINS
        assert (lowest and max(lowest) >= Version(floor)) or (not lowest and name == "jinja2"), (
            f"{each}: {advisory}"
        )
        for bad in NEVER.get(name, ()):
            assert bad not in each.specifier
    try:
        assert Version(metadata.version(name)) >= Version(floor), advisory
    except metadata.PackageNotFoundError:
        assert not requested


def test_what_is_needed_is_pinned_within_its_bounds():
    for each in ASKED:
        pin = PINS.get(each.name.lower().replace("_", "-"))
        if pin is not None:
            assert each.specifier.contains(pin), f"{each}, but constraints.txt has {pin}"
