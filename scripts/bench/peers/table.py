"""The table and the plot of scripts/bench/train.py, from its results."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from scripts.bench.peers.contestants import PEERS, contestants


def summary(runs: list[dict[str, Any]], warm: int, cuda: bool) -> dict[str, list[float]]:
    """Return for each round the median warm step, tokens/s of all warm steps, peak memory in MB,
    seconds to the first step and the last loss."""
    rounds: dict[str, list[float]] = {
        name: [] for name in ("step", "processed", "supervised", "memory", "first", "loss")
    }
    for run in runs:
        seconds = run["seconds"][warm - 1 :]
        rounds["step"].append(statistics.median(seconds))
        for name in ("processed", "supervised"):
            rounds[name].append(sum(run[name][warm:]) / sum(seconds))
        rounds["memory"].append((run["peak_gpu"] if cuda else run["peak_rss"]) / 1e6)
        rounds["first"].append(run["first"])
        rounds["loss"].append(run["losses"][-1])
    return rounds


def difference(run: dict[str, Any], ours: dict[str, Any] | None) -> float | None:
    """The largest difference of two loss curves; None where their steps did not have the same
    tokens."""
    if ours is None or any(run[name] != ours[name] for name in ("processed", "supervised")):
        return None
    return max(abs(a - b) for a, b in zip(run["losses"], ours["losses"], strict=True))


def ratios(names: dict[str, dict[str, list[float]]], ours: str, peer: str) -> dict[str, float]:
    """Medians over the rounds of both: our supervised tokens/s, memory and seconds to the first
    step, each over the peer's."""
    pairs = {"supervised": "speed", "memory": "memory", "first": "start"}
    return {
        label: statistics.median(
            a / b for a, b in zip(names[ours][key], names[peer][key], strict=False)
        )
        for key, label in pairs.items()
    }


def utilisation(
    run: dict[str, Any], ours: dict[str, Any] | None, spec: dict[str, Any], warm: int
) -> tuple[float, float] | None:
    """Return (FLOP/s, their part of the peak) of the warm steps; None for other batches than those
    whose operations were counted, or a `spec` that has none."""
    if "flop" not in spec or (ours is not None and difference(run, ours) is None):
        return None
    rate = sum(spec["flop"][warm:]) / sum(run["seconds"][warm - 1 :])
    return rate, rate / spec["peak"]


def cell(values: list[float], form: str) -> str:
    """Format a median with the minimum and maximum behind it."""
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}}-{max(values):{form}})"


def table(
    options: dict[str, Any],
    results: dict[str, list[dict[str, Any]]],
    skipped: dict[str, str],
    about: str,
    spec: dict[str, Any],
) -> str:
    """Return the text of train.md."""
    cuda, who = options["device"] == "cuda", contestants(options)
    rounds = {name: summary(runs, options["warm"], cuda) for name, runs in results.items() if runs}
    ours = results["ours"][0] if results.get("ours") else None
    memory = "peak GPU MB" if cuda else "peak RSS MB"
    lines = [
        about,
        "",
        (
            f"| contestant | step s | processed tokens/s | supervised tokens/s | {memory} | first"
            " step s | last loss | loss from ours | TFLOP/s | of peak | rounds |"
        ),
        "|---" * 11 + "|",
    ]
    for name in who:
        if name not in rounds:
            lines.append(f"| {name} | skipped: {skipped.get(name, 'not run yet')} |" + " |" * 9)
            continue
        numbers, apart = rounds[name], difference(results[name][0], ours)
        lines.append(
            f"| {name} | {cell(numbers['step'], '.3f')} | {cell(numbers['processed'], '.1f')} |"
            f" {cell(numbers['supervised'], '.1f')} | {cell(numbers['memory'], '.0f')} |"
            f" {cell(numbers['first'], '.2f')} | {statistics.median(numbers['loss']):.4f} |"
            f" {'other batches' if apart is None else f'{apart:.1e}'} |"
            f" {_work(results[name], ours, spec, options['warm'])} | {len(numbers['step'])} |"
        )
    peers = [name for name, (kind, _) in who.items() if kind in PEERS and name in rounds]
    mine = [name for name, (kind, _) in who.items() if kind not in PEERS and name in rounds]
    if peers and mine:
        lines += [
            "",
            (
                "Ours over the peer's, medians of the rounds: supervised tokens/s (more is better),"
                " peak memory and time to the first step (less is better)."
            ),
            "",
            "| | " + " | ".join(f"{name}: speed, memory, start" for name in mine) + " |",
            "|---" * (1 + len(mine)) + "|",
        ]
        for peer in peers:
            cells = [
                ", ".join(f"{value:.2f}x" for value in ratios(rounds, name, peer).values())
                for name in mine
            ]
            lines.append(f"| {peer} | {' | '.join(cells)} |")
    changed = [f"{name}: {' '.join(changes)}" for name, (_, changes) in who.items() if changes]
    lines += ["", *(f"- {line}" for line in changed)] if changed else []
    return "\n".join(lines) + "\n"


def _work(
    runs: list[dict[str, Any]], ours: dict[str, Any] | None, spec: dict[str, Any], warm: int
) -> str:
    """Return two cells: TFLOP/s, and their part of the peak."""
    each = [utilisation(run, ours, spec, warm) for run in runs]
    both = [pair for pair in each if pair is not None]
    if not both:
        return " | "
    rates, parts = zip(*both, strict=True)
    return f"{cell([rate / 1e12 for rate in rates], '.3f')} | {cell([*parts], '.1%')}"


def figures(
    options: dict[str, Any], results: dict[str, list[dict[str, Any]]], about: str
) -> dict[str, Any]:
    """Return the numbers of the table, to be posted or compared: for each contestant the values of
    all rounds, and the medians of ours over each peer's."""
    cuda, who = options["device"] == "cuda", contestants(options)
    numbers = {name: summary(runs, options["warm"], cuda) for name, runs in results.items() if runs}
    return {
        "about": about,
        "options": options,
        "contestants": {name: numbers[name] for name in who if name in numbers},
        "ours over": {
            name: ratios(numbers, "ours", name)
            for name, (kind, _) in who.items()
            if kind in PEERS and name in numbers and "ours" in numbers
        },
    }


def bars(
    options: dict[str, Any], results: dict[str, list[dict[str, Any]]]
) -> dict[str, tuple[list[str], list[list[float]]]]:
    """Return the plot's content: title -> (contestants, each one's values of the rounds)."""
    cuda = options["device"] == "cuda"
    rounds = {name: summary(runs, options["warm"], cuda) for name, runs in results.items() if runs}
    names = [name for name in contestants(options) if name in rounds]
    titles = {
        "supervised tokens/s": "supervised",
        "peak memory, MB": "memory",
        "seconds to the first step": "first",
    }
    return {title: (names, [rounds[name][key] for name in names]) for title, key in titles.items()}


def plot(options: dict[str, Any], results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw train.svg: medians as bars, minimum to maximum as lines."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = bars(options, results)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6))
    for axis, (title, (names, values)) in zip(axes, panels.items(), strict=True):
        medians = [statistics.median(each) for each in values]
        spread = [
            [m - min(v) for m, v in zip(medians, values, strict=True)],
            [max(v) - m for m, v in zip(medians, values, strict=True)],
        ]
        kinds = contestants(options)
        axis.bar(
            names,
            medians,
            yerr=spread,
            capsize=3,
            color=["#888888" if kinds[name][0] in PEERS else "#2b6cb0" for name in names],
        )
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=45)
    figure.tight_layout()
    figure.savefig(file)


def _processor() -> str:
    """Return the processor's name."""
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _formula(spec: dict[str, Any]) -> list[str]:
    """Describe the operations and the peak that they are compared with."""
    if "flop" not in spec:
        return []
    return [
        "",
        "FLOP by formula (trainer/models/flops.py): for each token 4 for a frozen weight and 6 for"
        " a trained one, for each trained position 4 V d, for each pair of query and key 12 H w in"
        f" a layer. The peak is {spec['peak'] / 1e12:.3g} TFLOP/s, {spec['peak_source']}.",
    ]


def described(
    options: dict[str, Any],
    spec: dict[str, Any],
    results: dict[str, list[dict[str, Any]]],
    command: str,
) -> str:
    """Describe machine, versions, work and command."""
    import psutil

    every = [run for runs in results.values() for run in runs]
    versions = {
        name: sorted({run["versions"][name] for run in every if name in run["versions"]})
        for name in ("torch", "transformers", "peft", "trl", "litgpt")
    }
    gpus = sorted({run["gpu"] for run in every if run["gpu"]})
    threads = sorted({run["threads"] for run in every if run["threads"]})
    steps = json.loads(Path(spec["rows"]).read_text("utf-8"))[options["warm"] :]
    real = statistics.mean(sum(len(row["input_ids"]) for row in rows) for rows in steps)
    trained = statistics.mean(
        sum(label != -100 for row in rows for label in row["labels"]) for rows in steps
    )
    wide = statistics.mean(
        len(rows) * (-(-max(len(row["input_ids"]) for row in rows) // 8) * 8) for rows in steps
    )
    model = (
        f"a Llama of {options['shape']} with random weights"
        if options["shape"]
        else options["base"]
    )
    lines = [
        f"# Training speed: {options['data']}, {model}",
        "",
        f"{_processor()}, {os.cpu_count()} cores, {'/'.join(map(str, threads)) or '?'} threads,"
        f" {psutil.virtual_memory().total / 2**30:.0f} GiB"
        + (f"; {', '.join(gpus)}" if gpus and options["device"] == "cuda" else "")
        + f"; Python {platform.python_version()}, "
        + ", ".join(f"{name} {'/'.join(many)}" for name, many in versions.items() if many)
        + ".",
        f"A warm step: {len(steps[0])} rows, {wide:.0f} positions, {real:.0f} of them tokens,"
        f" {trained:.0f} of these supervised. {spec['precision']}, adapters in"
        f" {options['adapter_dtype'] if spec['dtype'] == 'bfloat16' else 'float32'}"
        + (" (LitGPT: bfloat16)" if spec["dtype"] == "bfloat16" and not options["autocast"] else "")
        + f"; LoRA r={options['rank']} alpha={options['alpha']} on all linear layers, fused AdamW"
        f" at {options['lr']:g}, clip 1.0; {options['steps']} steps, the first {options['warm']}"
        " left out.",
        *_formula(spec),
        "",
        f"    {command}",
    ]
    return "\n".join(lines)
