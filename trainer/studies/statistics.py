"""The numbers of a study's table: means, paired differences with intervals, wins and losses."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from trainer.studies.pieces import UNTESTED, Piece, Results, at_edge, chosen_rate
from trainer.studies.plan import Study

# Student's t at 97.5 %, by degrees of freedom; beyond 30 it is taken as the last.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
DRAWS = 10_000

Rows = dict[str, dict[str, float]]  # of each row, by where it is: its loss and its scores


def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation (n - 1); None for the latter of one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def over_seeds(differences: list[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean of paired differences, by Student's t; None for one."""
    if len(differences) < 2:
        return None
    t = T975[min(len(differences) - 1, len(T975)) - 1]
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    middle = statistics.mean(differences)
    return middle - half, middle + half


def over_rows(differences: list[float], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean of paired differences, by a bootstrap over the rows (Efron
    1979); None for one row."""
    if len(differences) < 2:
        return None
    values = np.asarray(differences)
    draw = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[draw.integers(0, len(values), (min(1000, DRAWS - start), len(values)))].mean(1)
            for start in range(0, DRAWS, 1000)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summary(study: Study, results: Results) -> dict[str, Any]:
    """Return the table of each data set: {data: {method: numbers}}."""
    return {
        data: {
            method: row
            for method in study.methods
            if (row := _method(study, data, method, results)) is not None
        }
        for data in study.data
    }


def _method(study: Study, data: str, method: str, results: Results) -> dict[str, Any] | None:
    """Return the numbers of a method on a data set; None if none of its runs has ended."""
    rate = chosen_rate(study, data, method, results)
    runs = _runs(study, data, method, rate, results)
    if not runs:
        return None
    values: dict[str, list[float]] = {}
    for result in runs.values():
        for name, value in result.get("test", {}).items():
            values.setdefault(name, []).append(value)
    row = {
        "rate": rate,
        "edge": at_edge(study, data, method, results),
        "seeds": len(runs),
        "failed": _failures(data, method, results),
        "metrics": {name: mean_and_sd(each) for name, each in values.items()},
        "validation": mean_and_sd([r["validation"][study.choose] for r in runs.values()]),
        "parameters": next(iter(runs.values()))["parameters"],
        "step_seconds": min(
            (r["step_seconds"] for r in runs.values() if r["step_seconds"]), default=None
        ),
        "peak_bytes": statistics.median(r["peak_bytes"] for r in runs.values()),
        "adapter_bytes": next(iter(runs.values()))["adapter_bytes"],
        "steps": next(iter(runs.values()))["steps"],
    }
    if method != study.baseline:
        row["against"] = _against(study, data, runs, results)
    return row


def _failures(data: str, method: str, results: Results) -> int:
    return sum(
        "failed" in result
        for result in results.values()
        if (result["piece"]["data"], result["piece"]["method"]) == (data, method)
    )


def _runs(
    study: Study, data: str, method: str, rate: float | None, results: Results
) -> dict[int, dict[str, Any]]:
    """Return the finished runs of a method at its rate, by seed."""
    if rate is None:
        return {}
    pieces = {seed: Piece(data, method, rate, seed, False).key for seed in study.seeds}
    return {
        seed: results[key]
        for seed, key in pieces.items()
        if key in results and not {"failed", UNTESTED} & results[key].keys()
    }


def _against(
    study: Study, data: str, runs: dict[int, dict[str, Any]], results: Results
) -> dict[str, Any]:
    """Compare a method's runs with those of the baseline with the same seeds, metric by metric."""
    base_rate = chosen_rate(study, data, study.baseline, results)
    base = _runs(study, data, study.baseline, base_rate, results)
    seeds = [seed for seed in runs if seed in base]
    if not seeds:
        return {}
    names = [name for name in runs[seeds[0]].get("test", {}) if name in base[seeds[0]]["test"]]
    pairs = [(rows_of(study, runs[seed]), rows_of(study, base[seed])) for seed in seeds]
    compared = {}
    for name in names:
        differences = [runs[seed]["test"][name] - base[seed]["test"][name] for seed in seeds]
        by_row = _row_differences(pairs, name)
        compared[name] = {
            "difference": statistics.mean(differences),
            "over_seeds": over_seeds(differences),
            "over_rows": over_rows(by_row),
        }
        if by_row and name != "loss":
            compared[name] |= wins_and_losses(pairs, name)
    return compared


def rows_of(study: Study, result: dict[str, Any]) -> Rows:
    """Read what a run gave on each row of the test: `loss` per trained token, and the scores."""
    key = Piece(**result["piece"]).key
    return {
        row["where"]: {"loss": row["loss"], "tokens": row["tokens"], **row["scores"]}
        for row in read_rows(study.folder / "runs" / key / "test_rows.jsonl")
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the file of `graft evaluate rows=`, without the rows of task.eval_sets, whose numbers
    are their own; [] if there is none."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")[:-1]  # an answer may hold U+2028
    return [row for row in map(json.loads, lines) if "set" not in row]


def _row_differences(pairs: list[tuple[Rows, Rows]], name: str) -> list[float]:
    """Return the difference of each row, a mean over the seeds. Those of the loss are weighted by
    tokens, as the loss over all rows is."""
    if not pairs or not all(mine and theirs for mine, theirs in pairs):
        return []
    shared = [w for w in pairs[0][0] if all(w in m and w in t for m, t in pairs)]
    shared = [w for w in shared if all(name in m[w] and name in t[w] for m, t in pairs)]
    if not shared:
        return []
    weights = dict.fromkeys(shared, 1.0)
    if name == "loss":
        mean = statistics.mean(pairs[0][0][w]["tokens"] for w in shared)
        weights = {w: pairs[0][0][w]["tokens"] / mean for w in shared}
    return [weights[w] * statistics.mean(m[w][name] - t[w][name] for m, t in pairs) for w in shared]


def wins_and_losses(pairs: list[tuple[Rows, Rows]], name: str) -> dict[str, int]:
    """Count the answers, over all seeds, that scored higher than the baseline's, and lower."""
    signs = [
        mine[w][name] - theirs[w][name]
        for mine, theirs in pairs
        for w in mine
        if w in theirs and name in mine[w] and name in theirs[w]
    ]
    return {"wins": sum(sign > 0 for sign in signs), "losses": sum(sign < 0 for sign in signs)}
