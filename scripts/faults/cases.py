"""The small runs that faults are injected into, one for each kind of training state, and the
comparison of two of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.faults import commands, pairs, warm
from scripts.faults.pairs import Pair
from scripts.faults.warm import Child

TIMES = ("seconds", "answer_seconds", "tokens_per_s", "trained_per_s", "minutes")
EVERY = 3  # steps between checkpoints: what a kill may cost
STEPS = 22
SHARD = 300_000  # bytes of a shard of features, so that there are several

COMMON = (
    "+experiment=smoke",
    f"max_steps={STEPS}",
    "precision=fp32",
    "threads=1",
    "accumulate=2",
    "batch_size=4",
    "task.eval_fraction=0.1",
    "callbacks.evaluation.every=7",
    "callbacks.evaluation.generate=2",
    "callbacks.evaluation.max_new_tokens=8",
    f"callbacks.checkpoints.every={EVERY}",
    "resume=auto",
)
SETTINGS: dict[str, tuple[str, ...]] = {
    "lora": ("adapter.dropout=0.1",),
    "rosa": (
        "adapter=rosa",
        "adapter.density=0.05",
        "adapter.warmup_steps=4",
        "adapter.mask_steps=5",
        "adapter.count_mask_steps=true",
        "adapter.dropout=0.1",
    ),
    "spiel": (
        "adapter=spiel",
        "adapter.density=0.1",
        "adapter.reselection_steps=6",
        "adapter.accumulation_steps=3",
    ),
    "mtp": ("drafter=mtp_shared", "drafter.offsets=2"),
    "eagle3": (
        "adapter=none",
        "drafter=eagle3",
        "objective=distill",
        "base.layers=8",
        "drafter.draft_vocab_size=64",
        "drafter.offsets=2",
        "drafter.coverage=0",
        "callbacks.evaluation.generate=0",
        "callbacks.evaluation.samples=0",
    ),
}
SETTINGS["features"] = (*SETTINGS["eagle3"], "max_steps=3", "callbacks.evaluation.every=null")
SETTINGS["requeue"] = SETTINGS["lora"]
SETTINGS["two"] = (*SETTINGS["lora"], *pairs.SETTINGS)
WHOLE = ("starting", "tokenising", "training", "saving", "evaluating", "exporting")
# The phases of each kind of run, in their order. Each gets the same number of kills.
PHASES_OF: dict[str, tuple[str, ...]] = {
    "lora": WHOLE,
    "rosa": (*WHOLE[:2], "making the mask", *WHOLE[2:]),
    "spiel": (*WHOLE[:3], "reselecting", *WHOLE[3:]),
    "mtp": WHOLE,
    "eagle3": (*WHOLE[:2], "caching features", *WHOLE[2:]),
    "features": ("starting", "tokenising", "caching features"),
    "cooldown": (*WHOLE[:2], "cooling down", *WHOLE[3:]),
    "respond": ("starting", "regenerating", "saving"),
    "export": ("starting", "exporting", "comparing"),
    "compress": ("starting", "exporting", "compressing", "comparing"),
    "requeue": ("starting", "training", "saving", "requeueing"),
    "two": ("training", "saving", "evaluating", "exporting"),
}


@dataclass(frozen=True)
class Place:
    """The folders of the harness. `elsewhere` is on another file system, for $TMPDIR."""

    path: Path
    elsewhere: Path

    @property
    def rows(self) -> Path:
        return self.path / "rows.jsonl"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def cache(self, name: str) -> dict[str, str]:
        """Return an environment with a separate cache."""
        return {"GRAFT_CACHE": str(self.path / "cache" / name), "TMPDIR": str(self.elsewhere)}


def prepare(path: Path) -> Place:
    """Create the folder and its rows."""
    memory = Path("/dev/shm")
    elsewhere = (
        memory if os.access(memory, os.W_OK) else path
    ) / f"graft-faults-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    for folder in (path / "runs", path / "logs", path / "cache", elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
    place = Place(path.resolve(), elsewhere)
    draw = random.Random(0)
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(120)]
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}="},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a, b in pairs
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not place.rows.exists() or place.rows.read_text() != text:
        place.rows.write_text(text)
    return place


def words(place: Place, case: str, name: str, *more: str) -> list[str]:
    """Return the arguments of a case's run."""
    states = (
        [f"target.features={place.path / 'features' / name}"]
        if case in ("eagle3", "features")
        else []
    )
    return [
        *COMMON,
        f"task.path={place.rows}",
        f"runs={place.runs}",
        f"name={name}",
        *SETTINGS[case],
        *states,
        *more,
    ]


def small_shards() -> None:
    """Cache features in several shards. Must be called in a child."""
    from trainer.data import hidden_states

    whole = hidden_states.HiddenStates.prepare

    def prepare(*args: Any, **named: Any) -> Any:
        return whole(*args, **named | {"shard_bytes": SHARD})

    hidden_states.HiddenStates.prepare = prepare  # type: ignore[method-assign]


def start(
    place: Place,
    case: str,
    name: str,
    *more: str,
    before: Callable[[], None] | None = None,
    module: str = "trainer",
) -> Child | Pair:
    """Start a case's run under a name: a training of one or two processes, or a command."""

    def broken() -> None:
        small_shards()
        if before is not None:
            before()

    log = place.path / "logs" / f"{name}.log"
    # a folder that a command writes names the base's place, which is in the cache
    cache = place.cache(case if case in commands.WRITERS else name)
    environment = cache | (commands.queue(place) if case == "requeue" else {})
    command = commands.arguments(place, case, name, EVERY)
    module, arguments = command or (module, words(place, case, name))
    if case == "two":
        return pairs.start([*arguments, *more], log, environment, broken)
    return warm.start(module, [*arguments, *more], log, environment, broken)


def constant(place: Place) -> None:
    """Return the run of constant rate whose cooldowns are killed."""
    settings = (
        "schedule=constant",
        "schedule.warmup=2",
        "callbacks.checkpoints.keep=null",
        "max_steps=12",
    )
    if not (place.runs / "constant" / "report.html").exists():
        finish(start(place, "lora", "constant", *settings))


def reference(place: Place, case: str) -> dict[str, Any]:
    """Return the outcome of a case's undisturbed run."""
    name = f"{case}-alone"
    if case == "cooldown":
        constant(place)
    if case in commands.WRITERS:
        reference(place, "lora")
    if not is_done(place, case, name):
        finish(start(place, case, name))
    return outcome(place, case, name)


def plainly(place: Place, case: str, name: str) -> None:
    """Run a case in a new process, started as a user would."""
    command = [sys.executable, "-m", "trainer", *words(place, case, name)]
    environment = os.environ | warm.ENVIRONMENT | place.cache(name)
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if ended.returncode:
        raise Failed(f"exit code {ended.returncode}: {ended.stderr[-3000:]}")


class Failed(RuntimeError):
    """A run failed that had to succeed."""


def finish(child: Child | Pair, seconds: float = 300.0) -> None:
    """Wait for a run that has to succeed.

    Raises:
        Failed: it did not.
    """
    if (code := child.wait(seconds)) != 0:
        raise Failed(f"exit code {code}: {child.output()[-3000:]}")


def cleared(place: Place, name: str) -> str:
    """Return the name, after removing what an interrupted injection left under it."""
    for folder in (
        place.runs / name,
        place.path / "cache" / name,
        place.path / "features" / name,
        place.path / "answers" / name,
    ):
        shutil.rmtree(folder, ignore_errors=True)
    (place.path / "logs" / f"{name}.log").unlink(missing_ok=True)
    return name


def is_done(place: Place, case: str, name: str) -> bool:
    if case in commands.WRITERS:
        return (place.path / "answers" / name).exists()
    if case == "respond":
        return (place.path / "answers" / name / "ended").exists()
    return (place.runs / name / "report.html").exists()


def outcome(place: Place, case: str, name: str) -> dict[str, Any]:
    """Return digests of all weights that a run wrote, and of every number and text that it logged,
    except times."""
    from trainer.storage import journal

    folder = place.path / "answers" / name
    if case in commands.WRITERS:
        left = [path.name for path in folder.parent.glob(f".{name}*")]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {"weights": digest(*files), "logged": left}
    if case == "respond":
        (folder / "ended").touch()
        return {
            "weights": "",
            "logged": digest(*(folder / file for file in ("rows.jsonl", "left_out.jsonl"))),
        }
    run = place.runs / name
    weights = digest(*sorted(run.glob("**/*.safetensors")))
    states = place.path / "features" / name
    rows = [
        {
            key: Path(value).name if key == "where" else value
            for key, value in row.items()
            if key not in TIMES
        }
        for file in ("metrics.jsonl", "samples.jsonl")
        for row in journal.read(run / file)
    ]
    shards = digest(*sorted(states.glob("*.safetensors")))
    return {
        "weights": weights + shards,
        "logged": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
    }


def digest(*files: Path) -> str:
    """Return the sha256 of the names and contents of files."""
    sha256 = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.exists() else b""
        # other files contain the run's name
        folder = f"{file.parent.name}/" if file.parent.name in ("adapter", "drafter") else ""
        sha256.update(f"{folder}{file.name} {len(content)}\0".encode() + content)
    return sha256.hexdigest()


def same(place: Place, case: str, name: str) -> dict[str, Any]:
    """Compare a disturbed run with the undisturbed one."""
    expected, disturbed = reference(place, case), outcome(place, case, name)
    return {
        "weights": expected["weights"] == disturbed["weights"],
        "logged": expected["logged"] == disturbed["logged"],
    }


def lost(place: Place, name: str) -> int:
    """Count the steps that a killed run has logged and not saved."""
    from trainer.storage import checkpoints, journal

    run = place.runs / name
    logged = [row["step"] for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]
    saved = checkpoints.complete(run / "checkpoints")
    return max(logged, default=0) - (saved[-1].step if saved else 0)
