"""Ask the OSV database about known advisories of every pin in constraints.txt.

    python -m scripts.audit [--offline-ok]

Exit code 0: every pin was asked about, and none has an advisory. 1: some have. 3: the database
could not be asked, which says nothing about the pins; with --offline-ok this is 0.

tests/test_pins.py compares the pins with a table of advisories, without a network.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATABASE = "https://api.osv.dev/v1/querybatch"
SECONDS = 30
NOT_ASKED = 3


def pins(text: str) -> dict[str, str]:
    """Return the versions by package of a constraints file, without their local parts (+cpu).

    Raises:
        ValueError: a line is no pin of one version.
    """
    versions = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.!]+)(?:\+[\w.]+)?", line)
        if match is None:
            raise ValueError(f"constraints.txt: {line!r} is no pin, as in torch==2.13.0")
        versions[match[1]] = match[2]
    return versions


def advisories(versions: dict[str, str], database: str = DATABASE) -> dict[str, list[str]]:
    """Return the ids of the advisories of each pin that has some.

    Raises:
        OSError: the database cannot be reached.
        ValueError: its answer is not about every pin.
    """
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version}
        for name, version in versions.items()
    ]
    request = urllib.request.Request(
        database,
        json.dumps({"queries": queries}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        answer: Any = json.load(response)
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != len(queries):
        raise ValueError("the database did not answer for every pin")
    return {
        name: sorted(entry["id"] for entry in result["vulns"])
        for name, result in zip(versions, results, strict=True)
        if result and result.get("vulns")
    }


def main(argv: list[str]) -> int:
    """Print what is known, and return the exit code."""
    versions = pins((ROOT / "constraints.txt").read_text("utf-8"))
    try:
        known = advisories(versions, os.environ.get("GRAFT_OSV", DATABASE))
    except (OSError, ValueError) as error:
        print(f"not asked: {error}. This says nothing about the {len(versions)} pins")
        return 0 if "--offline-ok" in argv else NOT_ASKED
    for name, ids in known.items():
        print(f"{name}=={versions[name]}: {', '.join(ids)}")
    print(f"{len(versions)} pins asked, {len(known)} with advisories")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
