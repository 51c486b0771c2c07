"""Compare drafters at equal training time, on the base's own text: the acceptance of their drafts,
and the speed-up.

    python -m scripts.bench.heads prompts=FILE.jsonl out=FOLDER [field=null] [base=smollm2_135m]
    [rows=600] [held_out=32]
        [max_new_tokens=96] [generate_batch=16] [drafters=[mtp_parallel,mtp_shared,mtp_medusa]]
        [offsets=3] [minutes=20] [rates=[1e-3]] [batch_size=8] [overrides=[]] [budget=null]
    python -m scripts.bench.heads out=FOLDER table=true

1. The base answers the first `rows` and the last `held_out` prompts of the file greedily (graft
respond), to
   OUT/responses and OUT/held_out. A prompt is a row's `field`, or without one its messages up to
   the last answer, or its prompt, question or turns.
2. Each drafter is trained alone on the frozen base (adapter=none) on those answers, `minutes` for
each of `rates`, with a warm-up of
   twenty steps and a constant rate, since the number of steps is not known before. `overrides` go
   to these runs.
3. graft speculate decodes the held-out prompts greedily: with the drafter, without it,
and by transformers' generate.

Every piece is a new process and a line of OUT/results.jsonl. The script can be stopped at any time
and resumes there. After `budget` minutes it starts no further piece. Then it writes OUT/heads.md
and OUT/heads.svg from the existing lines.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.processes import run, trained_parameters
from tasks import reading

DEFAULTS: dict[str, Any] = {
    "prompts": None,
    "out": None,
    "field": None,
    "base": "smollm2_135m",
    "rows": 600,
    "held_out": 32,
    "max_new_tokens": 96,
    "generate_batch": 16,
    "drafters": ["mtp_parallel", "mtp_shared", "mtp_medusa"],
    "offsets": 3,
    "minutes": 20,
    "rates": [1e-3],
    "batch_size": 8,
    "overrides": [],
    "budget": None,
    "table": False,
}


def responses(options: dict[str, Any]) -> None:
    """Write the base's greedy answers as chats, for training and held out. Existing answers are
    kept."""
    count = sum(1 for _ in reading.Source(options["prompts"], "train", False, "prompts"))
    if count < options["rows"] + options["held_out"]:
        raise SystemExit(f"{options['prompts']} has {count} rows, fewer than rows + held_out")
    parts = {
        "responses": (0, options["rows"]),
        "held_out": (count - options["held_out"], options["held_out"]),
    }
    for name, (skip, rows) in parts.items():
        run(
            [
                sys.executable,
                "-m",
                "trainer.respond",
                f"base={options['base']}",
                f"prompts={options['prompts']}",
                f"skip={skip}",
                f"rows={rows}",
                f"out={Path(options['out']) / name}",
                f"max_new_tokens={options['max_new_tokens']}",
                f"batch_size={options['generate_batch']}",
                *([f"field={options['field']}"] if options["field"] else []),
                *(
                    word
                    for word in options["overrides"]
                    if word.startswith(
                        ("base.", "precision=", "task.chat_template=", "task.system=")
                    )
                ),
            ]
        )


def complete(file: Path) -> list[str]:
    """Return the complete lines of a file. A truncated line of a killed process is removed."""
    if not file.exists():
        return []
    text = file.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, "utf-8")
    return whole.split("\n")[:-1]


def piece(drafter: str, rate: float, options: dict[str, Any]) -> dict[str, Any]:
    """Train one drafter, and decode with it."""
    out, name = Path(options["out"]), f"{drafter}-{rate:g}-{options['minutes']:g}min"
    folder = out / "runs" / name
    run(
        [
            sys.executable,
            "-m",
            "trainer",
            f"base={options['base']}",
            "adapter=none",
            f"drafter={drafter}",
            f"drafter.offsets={options['offsets']}",
            "task=sft",
            f"task.path={out / 'responses' / 'rows.jsonl'}",
            f"task.eval_path={out / 'held_out' / 'rows.jsonl'}",
            f"name={name}",
            f"runs={out}/runs",
            "logger=none",
            "max_epochs=null",
            f"max_time={options['minutes']}",
            f"batch_size={options['batch_size']}",
            f"optimizer.lr={rate}",
            "schedule=constant",
            "schedule.warmup=20",
            "callbacks.evaluation=null",
            "resume=auto",
            *options["overrides"],
        ]
    )
    run(
        [
            sys.executable,
            "-m",
            "trainer.speculate",
            f"run={folder}",
            f"heldout={options['held_out']}",
            f"max_new_tokens={options['max_new_tokens']}",
            f"json={folder}/speculate.json",
        ]
    )
    run([sys.executable, "-m", "trainer.evaluate", f"run={folder}", f"json={folder}/scores.json"])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "drafter": drafter,
        "rate": rate,
        "minutes": options["minutes"],
        "base": options["base"],
        "offsets": options["offsets"],
        "rows": len(complete(out / "responses" / "rows.jsonl")),
        "steps": max(row["step"] for row in steps if row["kind"] == "step"),
        "parameters": trained_parameters(folder),
        "decoding": json.loads((folder / "speculate.json").read_text()),
        "held_out": json.loads((folder / "scores.json").read_text())["adapted"],
    }


def table(done: list[dict[str, Any]]) -> str:
    """Return a table with a line for each piece."""
    most = max(len(row["decoding"]["positions"]) for row in done)
    heads = [
        "drafter",
        "rate",
        "min",
        "steps",
        "rows",
        "parameters",
        "tokens a step",
        *(f"taken {k}" for k in range(1, most + 1)),
    ]
    heads += ["transformers tokens/s", "own loop", "with the drafter", "ratio", "texts that differ"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in done:
        measured = row["decoding"]
        taken = [f"{place['taken'] / place['proposed']:.1%}" for place in measured["positions"]]
        cells = [
            row["drafter"],
            f"{row['rate']:g}",
            f"{row['minutes']:g}",
            f"{row['steps']}",
            f"{row['rows']}",
            f"{row['parameters']:,}",
        ]
        cells += [f"{measured['accepted']:.2f}", *taken, *[""] * (most - len(taken))]
        cells += [
            f"{measured[way]['tokens_per_second']:.1f}"
            for way in ("transformers", "plain", "drafter")
        ]
        cells += [
            f"{measured['drafter']['ratio']:.2f}",
            f"{measured['drafter']['different_texts']} of {measured['prompts']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + "\n\n`taken k`: the share of proposed k-th tokens that were accepted together with all"
        " before them.\n"
    )


def plot(done: list[dict[str, Any]], file: Path) -> None:
    """Plot each drafter at its best rate: the acceptance of each position, and tokens per second
    over transformers'."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    best: dict[str, dict[str, Any]] = {}
    for row in done:
        best_row = best.get(row["drafter"])
        if best_row is None or row["decoding"]["accepted"] > best_row["decoding"]["accepted"]:
            best[row["drafter"]] = row
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, row in best.items():
        taken = [place["taken"] / place["proposed"] for place in row["decoding"]["positions"]]
        left.plot(
            range(1, len(taken) + 1),
            taken,
            "o-",
            label=f"{name}, {row['decoding']['accepted']:.2f} tokens a step",
        )
    left.set(xlabel="draft position", ylabel="taken", ylim=(0, 1))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    right.bar(list(best), [row["decoding"]["drafter"]["ratio"] for row in best.values()])
    right.axhline(1, color="black", linewidth=1)
    right.set(ylabel="tokens/s over transformers' generate")
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Run what is missing, then write table and plot."""
    overrides: Any = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
    options = {**DEFAULTS, **overrides}
    if (
        overrides.keys() - DEFAULTS.keys()
        or options["out"] is None
        or (options["prompts"] is None and not options["table"])
    ):
        print(__doc__, file=sys.stderr)
        return 2
    out, started = Path(options["out"]), time.monotonic()
    results = out / "results.jsonl"
    if not options["table"]:
        responses(options)
        have = {
            (row["drafter"], row["rate"], row["minutes"])
            for row in map(json.loads, complete(results))
        }
        for drafter, rate in (
            (drafter, rate) for rate in options["rates"] for drafter in options["drafters"]
        ):
            if (
                options["budget"] is not None
                and time.monotonic() - started > 60 * options["budget"]
            ):
                break
            if (drafter, rate, options["minutes"]) in have:
                continue
            result = piece(drafter, rate, options)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            measured = result["decoding"]
            print(
                f"{drafter} {rate:g}: {measured['accepted']:.2f} tokens a step,"
                f" {measured['drafter']['ratio']:.2f} as fast",
                flush=True,
            )
    done = [json.loads(line) for line in complete(results)]
    if not done:
        print(f"{results} has no lines yet", file=sys.stderr)
        return 1
    text = table(done)
    (out / "heads.md").write_text(text, "utf-8")
    plot(done, out / "heads.svg")
    versions = (
        f"torch {__import__('torch').__version__}, transformers"
        f" {__import__('transformers').__version__}"
    )
    print(f"{text}\n{os.cpu_count()} cores, {platform.machine()}, {versions}; {out / 'heads.svg'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
