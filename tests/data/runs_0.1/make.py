"""Make the run folders in this directory: stopped runs of version 0.1.0, and how they would end.

    PYTHONPATH=REPOSITORY python make.py

REPOSITORY is a checkout of the commit that README.md names. The script works in /tmp/graft, so that
no path of a user's machine is recorded, and writes next to itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE, WORK = Path(__file__).resolve().parent, Path("/tmp/graft")
COMMON = (
    "+experiment=smoke",
    "task.path=rows.jsonl",
    "task.eval_fraction=0.2",
    "precision=fp32",
    "threads=1",
    "lightning=cpu",
    "batch_size=4",
    "max_epochs=null",
    "callbacks.evaluation.every=2",
    "callbacks.evaluation.samples=1",
    "callbacks.evaluation.max_new_tokens=8",
    "callbacks.checkpoints.every=null",
    "callbacks.checkpoints.keep=1",
)
FEW = "adapter.target_modules=[q_proj,down_proj]"
LORA = (FEW, "adapter.rank=2", "adapter.dropout=0.3")
# Each run with the step before which it is stopped; None lets it end.
RUNS: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "lora": (4, (*LORA, "max_steps=8")),
    "rosa": (
        2,
        (
            "adapter=rosa",
            FEW,
            "adapter.rank=2",
            "adapter.density=0.1",
            "adapter.warmup_steps=4",
            "max_steps=8",
        ),
    ),
    "spiel": (
        4,
        (
            "adapter=spiel",
            FEW,
            "adapter.density=0.1",
            "adapter.reselection_steps=4",
            "adapter.accumulation_steps=2",
            "max_steps=9",
        ),
    ),
    "parent": (
        None,
        (
            *LORA,
            "schedule=constant",
            "schedule.warmup=2",
            "callbacks.checkpoints.every=4",
            "callbacks.checkpoints.keep=null",
            "max_steps=6",
        ),
    ),
    "eagle3": (
        3,
        (
            "adapter=none",
            "objective=distill",
            "drafter=eagle3",
            "drafter.offsets=2",
            "drafter.aux_layers=[1]",
            "drafter.draft_vocab_size=32",
            "target.run=runs/parent@4",
            "target.features=states",
            "max_steps=6",
        ),
    ),
    "branch": (6, ()),  # its settings are the parent's
}


def child(stop: int | None, arguments: list[str]) -> None:
    """Run the program in this process, and send it SIGTERM when it begins step `stop` + 1."""
    import lightning

    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if module.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    fit = lightning.Trainer.fit

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        self.callbacks.append(Stop())
        fit(self, *args, **kwargs)

    lightning.Trainer.fit = watched  # type: ignore[method-assign]
    platform.node = lambda: "host"
    if arguments[0].startswith("from="):
        from trainer import cooldown

        options = dict(argument.split("=", 1) for argument in arguments[:3])
        arguments = [*cooldown.arguments(cooldown.KNOWN | options, [])[1], *arguments[3:]]
    sys.argv = ["trainer", *arguments]
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)


def run(name: str, stop: int | None, runs: str) -> Path:
    """One run, stopped or left alone, or resumed if its folder exists."""
    arguments = [*COMMON, f"name={name}", *RUNS[name][1], f"runs={runs}", "resume=auto"]
    if name == "branch":
        arguments = ["from=runs/parent@4", "steps=4", "name=branch", f"runs={runs}", "resume=auto"]
    environment = os.environ | {
        "GRAFT_CACHE": str(WORK / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(stop), *arguments], cwd=WORK, env=environment, check=False
    )
    if done.returncode != (0 if stop is None else 143):
        raise SystemExit(f"{name}: exit code {done.returncode}")
    return WORK / runs / name


def weights(folder: Path) -> str:
    """The sha256 of what a run has trained, as of its last checkpoint."""
    import torch

    content = torch.load(
        sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1], weights_only=True
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(
        (content["adapter"]["tensors"] | content.get("drafter", {})).items()
    ):
        digest.update(
            name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Step and loss of what a run has logged."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row[key] for key in ("kind", "step", "loss")}
        for row in logged
        if row["kind"] in ("step", "evaluation")
    ]


def main() -> None:
    """Stop, resume and compare each run; keep the stopped folder and what it should come to."""
    from tests.conftest import sums, write_rows

    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    write_rows(WORK / "rows.jsonl", sums(20))
    expected = {}
    for name, (stop, _) in RUNS.items():
        folder = run(name, stop, "runs")
        if stop is None:
            continue
        shutil.copytree(folder, WORK / "resumed" / name)
        resumed, whole = run(name, None, "resumed"), run(name, None, "whole")
        if rows(resumed) != rows(whole) or weights(resumed) != weights(whole):
            raise SystemExit(
                f"{name}: the resumed run is another one than that which was left alone"
            )
        expected[name] = {"stopped": stop + 1, "rows": rows(whole), "weights": weights(whole)}
    for part in ("rows.jsonl", "runs", "states", "cache"):
        target = HERE / part
        shutil.rmtree(target, ignore_errors=True)
        if (WORK / part).is_dir():
            shutil.copytree(
                WORK / part,
                target,
                ignore=shutil.ignore_patterns(
                    ".lock", "*.lock", "trainer.log", "*.html", "adapter", "*.csv", "native"
                ),
            )
        else:
            shutil.copy(WORK / part, target)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(None if sys.argv[1] == "None" else int(sys.argv[1]), sys.argv[2:])
    else:
        main()
