"""One run of a contestant of scripts.bench.train, in a new process."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.peers.contestants import (
    ALLOCATOR,
    OF_A_PEER,
    PEERS,
    ROOT,
    environment,
    interpreter,
)
from scripts.bench.peers.work import overrides


def waited(
    command: list[str], env: dict[str, str], watch: Callable[[], bool] | None = None
) -> tuple[float, float | None]:
    """Run a command. Returns the wall-clock times of its start and of `watch` becoming true.

    Raises:
        RuntimeError: it failed. The message is the end of its output.
    """
    with tempfile.TemporaryFile("w+") as log:
        began, held = time.time(), None
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT
        )
        while watch is not None and held is None and process.poll() is None:
            if watch():
                held = time.time()
            time.sleep(0.01)
        if process.wait():
            log.seek(0)
            raise RuntimeError(
                log.read()[-3000:].strip()
                or f"{shlex.join(command)} ended with {process.returncode}"
            )
        if held is None and watch is not None and watch():
            held = time.time()
    return began, held


def packed(spec: dict[str, Any], length: int) -> list[str]:
    """Return overrides for packing with as many tokens per step as the padded rows have, rounded to
    whole sequences."""
    return [
        "packing=true",
        "group_by_length=false",
        f"batch_size={max(1, round(spec['batch_size'] * spec['mean_length'] / length))}",
    ]


def run_ours(
    options: dict[str, Any], spec: dict[str, Any], work: Path, kind: str, variant: list[str]
) -> dict[str, Any]:
    """Run our program once."""
    adapter_dtype = options["adapter_dtype"] if spec["dtype"] == "bfloat16" else "float32"
    with tempfile.TemporaryDirectory() as temporary:
        journal = Path(temporary) / "runs" / "bench" / "metrics.jsonl"
        result_file = Path(temporary) / "result.json"
        settings = [
            *overrides(options, work),
            f"adapter.dtype={adapter_dtype}",
            f"objective.gradient_checkpointing={str(options['gradient_checkpointing']).lower()}",
            *(packed(spec, options["length"]) if kind == "ours_packed" else []),
            *options["extra"],
            *variant,
            "name=bench",
            f"runs={journal.parents[1]}",
        ]
        script = str(ROOT / "scripts/bench/peers/ours.py")
        command = [sys.executable, script, str(result_file), *settings]
        env = environment(options) | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        began, first = waited(
            command,
            env,
            lambda: journal.exists() and '"kind": "step"' in journal.read_text("utf-8"),
        )
        rows = [
            row
            for row in map(json.loads, journal.read_text("utf-8").splitlines())
            if row["kind"] == "step"
        ]
        result = json.loads(result_file.read_text("utf-8"))
    seconds = [0.0, *(row["seconds"] for row in rows)]
    tokens = [0, *(row["tokens"] for row in rows)]
    result |= {
        "losses": [row["loss"] for row in rows],
        "seconds": [b - a for a, b in itertools.pairwise(seconds)][1:],
        "processed": [b - a for a, b in itertools.pairwise(tokens)],
        "supervised": [
            round(row["trained_per_s"] * (b - a))
            for row, (a, b) in zip(rows, itertools.pairwise(seconds), strict=True)
        ],
        "first": first - began if first else None,
        "overrides": settings,
    }
    return result


def run_peer(
    options: dict[str, Any], spec: dict[str, Any], kind: str, variant: list[str]
) -> dict[str, Any]:
    """Run a peer once."""
    python = interpreter(kind, options["envs"])
    changes: Any = OmegaConf.to_container(OmegaConf.from_dotlist(variant))
    settings = spec | {name: options[name] for name in OF_A_PEER} | changes
    script = str(ROOT / "scripts/bench/peers" / PEERS[kind])
    env = {
        name: value
        for name, value in environment(options).items()
        if name != "PYTHONPATH" or options["envs"] == "here"
    } | (ALLOCATOR if settings["allocator"] else {})
    with tempfile.TemporaryDirectory() as temporary:
        spec_file, result_file = Path(temporary) / "spec.json", Path(temporary) / "result.json"
        spec_file.write_text(json.dumps(settings), "utf-8")
        command = [python, script, str(spec_file), str(result_file)]
        if kind == "litgpt" and not (Path(spec["litgpt"]) / "lit_model.pth").exists():
            waited([*command, "--convert"], env)
        began, _ = waited(command, env)
        result = json.loads(result_file.read_text("utf-8"))
    steps = json.loads(Path(spec["rows"]).read_text("utf-8"))
    ends = result.pop("ends")
    return result | {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "first": ends[0] - began,
        "processed": [sum(len(row["input_ids"]) for row in rows) for rows in steps],
        "supervised": [
            sum(label != -100 for row in rows for label in row["labels"]) for rows in steps
        ],
    }
