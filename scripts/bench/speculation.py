"""A comparison of drafters: trained on the same responses of the base for the same time, or without
training, and then used for decoding.

    python -m scripts.bench.speculation prompts=FILE.jsonl out=FOLDER [field=null]
        [base=smollm2_135m] [rows=600] [held_out=32]
        [questions=FILE.jsonl] [each=0] [max_new_tokens=96] [generate_batch=16]
        [drafters=[eagle3,eagle,hydra,medusa,mtp_shared]] [untrained=[lookup,recycling]]
        [minutes=20] [rate=1e-3] [batch_size=8] [settings.NAME=[...]] [decodings.NAME=[...]]
        [only.DRAFTER=[...]] [widths=[1,2,3,4,5,6,7,8,12,16,24,32,48,64]] [context=256] [repeats=15]
        [overrides=[]] [budget=null]
    python -m scripts.bench.speculation out=FOLDER table=true

1. costs: passes of the base over 1 .. 64 new tokens after `context` tokens, with the output head,
   as a chain and as siblings of a tree, in turns. The table has the medians, over that of one
   token. graft speculate tree=search searches a tree with the minimum times.
2. The base answers the first `rows` and the last `held_out` prompts of the file greedily, as in
   scripts.bench.heads.
3. Each drafter is trained alone on the frozen base with those answers, for `minutes`, with a
   warm-up of twenty steps and a constant rate. settings.NAME=[optimizer.lr=3e-4,drafter.offsets=5]
   are overrides for that drafter's run, `overrides` for all.
4. graft evaluate task=speculation decodes the held-out prompts, or `questions` in
   Spec-Bench's layout (`each` of a category), greedily with each drafter, also those without
   training, in each of `decodings`. The default is chain, which adds no option.
   decodings.eagle2=[tree=eagle2] adds one; only.DRAFTER=[chain] limits a drafter to those named.

Every piece is a line of OUT/results.jsonl. The script can be stopped at any time and continues
there; use another OUT for other settings. A piece that fails is reported and skipped. After
`budget` minutes no further piece starts. Then OUT/speculation.md and OUT/speculation.svg are
written from the existing lines.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.heads import complete, responses
from scripts.bench.options import parse
from scripts.bench.processes import run, trained_parameters
from scripts.bench.speculation_table import plot, table

DEFAULTS: dict[str, Any] = {
    "prompts": None,
    "out": None,
    "field": None,
    "base": "smollm2_135m",
    "rows": 600,
    "held_out": 32,
    "questions": None,
    "each": 0,
    "max_new_tokens": 96,
    "generate_batch": 16,
    "drafters": ["eagle3", "eagle", "hydra", "medusa", "mtp_shared"],
    "untrained": ["lookup", "recycling"],
    "minutes": 20,
    "rate": 1e-3,
    "batch_size": 8,
    "settings": {},
    "decodings": {"chain": []},
    "only": {},
    "widths": [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64],
    "context": 256,
    "repeats": 15,
    "overrides": [],
    "budget": None,
    "table": False,
}


def costs(options: dict[str, Any]) -> dict[str, Any]:
    """Return the median milliseconds of a pass by its new tokens, as chain and as tree."""
    import torch

    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.decoding.calibration import time_verification
    from trainer.drafters import Target
    from trainer.models import precision

    quiet.quiet()
    plain: Any = OmegaConf.to_container(
        compose.compose(
            [f"base={options['base']}", "task=sft", "task.path=x", *options["overrides"]]
        ),
        resolve=True,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = instantiate(plain["base"])
    dtype, _, _ = precision.compute(
        plain["precision"], plain["base"]["dtype"], False, device.type == "cuda"
    )
    target = Target(described.load(dtype, None, device).eval())
    vocabulary = target.config.vocab_size
    prompt = torch.randint(
        vocabulary, (options["context"],), generator=torch.Generator().manual_seed(0)
    ).to(device)
    seconds_of = time_verification(target, prompt, options["widths"], options["repeats"])
    result: dict[str, Any] = {
        "kind": "costs",
        "base": options["base"],
        "context": options["context"],
        "dtype": str(dtype),
    }
    for shape, passes in seconds_of.items():
        medians = {n: 1000 * statistics.median(seconds) for n, seconds in passes.items()}
        result[shape] = {
            str(n): {
                "ms": ms,
                "least_ms": 1000 * min(passes[n]),
                "ratio": ms / medians[min(medians)],
            }
            for n, ms in medians.items()
        }
    return result


def folder_of(drafter: str, options: dict[str, Any]) -> Path:
    """Return the run folder of a drafter."""
    return Path(options["out"]) / "runs" / f"{drafter}-{options['minutes']:g}min"


def train(drafter: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train one drafter on the responses."""
    out, folder = Path(options["out"]), folder_of(drafter, options)
    run(
        [
            sys.executable,
            "-m",
            "trainer",
            f"base={options['base']}",
            "objective=distill",
            "adapter=none",
            f"drafter={drafter}",
            "task=sft",
            f"task.path={out / 'responses' / 'rows.jsonl'}",
            f"task.eval_path={out / 'held_out' / 'rows.jsonl'}",
            f"name={folder.name}",
            f"runs={folder.parent}",
            "logger=none",
            "max_epochs=null",
            f"max_time={options['minutes']}",
            f"batch_size={options['batch_size']}",
            f"optimizer.lr={options['rate']}",
            "schedule=constant",
            "schedule.warmup=20",
            "callbacks.evaluation=null",
            "resume=auto",
            *options["overrides"],
            *options["settings"].get(drafter, []),
        ]
    )
    run([sys.executable, "-m", "trainer.evaluate", f"run={folder}", f"json={folder}/scores.json"])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "kind": "training",
        "drafter": drafter,
        "minutes": options["minutes"],
        "base": options["base"],
        "settings": options["settings"].get(drafter, []),
        "rows": len(complete(out / "responses" / "rows.jsonl")),
        "steps": max(row["step"] for row in steps if row["kind"] == "step"),
        "parameters": trained_parameters(folder),
        "held_out": json.loads((folder / "scores.json").read_text())["adapted"],
    }


def decode(drafter: str, decoding: str, options: dict[str, Any]) -> dict[str, Any]:
    """Decode the prompts with one drafter and one of `decodings`."""
    trained = drafter not in options["untrained"]
    # all runs have the same base: a drafter without training uses any of them
    folder = folder_of(drafter if trained else options["drafters"][0], options)
    file = Path(options["out"]) / f"{drafter}-{decoding}.json"
    prompts = [f"heldout={options['held_out']}"]
    if options["questions"]:
        prompts = [f"prompts={options['questions']}", f"each={options['each']}"]
    run(
        [
            sys.executable,
            "-m",
            "trainer.evaluate",
            "task=speculation",
            f"run={folder}",
            *prompts,
            f"max_new_tokens={options['max_new_tokens']}",
            f"json={file}",
            f"plot={file.with_suffix('.svg')}",
            *([] if trained else [f"drafter={drafter}"]),
            *options["decodings"][decoding],
        ]
    )
    result = json.loads(file.read_text())
    del result["each"]
    return {
        "kind": "decoding",
        "drafter": drafter,
        "decoding": decoding,
        "minutes": options["minutes"] if trained else None,
        "base": options["base"],
        "found": result,
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key that identifies a piece."""
    return row["kind"], row.get("drafter"), row.get("decoding"), row.get("minutes"), row["base"]


def pieces(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all pieces. Drafters without training come last, since they use the run of a trained
    one."""
    yield {"kind": "costs", "base": options["base"]}
    for drafter in [*options["drafters"], *options["untrained"]]:
        minutes = options["minutes"] if drafter in options["drafters"] else None
        piece = {"drafter": drafter, "minutes": minutes, "base": options["base"]}
        if minutes is not None:
            yield {"kind": "training", **piece}
        # drafters without training build their trees themselves
        for decoding in options["only"].get(
            drafter, options["decodings"] if minutes is not None else list(options["decodings"])[:1]
        ):
            yield {"kind": "decoding", "decoding": decoding, **piece}


def run_all(options: dict[str, Any], results: Path) -> None:
    """Run all pieces that have no line yet, until `budget` is spent."""
    started = time.monotonic()
    responses(options)
    done = {key(json.loads(line)) for line in complete(results)}
    for piece in pieces(options):
        minutes = (time.monotonic() - started) / 60
        if options["budget"] is not None and minutes > options["budget"]:
            break
        if key(piece) in done:
            continue
        try:
            if piece["kind"] == "costs":
                result = costs(options)
            elif piece["kind"] == "training":
                result = train(piece["drafter"], options)
            else:
                result = decode(piece["drafter"], piece["decoding"], options)
        # the other pieces may work, and the next start tries this one again
        except SystemExit as failed:
            print(failed, file=sys.stderr, flush=True)
            continue
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(" ".join(f"{part}" for part in key(piece) if part is not None), "done", flush=True)


def main() -> int:
    """Run the missing pieces, then write table and plot."""
    options = parse(DEFAULTS, __doc__)
    options["decodings"] = {**DEFAULTS["decodings"], **options["decodings"]}
    if options["out"] is None or (options["prompts"] is None and not options["table"]):
        print(__doc__, file=sys.stderr)
        return 2
    if options["untrained"] and not options["drafters"]:
        print(
            "drafters=[]: drafters without training need at least one that is trained",
            file=sys.stderr,
        )
        return 2
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if not options["table"]:
        run_all(options, results)
    done = [json.loads(line) for line in complete(results)]
    if not done:
        print(f"{results} has no lines yet", file=sys.stderr)
        return 1
    text = table(done)
    (out / "speculation.md").write_text(text, "utf-8")
    plot(done, out / "speculation.svg")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(
        f"{text}\n{os.cpu_count()} cores, {platform.machine()}, {versions};"
        f" {out / 'speculation.svg'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
