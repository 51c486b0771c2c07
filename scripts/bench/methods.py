"""Compare adaptation methods at equal trainable parameters, on real data: their results, and the
spread over seeds.

    python -m scripts.bench.methods data=FOLDER out=FOLDER [tasks=[viggo,sql]] [methods=[...]]
    [rank=16] [steps=60] [batch_size=8]
        [seeds=[0,1,2]] [rates=[1e-4,3e-4,1e-3]] [search_steps=30] [held_out=160] [generate=48]
        [base=smollm2_135m] [minutes=null]
    python -m scripts.bench.methods out=FOLDER table=true

`data` has viggo_train.jsonl, viggo_valid.jsonl and sql_train.jsonl. Every piece is a new process of
the program, and its numbers are a line of OUT/results.jsonl. The script can be stopped at any time
and resumes there. After `minutes` it starts no further piece. Then it writes OUT/methods.md and
OUT/methods.svg from the existing lines.

`methods=[lora,registers]` compares plain LoRA with one that is trained with register tokens
(MuToR), at equal steps.

Equal trainable parameters: LoRA of `rank` on all linear layers; DoRA and rsLoRA of the same rank
(DoRA has its magnitudes on top); sparse methods with the density that gives as many values; RoSA
with half of the rank and half of that density; full fine-tuning trains everything.

Learning rates are searched equally for each method: the same `rates`, one seed, `search_steps`
steps on a training part of ViGGO that leaves 160 rows out, chosen by the loss on those; while the
best is at an end of the grid, one more rate three times further is tried, at most twice. RoSA's
ratio of rates is the paper's. The chosen rate is used for all seeds and tasks.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "data": None,
    "out": None,
    "tasks": ["viggo", "sql"],
    "rank": 16,
    "steps": 60,
    "batch_size": 8,
    "seeds": [0, 1, 2],
    "rates": [1e-4, 3e-4, 1e-3],
    "search_steps": 30,
    "held_out": 160,
    "generate": 48,
    "base": "smollm2_135m",
    "minutes": None,
    "table": False,
    "methods": ["lora", "dora", "rslora", "rosa", "sparse", "spiel_ag", "spiel_ma", "full"],
}
SCORES = {"viggo": ("exact_match", "slots_f1"), "sql": ("exact_match", "same_result")}


def adapter(method: str, options: dict[str, Any], density: float, steps: int) -> list[str]:
    """Return the overrides of a method, with the parameters of a LoRA of `rank`."""
    rank, warmup = options["rank"], max(1, steps // 8)
    # Replacements every eighth of the run: with the 20 steps of the paper's long runs there would
    # be next to none.
    every = [
        f"adapter.reselection_steps={max(4, steps // 8)}",
        f"adapter.accumulation_steps={max(2, steps // 24)}",
    ]
    return {
        "lora": ["adapter=lora", f"adapter.rank={rank}"],
        "dora": ["adapter=dora", f"adapter.r={rank}"],
        "rslora": ["adapter=rslora", f"adapter.rank={rank}"],
        "rosa": [
            "adapter=rosa",
            f"adapter.rank={rank // 2}",
            f"adapter.density={density / 2}",
            f"adapter.warmup_steps={warmup}",
        ],
        "sparse": ["adapter=sparse", f"adapter.density={density}"],
        "registers": ["adapter=lora", f"adapter.rank={rank}", "drafter=registers"],
        "spiel_ag": ["adapter=spiel", f"adapter.density={density}", *every],
        "spiel_ma": ["adapter=spiel_ma", f"adapter.density={density}", *every],
        "full": ["adapter=full"],
    }[method]


def density_of(options: dict[str, Any]) -> float:
    """Return the density at which a sparse delta has as many values as a LoRA of `rank`."""
    from adapters.delta import targets
    from adapters.linear import features
    from trainer.assembly.build import instantiate
    from trainer.config import compose

    plain: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        compose.compose([f"base={options['base']}", "task=viggo", "task.path=x"]), resolve=True
    )
    sizes = [
        features(linear)
        for _, linear in targets(instantiate(plain["base"]).skeleton(), "all-linear")
    ]
    return options["rank"] * sum(i + o for i, o in sizes) / sum(i * o for i, o in sizes)


def split(options: dict[str, Any]) -> dict[str, list[str]]:
    """Write the rows: for the search a part of ViGGO's training rows, for the results rows that the
    search did not use."""
    data, out = Path(options["data"]), Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    viggo, sql = (
        (data / f"{name}_train.jsonl").read_text("utf-8").splitlines(True)
        for name in ("viggo", "sql")
    )
    # Rows of one meaning follow each other: meanings at the end of the file are in no other rows.
    (out / "search_train.jsonl").write_text("".join(viggo[:-300]), "utf-8")
    (out / "search_eval.jsonl").write_text("".join(viggo[-300:]), "utf-8")
    (out / "sql_train.jsonl").write_text("".join(sql[:600]), "utf-8")
    (out / "sql_eval.jsonl").write_text("".join(sql[600:]), "utf-8")
    return {
        "search": [
            "task=viggo",
            f"task.path={out}/search_train.jsonl",
            f"task.eval_path={out}/search_eval.jsonl",
        ],
        "viggo": [
            "task=viggo",
            f"task.path={data}/viggo_train.jsonl",
            f"task.eval_path={data}/viggo_valid.jsonl",
        ],
        "sql": [
            "task=sql",
            f"task.path={out}/sql_train.jsonl",
            f"task.eval_path={out}/sql_eval.jsonl",
        ],
    }


def piece(
    method: str,
    part: str,
    rate: float,
    seed: int,
    options: dict[str, Any],
    rows: list[str],
    density: float,
) -> dict[str, Any]:
    """Run one method in a new process; return its held-out loss and scores, step time, memory and
    adapter size."""
    steps = options["search_steps" if part == "search" else "steps"]
    name = f"{part}-{method}-{rate:g}-{seed}"
    command = [
        sys.executable,
        "-m",
        "trainer",
        f"base={options['base']}",
        *rows,
        *adapter(method, options, density, steps),
        f"name={name}",
        f"runs={options['out']}/runs",
        "logger=none",
        f"seed={seed}",
        f"max_steps={steps}",
        "max_epochs=null",
        "max_length=384",
        f"batch_size={options['batch_size']}",
        f"optimizer.lr={rate}",
        "schedule=linear",
        f"schedule.warmup={max(1, steps // 20)}",
        f"task.eval_limit={options['held_out']}",
        "callbacks.evaluation=null",
        "callbacks.checkpoints.every=null",
        "resume=auto",
    ]
    folder = Path(options["out"]) / "runs" / name
    peak = run(command)
    grade(folder, 0 if part == "search" else options["generate"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in lines if row["kind"] == "step"]
    result = {
        "method": method,
        "part": part,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "batch_size": options["batch_size"],
        "base": options["base"],
        "step_seconds": statistics.median(b - a for a, b in itertools.pairwise(seconds[1:])),
        "parameters": trained_parameters(folder),
        "peak_bytes": peak,
    }
    result |= json.loads((folder / "scores.json").read_text())["adapted"]
    exported = folder / "adapter" / "adapter_model.safetensors"
    result["adapter_bytes"] = exported.stat().st_size if exported.exists() else None
    for path in (folder / "checkpoints").glob("step-*"):
        path.unlink()  # a full fine-tuning has gigabytes
    return result


def grade(folder: Path, answers: int) -> None:
    """Evaluate a run, with generated answers to `count` rows, and write its scores.json."""
    command = [sys.executable, "-m", "trainer.evaluate", f"run={folder}", f"generate={answers}"]
    run([*command, "max_new_tokens=120", f"json={folder}/scores.json"])


def run(command: list[str]) -> int:
    """Run a command, and return its peak resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(
                f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-4000:]}"
            )
    return usage.ru_maxrss * 1024


def trained_parameters(folder: Path) -> int:
    """Return preflight's number of trained parameters."""
    return json.loads((folder / "preflight.json").read_text())["model"]["trainable"]


def pieces(
    options: dict[str, Any], done: list[dict[str, Any]]
) -> Iterator[tuple[str, str, float, int]]:
    """Yield the missing pieces: the search of each method, then its seeds, so that early results
    are complete."""
    have = {(row["method"], row["part"], row["rate"], row["seed"]) for row in done}
    for method in options["methods"]:
        while (rate := next_rate(method, options["rates"], done)) is not None:
            yield method, "search", rate, 0
    for seed in options["seeds"]:
        for task in options["tasks"]:
            for method in options["methods"]:
                rate = best_rate(method, done)
                if (method, task, rate, seed) not in have:
                    yield method, task, rate, seed


def next_rate(method: str, rates: list[float], done: list[dict[str, Any]]) -> float | None:
    """Return the search's next rate; None if it has ended."""
    tried = {
        row["rate"]: row["loss"]
        for row in done
        if row["method"] == method and row["part"] == "search"
    }
    missing = [rate for rate in rates if rate not in tried]
    if missing or len(tried) >= len(rates) + 2:
        return missing[0] if missing else None
    best = min(tried, key=tried.__getitem__)
    if best == max(tried):
        return float(f"{best * (10 / 3 if f'{best:e}'.startswith('3') else 3):.3g}")
    if best == min(tried):
        return float(f"{best / (3 if f'{best:e}'.startswith('3') else 10 / 3):.3g}")
    return None


def best_rate(method: str, done: list[dict[str, Any]]) -> float:
    """Return the searched rate of lowest loss."""
    return min(
        (row for row in done if row["method"] == method and row["part"] == "search"),
        key=lambda row: row["loss"],
    )["rate"]


def table(options: dict[str, Any], done: list[dict[str, Any]]) -> str:
    """Return means and standard deviations over the seeds, from the existing lines. Step times are
    the lowest of the seeds' medians, since other load on the machine only adds to them."""
    lines = []
    for task in options["tasks"]:
        names = ["loss", *SCORES[task]]
        lines += [f"\n{task}: held out, mean ± standard deviation over seeds\n"]
        lines += [
            "| method | rate | seeds | trained | "
            + " | ".join(names)
            + " | step s | peak MB | adapter MB |",
            "|---" * (7 + len(names)) + "|",
        ]
        for method in options["methods"]:
            rows = [row for row in done if row["method"] == method and row["part"] == task]
            if not rows:
                continue
            cells = []
            for name in names:
                values = [row[name] for row in rows]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            size = rows[0]["adapter_bytes"]
            cells += [f"{min(row['step_seconds'] for row in rows):.2f}"]
            cells += [
                f"{statistics.median(row['peak_bytes'] for row in rows) / 1e6:.0f}",
                f"{size / 1e6:.1f}" if size else "",
            ]
            lines.append(
                f"| {method} | {rows[0]['rate']:g} | {len(rows)} | {rows[0]['parameters']:,} |"
                f" {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def plot(options: dict[str, Any], done: list[dict[str, Any]], file: Path) -> None:
    """Plot each seed's held-out loss and first score, by method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(options["tasks"]), figsize=(5 * len(options["tasks"]), 6), squeeze=False
    )
    for column, task in enumerate(options["tasks"]):
        for row, name in enumerate(("loss", SCORES[task][0])):
            for place, method in enumerate(options["methods"]):
                values = [r[name] for r in done if r["method"] == method and r["part"] == task]
                axes[row][column].plot([place] * len(values), values, "o", alpha=0.7)
            axes[row][column].set_xticks(
                range(len(options["methods"])), options["methods"], rotation=45, ha="right"
            )
            axes[row][column].set_title(f"{task}: {name}")
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Run what is missing, then write table and plot."""
    options = parse(DEFAULTS, __doc__)
    if options["out"] is None or (options["data"] is None and not options["table"]):
        print(__doc__, file=sys.stderr)
        return 2
    out, started = Path(options["out"]), time.monotonic()
    results = out / "results.jsonl"

    def done() -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in results.read_text().splitlines()]
            if results.exists()
            else []
        )

    if not options["table"]:
        rows, density = split(options), density_of(options)
        while options["minutes"] is None or time.monotonic() - started < 60 * options["minutes"]:
            what = next(pieces(options, done()), None)
            if what is None:
                break
            method, part, rate, seed = what
            result = piece(method, part, rate, seed, options, rows[part], density)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{part} {method} rate {rate:g} seed {seed}: loss {result['loss']:.4f}", flush=True
            )
    text = table(options, done())
    (out / "methods.md").write_text(text, "utf-8")
    plot(options, done(), out / "methods.svg")
    print(
        text + f"\n{os.cpu_count()} cores, torch {__import__('torch').__version__};"
        f" {out / 'methods.svg'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
