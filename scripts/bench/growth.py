"""How a step's cost grows with the row's length and with the vocabulary: ours against stock PEFT
with all logits at once.

    python -m scripts.bench.growth [lengths=[128,...,4096]] [vocabularies=[8192,...,262144]]
    [length=1024] [vocabulary=32768]
        [ways=[full,ours,ours_fixed]] [layers=8] [width=256] [rank=16] [chunk=512] [dtype=float32]
        [steps=3] [seconds=20] [device=cpu] [threads=1] [out=FOLDER]

Random Llama-shaped weights with tied embeddings, LoRA on all linear layers, AdamW, one row, every
position supervised; each case in a
process of its own. First the length grows at one vocabulary, then the vocabulary at one length.
Ways:

    full        peft.get_peft_model, model(input_ids, labels=...): logits of all positions
    ours        our LoRA, fused, and trainer.models.losses.CausalLoss as a run has it: the larger the vocabulary, the fewer positions' logits at once
    ours_fixed  the same with objective.logits_chunk = `chunk`

Columns: processor and wall seconds of a step (the median, first of all left out; no further one is
begun after `seconds`), and the peak memory of the steps above what weights and libraries take. An
exponent is the slope of log cost over log size: 1 is linear, 0 constant. Attention's own products
are quadratic in the length, so `attention` says which share of all products they are, and the last
line from where on they are the most.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import given

DEFAULTS: dict[str, Any] = {
    "lengths": [128, 256, 512, 1024, 2048, 4096],
    "vocabularies": [8192, 16384, 32768, 65536, 131072, 262144],
    "length": 1024,
    "vocabulary": 32768,
    "ways": ["full", "ours", "ours_fixed"],
    "layers": 8,
    "width": 256,
    "rank": 16,
    "chunk": 512,
    "dtype": "float32",
    "steps": 3,
    "seconds": 20,
    "device": "cpu",
    "threads": 1,
    "out": None,
}
HEAD = 64  # width of an attention head
COSTS = {
    "cpu_seconds": "processor time",
    "seconds": "wall clock",
    "peak_bytes": "peak memory above the weights",
}


def inner(width: int) -> int:
    """The width within an MLP: 8/3 of the model's, as Llama's, in multiples of 64."""
    return -(-width * 8 // 3 // 64) * 64


def products(width: int, layers: int, vocabulary: int, length: int) -> dict[str, int]:
    """Multiplications of a forward pass over one row: of the layers' matrices, of attention (a
    causal mask's half), of the head."""
    return {
        "layers": length * layers * (4 * width**2 + 3 * width * inner(width)),
        # q kᵀ and the sum of values, each over (length + 1) / 2 keys
        "attention": layers * length * (length + 1) * width,
        "head": length * width * vocabulary,
    }


def crossing(width: int, layers: int, vocabulary: int) -> int:
    """The length from which attention's products are more than all others."""
    other = products(width, layers, vocabulary, 1)
    return math.ceil((other["layers"] + other["head"]) / (layers * width))


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The slope of a straight line through log cost over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean = statistics.fmean(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def memory(device: str, reset: bool) -> int:
    """Bytes held at the most since the last reset, which begins with what is held now."""
    import torch

    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def case(options: dict[str, Any], way: str, length: int, vocabulary: int) -> dict[str, Any]:
    """One case in this process."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    width = options["width"]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner(width),
        num_hidden_layers=options["layers"],
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        max_position_embeddings=max(length, *options["lengths"]),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model: Any = transformers.LlamaForCausalLM(config).to(
        options["device"], getattr(torch, options["dtype"])
    )
    if way == "full":
        import peft

        settings = peft.LoraConfig(
            r=options["rank"],
            lora_alpha=2 * options["rank"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, settings).train()

        def loss_of(batch: dict[str, Any]) -> Any:
            return model(**batch, use_cache=False).loss

    else:
        from adapters.delta import Start
        from trainer.assembly.build import instantiate
        from trainer.config.compose import compose
        from trainer.models.losses import CausalLoss
        from trainer.speed import fused, malloc

        words = [
            f"adapter.rank={options['rank']}",
            f"adapter.alpha={2 * options['rank']}",
            "task.path=x",
        ]
        plain: Any = OmegaConf.to_container(compose(words), resolve=True)
        malloc.keep_freed()
        fused.fuse(model)
        model = instantiate(plain["adapter"]).attach(model, Start()).train()
        counted = CausalLoss(model, options["chunk"] if way == "ours_fixed" else None)

        def loss_of(batch: dict[str, Any]) -> Any:
            return counted(batch)[0] / (batch["labels"].shape[1] - 1)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(1)

    def step(count: int) -> float:
        ids = torch.randint(0, vocabulary, (1, count), generator=draw).to(options["device"])
        loss = loss_of({"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    step(16)  # small: what is loaded on first use is not the step's memory
    before = memory(options["device"], reset=True)
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < 2 or (
        len(times) <= options["steps"] and time.perf_counter() - began < options["seconds"]
    ):
        started = time.perf_counter(), time.process_time()
        loss = step(length)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    wall, processor = (statistics.median(values) for values in zip(*times[1:], strict=True))
    peak = memory(options["device"], reset=False) - before
    return {
        "seconds": wall,
        "cpu_seconds": processor,
        "peak_bytes": peak,
        "steps": len(times),
        "loss": loss,
    }


def worker(*arguments: str) -> None:
    """This program's own process for one case; what it prints on failure is printed."""
    command = [sys.executable, "-m", "scripts.bench.growth", *sys.argv[1:], "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with"
            f" {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def exponents(rows: list[dict[str, Any]], sweep: str, ways: list[str]) -> list[str]:
    """A line for each way, with the slope of each cost over all sizes of a sweep and over the
    larger half of them."""
    lines = []
    for way in ways:
        found = [row for row in rows if row["sweep"] == sweep and row["way"] == way]
        if len(found) < 2:
            continue
        sizes, half = [row[sweep] for row in found], len(found) // 2
        parts = []
        for cost in COSTS:
            values = [max(1e-9, row[cost]) for row in found]
            upper = (
                f", {exponent(sizes[-half:], values[-half:]):.2f} from {sizes[-half]} on"
                if half > 1
                else ""
            )
            parts.append(f"{COSTS[cost]} {exponent(sizes, values):.2f}{upper}")
        lines.append(f"{way:10} over {sweep}: " + "; ".join(parts))
    return lines


def line(row: dict[str, Any]) -> str:
    """A case's line of the table."""
    return (
        f"| {row['length']:6} | {row['vocabulary']:10} | {row['way']:9} | {row['cpu_seconds']:9.3f}"
        f" | {row['seconds']:7.3f} | {row['peak_bytes'] / 1e6:7.0f} | {row['attention']:9.1%} |"
        f" {row['loss']:7.4f} |"
    )


HEADER = (
    "| length | vocabulary | way       | cpu s/step | s/step | peak MB | attention | loss |\n"
    "| ---: | ---: | :--- | ---: | ---: | ---: | ---: | ---: |"
)


def plot(rows: list[dict[str, Any]], ways: list[str], file: Path) -> None:
    """Processor time and peak memory over length and over vocabulary."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), constrained_layout=True)
    for column, sweep in enumerate(("length", "vocabulary")):
        for place, (cost, scale, unit) in enumerate(
            (("cpu_seconds", 1, "processor s a step"), ("peak_bytes", 1e-6, "peak MB"))
        ):
            axis = axes[place, column]
            for way in ways:
                found = [row for row in rows if row["sweep"] == sweep and row["way"] == way]
                axis.plot(
                    [row[sweep] for row in found],
                    [row[cost] * scale for row in found],
                    marker="o",
                    label=way,
                )
            axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel=unit)
            axis.grid(True, which="both", alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> int:
    """Each case in turn; a table, exponents and a plot."""
    options = given(DEFAULTS, __doc__)
    if "--worker" in sys.argv:
        way, length, vocabulary, file = sys.argv[sys.argv.index("--worker") + 1 :]
        Path(file).write_text(json.dumps(case(options, way, int(length), int(vocabulary))))
        return 0
    cases = [("length", n, options["vocabulary"]) for n in options["lengths"]]
    cases += [("vocabulary", options["length"], v) for v in options["vocabularies"]]
    rows: list[dict[str, Any]] = []
    shape = f"{options['layers']} layers of {options['width']}, {options['dtype']}"
    print(
        f"{shape}; {options['threads']} threads of {os.cpu_count()} cores, load"
        f" {os.getloadavg()[0]:.1f}, {options['device']}\n\n{HEADER}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for sweep, length, vocabulary in cases:
            counts = products(options["width"], options["layers"], vocabulary, length)
            for way in options["ways"]:
                # Where both sweeps cross a case is measured once.
                known = next(
                    (
                        r
                        for r in rows
                        if (r["way"], r["length"], r["vocabulary"]) == (way, length, vocabulary)
                    ),
                    None,
                )
                if known is None:
                    worker(way, str(length), str(vocabulary), f"{folder}/case.json")
                    found = json.loads(Path(folder, "case.json").read_text())
                    share = counts["attention"] / sum(counts.values())
                    known = {
                        "length": length,
                        "vocabulary": vocabulary,
                        "way": way,
                        "attention": share,
                    } | found
                rows.append({**known, "sweep": sweep})
                print(line(rows[-1]), flush=True)
    from_ = crossing(options["width"], options["layers"], options["vocabulary"])
    closing = [
        text
        for sweep in ("length", "vocabulary")
        for text in exponents(rows, sweep, options["ways"])
    ]
    closing.append(
        f"attention's products are more than all others from a length of {from_} at"
        f" {options['vocabulary']} tokens on"
    )
    print("\n" + "\n".join(closing))
    if options["out"] is not None:
        out = Path(options["out"])
        out.mkdir(parents=True, exist_ok=True)
        plot(rows, options["ways"], out / "growth.svg")
        import torch

        machine = (
            f"{shape}; {options['threads']} threads of {os.cpu_count()} cores,"
            f" {platform.machine()}, torch {torch.__version__}"
        )
        table = "\n".join([HEADER, *map(line, rows)])
        (out / "growth.md").write_text(
            f"{machine}\n\n{table}\n\n" + "\n".join(f"- {text}" for text in closing) + "\n", "utf-8"
        )
        (out / "growth.json").write_text(
            json.dumps({"options": options, "rows": rows}, indent=1) + "\n", "utf-8"
        )
        print(f"{out / 'growth.md'}, growth.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
