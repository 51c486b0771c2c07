"""Drafters side by side: trained on the same responses of the base for the same time, or not at
all, and what decoding with them gives.

    python -m scripts.bench.speculation prompts=FILE.jsonl out=FOLDER [field=null]
    [base=smollm2_135m] [rows=600] [held_out=32]
        [questions=FILE.jsonl] [each=0] [max_new_tokens=96] [generate_batch=16]
        [drafters=[eagle3,eagle,hydra,medusa,mtp_shared]] [untrained=[lookup,recycling]]
        [minutes=20] [rate=1e-3] [batch_size=8] [settings.NAME=[...]] [decodings.NAME=[...]]
        [only.DRAFTER=[...]] [widths=[1,2,3,4,5,6,7,8,12,16,24,32,48,64]] [context=256] [repeats=15]
        [overrides=[]] [budget=null]
    python -m scripts.bench.speculation out=FOLDER table=true

1. costs: a pass of the base over 1 .. 64 new tokens after `context` ones, as a chain and as
siblings of a tree, in turns, with the
   output head: the medians, over the pass of one token. python -m trainer.speculate tree=search
   searches a tree with the least ones.
2. The base answers the first `rows` and the last `held_out` prompts of the file greedily, as
scripts.bench.heads has it. 3. Each drafter is trained alone on the frozen base on those answers,
`minutes` each, with a warm-up of twenty steps and a constant rate.
   settings.NAME=[optimizer.lr=3e-4,drafter.offsets=5] go to that drafter's run, `overrides` to all.
4. python -m trainer.evaluate task=speculation decodes the held-out prompts, or `questions` in
Spec-Bench's layout (`each` of a category),
   greedily with each drafter, those without training too, in each of `decodings`: by default chain,
   which adds no option. decodings.eagle2=[tree=eagle2] adds one; only.DRAFTER=[chain] names those
   that one drafter is decoded with.

Every piece is a line of OUT/results.jsonl: the script can be stopped at any time and goes on where
it was, with other settings in another OUT; one that fails is told and left out. After `budget`
minutes it starts no further piece. Then it writes OUT/speculation.md and OUT/speculation.svg from
the lines that there are.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.heads import complete, responses
from scripts.bench.methods import run, trained_parameters

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
    """Median milliseconds of a pass over so many new tokens, of a chain and of siblings."""
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
    took = time_verification(target, prompt, options["widths"], options["repeats"])
    found: dict[str, Any] = {
        "kind": "costs",
        "base": options["base"],
        "context": options["context"],
        "dtype": str(dtype),
    }
    for shape, passes in took.items():
        medians = {n: 1000 * statistics.median(seconds) for n, seconds in passes.items()}
        found[shape] = {
            str(n): {
                "ms": ms,
                "least_ms": 1000 * min(passes[n]),
                "ratio": ms / medians[min(medians)],
            }
            for n, ms in medians.items()
        }
    return found


def folder_of(drafter: str, options: dict[str, Any]) -> Path:
    """The run of a drafter."""
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
    """Decode the prompts with one drafter in one way."""
    trained = drafter not in options["untrained"]
    # The base is the same in all runs: one without training takes any of them for it.
    folder = folder_of(drafter if trained else options["drafters"][0], options)
    file = Path(options["out"]) / f"{drafter}-{decoding}.json"
    which = [f"heldout={options['held_out']}"]
    if options["questions"]:
        which = [f"prompts={options['questions']}", f"each={options['each']}"]
    run(
        [
            sys.executable,
            "-m",
            "trainer.evaluate",
            "task=speculation",
            f"run={folder}",
            *which,
            f"max_new_tokens={options['max_new_tokens']}",
            f"json={file}",
            f"plot={file.with_suffix('.svg')}",
            *([] if trained else [f"drafter={drafter}"]),
            *options["decodings"][decoding],
        ]
    )
    found = json.loads(file.read_text())
    del found["each"]
    return {
        "kind": "decoding",
        "drafter": drafter,
        "decoding": decoding,
        "minutes": options["minutes"] if trained else None,
        "base": options["base"],
        "found": found,
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a piece from others."""
    return row["kind"], row.get("drafter"), row.get("decoding"), row.get("minutes"), row["base"]


def pieces(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All pieces, those without training last, since they take a run of one that was trained."""
    yield {"kind": "costs", "base": options["base"]}
    for drafter in [*options["drafters"], *options["untrained"]]:
        minutes = options["minutes"] if drafter in options["drafters"] else None
        piece = {"drafter": drafter, "minutes": minutes, "base": options["base"]}
        if minutes is not None:
            yield {"kind": "training", **piece}
        # What needs no training makes its own trees.
        for decoding in options["only"].get(
            drafter, options["decodings"] if minutes is not None else list(options["decodings"])[:1]
        ):
            yield {"kind": "decoding", "decoding": decoding, **piece}


def table(done: list[dict[str, Any]]) -> str:
    """One line for each decoding, and the costs of a pass."""
    trained = {(row["drafter"], row["minutes"]): row for row in done if row["kind"] == "training"}
    decoded = [row for row in done if row["kind"] == "decoding"]
    most = min(4, max((len(row["found"]["positions"]) for row in decoded), default=0))
    heads = [
        "drafter",
        "decoding",
        "min",
        "steps",
        "parameters",
        "tau",
        *(f"taken {k}" for k in range(1, most + 1)),
    ]
    heads += [
        "ms to draft",
        "ms to verify",
        "transformers tokens/s",
        "own loop",
        "with the drafter",
        "ratio",
        "texts that differ",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in decoded:
        found, training = row["found"], trained.get((row["drafter"], row["minutes"]))
        cells = [row["drafter"], row["decoding"]]
        cells += (
            [f"{row['minutes']:g}", f"{training['steps']}", f"{training['parameters']:,}"]
            if training
            else ["", "", ""]
        )
        cells += [interval(found["tau"])]
        taken = [place["conditional"] for place in found["positions"][:most]]
        cells += [
            *("-" if share is None else f"{share:.1%}" for share in taken),
            *[""] * (most - len(taken)),
        ]
        cells += [
            "-" if found["pass"][name] is None else f"{found['pass'][name]:.1f}"
            for name in ("draft_ms", "verify_ms")
        ]
        cells += [
            f"{found['ways'][way]['tokens_per_second']:.1f}"
            for way in ("transformers", "plain", "drafter")
        ]
        cells += [
            interval(found["speed_up"]["transformers"]),
            f"{found['different_texts']['drafter']} of {found['answers']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) if decoded else ""
    text += (
        "\n\ntau: tokens of a target pass, its own among them. taken k: how often the k-th drafted"
        " token was taken where all before it were. ratio: tokens/s over transformers' greedy"
        " generate, with 95 % of bootstraps over the prompts.\n"
    )
    for row in done:
        if row["kind"] == "costs":
            text += (
                f"\nA pass of {row['base']} over n tokens after {row['context']}, in"
                f" {row['dtype']}:\n\n"
            )
            text += f"| n | {' | '.join(row['chain'])} |\n{'|---' * (1 + len(row['chain']))}|\n"
            for shape in ("chain", "tree"):
                for name, digits in (("ms", 1), ("ratio", 2)):
                    values = " | ".join(f"{cost[name]:.{digits}f}" for cost in row[shape].values())
                    text += f"| {shape}, {name} | {values} |\n"
    return text


def interval(value: dict[str, Any]) -> str:
    """A ratio and where it may lie."""
    if value["value"] is None:
        return "-"
    return f"{value['value']:.2f}" + (
        "" if value["low"] is None else f" ({value['low']:.2f} to {value['high']:.2f})"
    )


def plot(done: list[dict[str, Any]], file: Path) -> None:
    """tau and tokens a second over transformers', and what a pass over more tokens takes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    decoded = [row for row in done if row["kind"] == "decoding"]
    names = [
        f"{row['drafter']}, {row['decoding']}" if row["minutes"] is not None else row["drafter"]
        for row in decoded
    ]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 1.5 + 0.3 * max(8, len(names)))
    )
    for panel, values, label in (
        (left, [row["found"]["tau"] for row in decoded], "tau: tokens of a target pass"),
        (
            middle,
            [row["found"]["speed_up"]["transformers"] for row in decoded],
            "tokens/s over transformers' generate",
        ),
    ):
        centres = [value["value"] or 0.0 for value in values]
        ends = [
            [
                centre - (value["low"] or centre)
                for centre, value in zip(centres, values, strict=True)
            ],
            [
                (value["high"] or centre) - centre
                for centre, value in zip(centres, values, strict=True)
            ],
        ]
        panel.barh(names, centres, xerr=ends, height=0.6)
        panel.invert_yaxis()
        panel.set(xlabel=label)
    middle.axvline(1, color="black", linewidth=1)
    middle.set_yticklabels([])
    for row in done:
        if row["kind"] == "costs":
            for shape in ("chain", "tree"):
                right.plot(
                    [int(n) for n in row[shape]],
                    [cost["ratio"] for cost in row[shape].values()],
                    "o-",
                    label=shape,
                )
            right.set(
                xlabel="tokens of a pass", ylabel="time over that of one token", ylim=(0, None)
            )
            right.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Run what is missing, then write table and plot."""
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
    options = {
        **DEFAULTS,
        **given,
        "decodings": {**DEFAULTS["decodings"], **given.get("decodings", {})},
    }
    if (
        given.keys() - DEFAULTS.keys()
        or options["out"] is None
        or (options["prompts"] is None and not options["table"])
    ):
        print(__doc__, file=sys.stderr)
        return 2
    if options["untrained"] and not options["drafters"]:
        print(
            "drafters=[]: those without training are measured beside at least one that is trained",
            file=sys.stderr,
        )
        return 2
    out, started = Path(options["out"]), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if not options["table"]:
        responses(options)
        have = {key(json.loads(line)) for line in complete(results)}
        for piece in pieces(options):
            if (
                options["budget"] is not None
                and time.monotonic() - started > 60 * options["budget"]
            ):
                break
            if key(piece) in have:
                continue
            try:
                if piece["kind"] == "costs":
                    result = costs(options)
                elif piece["kind"] == "training":
                    result = train(piece["drafter"], options)
                else:
                    result = decode(piece["drafter"], piece["decoding"], options)
            # the others may do, and the next start tries this one again
            except SystemExit as failed:
                print(failed, file=sys.stderr, flush=True)
                continue
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(
                " ".join(f"{part}" for part in key(piece) if part is not None), "done", flush=True
            )
    done = [json.loads(line) for line in complete(results)]
    if not done:
        print(f"{results} has no lines yet", file=sys.stderr)
        return 1
    text = table(done)
    (out / "speculation.md").write_text(text, "utf-8")
    plot(done, out / "speculation.svg")
    versions = (
        f"torch {__import__('torch').__version__}, transformers"
        f" {__import__('transformers').__version__}"
    )
    print(
        f"{text}\n{os.cpu_count()} cores, {platform.machine()}, {versions};"
        f" {out / 'speculation.svg'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
