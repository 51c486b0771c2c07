"""Families in processes of their own, and the outcome of each check.

ok       the check passed
refused  the program said why before anything was trained
failed   a traceback, a wrong result, or a refusal after training
skipped  a check that it needs did not pass
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import psutil

from scripts.zoo.families import Check, Family, Place

LIMIT = 900  # seconds of one family, also on a busy machine
NEEDS = {"merged": "lora", "generate": "lora", "evaluate": "lora"}


def run(
    family: Family, results: Path, log: Path | None = None, keep: bool = False
) -> dict[str, Any]:
    """Check a family in a child process and write its results as JSON. With `keep` the results of
    other checks stay."""
    if not keep:
        (results / f"{family.name}.json").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")  # the child has all imports
    child = context.Process(target=_child, args=(family, results, log))
    child.start()
    child.join(LIMIT)
    if child.is_alive():
        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
            process.kill()
        child.join()
    content = read(results / f"{family.name}.json")
    for name in family.checks:
        content["checks"].setdefault(
            name, {"outcome": "failed", "text": "the process ended or took too long"}
        )
    _write(results / f"{family.name}.json", content)
    return content


def read(file: Path) -> dict[str, Any]:
    """A family's results."""
    return json.loads(file.read_text()) if file.exists() else {"checks": {}}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def _child(family: Family, results: Path, log: Path | None) -> None:
    """Run all checks of a family, and write after each."""
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    os.environ["GRAFT_CACHE"] = str(folder / "cache")
    try:
        check_all(family, folder, results / f"{family.name}.json", log)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_all(family: Family, folder: Path, file: Path, log: Path | None = None) -> dict[str, Any]:
    """Run all checks of a family in `folder`. Tracebacks go to `log`."""
    from scripts.zoo.making import make

    content = {"checks": {}, **read(file), "group": family.group}
    place = make(family, folder)
    for name, check in family.checks.items():
        needed = NEEDS.get(name)
        if needed in content["checks"] and content["checks"][needed]["outcome"] != "ok":
            content["checks"][name] = {"outcome": "skipped", "text": f"needs {needed}"}
        else:
            content["checks"][name] = _outcome(check, place, name, log)
        _write(file, content)
    return content


def _outcome(check: Check, place: Place, name: str, log: Path | None) -> dict[str, Any]:
    from trainer.config.errors import EXIT_BAD_INPUT
    from trainer.session import failures

    runs = place.folder / "runs"
    before = {path.name for path in runs.iterdir()} if runs.exists() else set()
    began, printed = time.monotonic(), io.StringIO()
    messages = logging.StreamHandler(printed)
    logging.getLogger("trainer").addHandler(messages)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("ignore")
            outcome, text = "ok", check(place)
    except Exception as error:
        trained = any(
            list((path / "checkpoints").glob("*.ckpt"))
            for path in (runs.iterdir() if runs.exists() else [])
            if path.name not in before
        )
        explained = failures.explained(error, {})
        outcome, text = "failed", f"{type(error).__name__}: {error}"
        if explained is not None:
            code = explained[1]
            refused = code == EXIT_BAD_INPUT and not trained
            outcome, text = ("refused" if refused else "failed"), str(explained[0])
        if log is not None:
            with log.open("a") as stream:
                print(f"==== {place.family.name} {name}: {outcome}", file=stream)
                print(traceback.format_exc(), file=stream)
                print(printed.getvalue()[-3000:], file=stream)
    finally:
        logging.getLogger("trainer").removeHandler(messages)
    text = text.strip().replace(place.base, "BASE").replace(str(place.folder), "FOLDER")
    return {
        "outcome": outcome,
        "text": text.partition("\n")[0][:400],
        "seconds": round(time.monotonic() - began, 1),
    }
