"""Kill a training run with SIGKILL at random moments, go on with it each time, and compare what comes out with a run that
was left alone: weights by digest, and every logged number that is not a time.

    python -m scripts.faults.kill_resume kills=20 steps=80
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

TIMES = ("seconds", "tokens_per_s", "trained_per_s")
DEFAULTS = {
    "kills": 20,
    "steps": 80,
    "seed": 0,
    "extra": [],  # further overrides, as [adapter=dora,accumulate=2]
}


def rows_file(folder: Path) -> Path:
    """A small chat data set."""
    draw = random.Random(0)
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(150):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            messages = [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def command(rows: Path, runs: Path, name: str, steps: int, extra: list[str]) -> list[str]:
    """The run that is killed: dropout, accumulation, frequent saves and evaluations."""
    return [
        sys.executable, "-m", "trainer", "+experiment=smoke", f"task.path={rows}", f"runs={runs}", f"name={name}", f"max_steps={steps}",
        "precision=fp32", "adapter.dropout=0.1", "accumulate=2", "batch_size=4", "task.eval_fraction=0.1",
        "callbacks.evaluation.every=7", "callbacks.evaluation.generate=2", "callbacks.checkpoints.every=3", "resume=auto", "threads=1",
        *extra,
    ]  # fmt: skip


def outcome(run: Path) -> tuple[str, str]:
    """(digest of the final weights, digest of all logged numbers but the times)."""
    weights = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = json.dumps([{key: value for key, value in row.items() if key not in TIMES} for row in rows], sort_keys=True)
    return weights, hashlib.sha256(numbers.encode()).hexdigest()


def main() -> int:
    """Prints a line for each kill and the verdict; 1 if anything differs."""
    options = {**DEFAULTS, **OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))}  # type: ignore[dict-item]
    draw = random.Random(options["seed"])
    folder = Path(tempfile.mkdtemp(prefix="graft-kill-"))
    rows = rows_file(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": environment}
    started = time.monotonic()
    subprocess.run(command(rows, folder, "alone", options["steps"], options["extra"]), check=True, **quiet)  # type: ignore[call-overload]
    whole = time.monotonic() - started
    wanted = outcome(folder / "alone")
    killed, starts = 0, 0
    metrics = folder / "killed" / "metrics.jsonl"
    while True:
        starts += 1
        process = subprocess.Popen(command(rows, folder, "killed", options["steps"], options["extra"]), **quiet)  # type: ignore[call-overload]
        if killed < options["kills"]:
            before = metrics.stat().st_size if metrics.exists() else 0
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size != before):
                time.sleep(0.02)  # until this start has trained something
            time.sleep(draw.uniform(0, 0.25))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
                steps = [json.loads(line).get("step") for line in metrics.read_text().splitlines() if line.endswith("}")]
                print(f"kill {killed}: last logged step {steps[-1] if steps else 0}", flush=True)
        if process.wait() == 0:
            break
    found = outcome(folder / "killed")
    print(f"{killed} kills, {starts} starts, {options['steps']} steps (alone {whole:.0f} s)")
    print(
        f"final weights {'bit-identical' if found[0] == wanted[0] else 'DIFFER'}, logged numbers {'identical' if found[1] == wanted[1] else 'DIFFER'}"
    )
    same = found == wanted
    if same:
        shutil.rmtree(folder)
    else:
        print(f"kept for inspection: {folder}")
    return 0 if same and killed >= options["kills"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
