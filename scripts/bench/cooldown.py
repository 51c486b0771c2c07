"""One constant run with a cooldown for each length, compared with a cosine run of each length: loss
and cost.

    python -m scripts.bench.cooldown data=FOLDER out=FOLDER [lengths=[40,80,160]] [fraction=0.2]
    [rates=[1e-3,3e-3,1e-2]]
        [task=viggo] [adapter=lora] [batch_size=4] [held_out=100] [base=smollm2_135m] [seed=0]
        [averages=true]
    python -m scripts.bench.cooldown out=FOLDER table=true

As in Hägele et al. 2024 (arXiv 2405.18392): the peak rate of the cosine, which decays to a tenth of
it, is searched on the shortest length among `rates`, by the held-out loss; the constant rate is
half of it. The branches cool down by 1 - sqrt over `fraction` of their length. With `averages` the
constant run also keeps an average of its weights (SWA), the paper's other comparison. Every run is
a new process of the program, and resumes where the script was stopped. Writes OUT/cooldown.md and
OUT/cooldown.svg.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "data": None,
    "out": None,
    "lengths": [40, 80, 160],
    "fraction": 0.2,
    "rates": [1e-3, 3e-3, 1e-2],
    "task": "viggo",
    "adapter": "lora",
    "batch_size": 4,
    "held_out": 100,
    "base": "smollm2_135m",
    "seed": 0,
    "averages": True,
    "table": False,
}
FILES = {
    "viggo": ("viggo_train.jsonl", "viggo_valid.jsonl"),
    "sql": ("sql_train.jsonl", "sql_train.jsonl"),
}


def trained(options: dict[str, Any], name: str, *overrides: str, verb: str = "") -> dict[str, Any]:
    """Train the run of a name if it does not exist. Return its steps, tokens, and held-out loss
    after the last step."""
    folder = Path(options["out"]) / "runs" / name
    if not (folder / "report.html").exists():
        command = [sys.executable, "-m", "trainer" + (f".{verb}" if verb else ""), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    result = {"name": name, "steps": steps[-1]["step"], "tokens": steps[-1]["tokens"]}
    result |= {
        kind: row["loss"]
        for kind in ("evaluation", "average")
        for row in rows
        if row["kind"] == kind
    }
    print(f"{name}: {result['steps']} steps, held-out loss {result['evaluation']:.4f}", flush=True)
    return result


def common(options: dict[str, Any], name: str, steps: int, rate: float) -> list[str]:
    """Return the overrides of all runs."""
    train, held_out = (f"{options['data']}/{file}" for file in FILES[options["task"]])
    rows = (
        [f"task.path={train}", f"task.eval_path={held_out}"]
        if train != held_out
        else [f"task.path={train}", "task.eval_fraction=0.2"]
    )
    return [
        f"base={options['base']}",
        f"task={options['task']}",
        *rows,
        f"task.eval_limit={options['held_out']}",
        f"adapter={options['adapter']}",
        f"name={name}",
        f"runs={options['out']}/runs",
        "resume=auto",
        "logger=none",
        f"seed={options['seed']}",
        f"max_steps={steps}",
        "max_epochs=null",
        "max_length=384",
        f"batch_size={options['batch_size']}",
        f"optimizer.lr={rate}",
        "callbacks.evaluation.every=null",
        "callbacks.evaluation.samples=0",
        "schedule.warmup=3",
    ]


def measured(options: dict[str, Any]) -> dict[str, Any]:
    """Train all runs, and return their results."""
    lengths = sorted(options["lengths"])
    cosine = ["schedule=cosine", "callbacks.checkpoints.every=null"]
    searched = {
        rate: trained(
            options,
            f"cosine-{lengths[0]}-{rate:g}",
            *common(options, f"cosine-{lengths[0]}-{rate:g}", lengths[0], rate),
            *cosine,
        )
        for rate in options["rates"]
    }
    peak = min(searched, key=lambda rate: searched[rate]["evaluation"])
    cosines = [searched[peak]] + [
        trained(
            options,
            f"cosine-{n}-{peak:g}",
            *common(options, f"cosine-{n}-{peak:g}", n, peak),
            *cosine,
        )
        for n in lengths[1:]
    ]
    starts = [n - round(options["fraction"] * n) for n in lengths]
    average = (
        ["callbacks=[default,averaging]", "callbacks.averaging.kind=swa"]
        if options["averages"]
        else []
    )
    trunk = trained(
        options,
        "constant",
        *common(options, "constant", starts[-1], peak / 2),
        "schedule=constant",
        *average,
        f"callbacks.checkpoints.every={math.gcd(*starts)}",
        "callbacks.checkpoints.keep=null",
    )
    constant = f"{options['out']}/runs/constant"
    branches = [
        trained(
            options,
            f"constant-cooldown-{start}-{n - start}",
            f"from={constant}@{start}",
            f"steps={n - start}",
            "resume=auto",
            verb="cooldown",
        )
        for n, start in zip(lengths, starts, strict=True)
    ]
    return {
        "peak": peak,
        "searched": {f"{rate:g}": run["evaluation"] for rate, run in searched.items()},
        "cosine": cosines,
        "constant": trunk,
        "branches": branches,
        "options": options,
    }


def table(results: dict[str, Any]) -> str:
    """Return a table of the lengths, and the cost of both ways."""
    lines = [
        f"Peak of the cosine {results['peak']:g} (held-out loss at {results['cosine'][0]['steps']}"
        " steps: "
        + ", ".join(f"{rate}: {loss:.4f}" for rate, loss in results["searched"].items())
        + f"), constant rate {results['peak'] / 2:g}.\n",
        "| steps | cosine | cooldown | difference |",
        "|---|---|---|---|",
    ]
    for cosine, branch in zip(results["cosine"], results["branches"], strict=True):
        a, b = cosine["evaluation"], branch["evaluation"]
        lines.append(f"| {cosine['steps']} | {a:.4f} | {b:.4f} | {b - a:+.4f} |")
    trunk = results["constant"]
    alone, start = sum(run["steps"] for run in results["cosine"]), trunk["steps"]
    cooled = start + sum(int(run["name"].rpartition("-")[2]) for run in results["branches"])
    lines.append(f"\nThe constant run's own end, after {start} steps: {trunk['evaluation']:.4f}")
    if "average" in trunk:
        lines[-1] += f"; the average of its weights: {trunk['average']:.4f}"
    lines.append(
        f"\nSteps: {alone} for the cosines, {cooled} for the constant run and its cooldowns: "
        f"{cooled / alone:.2f} of them, {1 - cooled / alone:.0%} saved."
    )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> None:
    """Plot final held-out losses by length."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4))
    for name, runs in (
        ("cosine, a run each", results["cosine"]),
        ("cooldowns of one constant run", results["branches"]),
    ):
        axes.plot(
            [run["steps"] for run in runs], [run["evaluation"] for run in runs], "o-", label=name
        )
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Run what is missing, then write table and plot."""
    options = parse(DEFAULTS, __doc__)
    if options["out"] is None or (options["data"] is None and not options["table"]):
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(options["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    options["out"] = str(out)
    results = out / "results.json"
    if not options["table"]:
        results.write_text(json.dumps(measured(options), indent=1) + "\n")
    content = json.loads(results.read_text())
    text = table(content)
    (out / "cooldown.md").write_text(text, "utf-8")
    plot(content, out / "cooldown.svg")
    print(text + f"\n{os.cpu_count()} cores, torch {__import__('torch').__version__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
