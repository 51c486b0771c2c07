"""Growth of a step's cost with the row's length and with the vocabulary: ours against stock PEFT,
which computes all logits at once.

    python -m scripts.bench.growth [lengths=[128,...,4096]] [vocabularies=[8192,...,262144]]
        [length=1024] [vocabulary=32768] [ways=[full,ours,ours_fixed]] [layers=8] [width=256]
        [rank=16] [chunk=512] [dtype=float32] [steps=3] [seconds=20] [device=cpu] [threads=1]
        [out=FOLDER]

The model is a Llama with random weights and tied embeddings, with LoRA on all linear layers, AdamW,
one row, and every position supervised. Each case is a process. First the length grows at one
vocabulary, then the vocabulary at one length. Ways:

    full        peft.get_peft_model, model(input_ids, labels=...): logits of all positions
    ours        our LoRA, fused, and trainer.models.losses.CausalLoss with a run's settings: the
                larger the vocabulary, the fewer positions have logits at the same time
    ours_fixed  the same with objective.logits_chunk = `chunk`

Columns: processor and wall seconds of a step (the median without the first step; after `seconds` no
further step starts), and the peak memory of the steps above that of weights and libraries. An
exponent is the slope of log cost over log size: 1 is linear, 0 constant. Attention's products are
quadratic in the length, so `attention` is their share of all products. The last line is the length
from which on they are more than half.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse
from scripts.bench.processes import worker, worker_arguments

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
    """Return the inner width of an MLP: 8/3 of the model's, as in Llama, in multiples of 64."""
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
    """Return the length from which attention's products are more than all others."""
    other = products(width, layers, vocabulary, 1)
    return math.ceil((other["layers"] + other["head"]) / (layers * width))


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Return the slope of a straight line through log cost over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean = statistics.fmean(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def memory(device: str, reset: bool) -> int:
    """Return the peak memory in bytes since the last reset."""
    import torch

    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def llama(options: dict[str, Any], length: int, vocabulary: int) -> Any:
    """Return a Llama with random weights."""
    import torch
    import transformers

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
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(options["device"], getattr(torch, options["dtype"]))


Loss = Callable[[dict[str, Any]], Any]


def with_peft(model: Any, options: dict[str, Any]) -> tuple[Any, Loss]:
    """Return the model with PEFT's LoRA, and its loss of a batch."""
    import peft

    settings = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=2 * options["rank"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings).train()
    return adapted, lambda batch: adapted(**batch, use_cache=False).loss


def with_ours(model: Any, options: dict[str, Any], chunk: int | None) -> tuple[Any, Loss]:
    """Return the model with our LoRA, and its loss of a batch."""
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
    adapted = instantiate(plain["adapter"]).attach(model, Start()).train()
    loss = CausalLoss(adapted, chunk)
    return adapted, lambda batch: loss(batch)[0] / (batch["labels"].shape[1] - 1)


def case(options: dict[str, Any], way: str, length: int, vocabulary: int) -> dict[str, Any]:
    """Measure one case in this process."""
    import torch

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    model = llama(options, length, vocabulary)
    if way == "full":
        model, loss_of = with_peft(model, options)
    else:
        chunk = options["chunk"] if way == "ours_fixed" else None
        model, loss_of = with_ours(model, options, chunk)
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

    step(16)  # a small step: libraries that load on first use are not the steps' memory
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


def exponents(rows: list[dict[str, Any]], sweep: str, ways: list[str]) -> list[str]:
    """Return a line for each way, with the slope of each cost over all sizes of a sweep and over
    the larger half of them."""
    lines = []
    for way in ways:
        cases = [row for row in rows if row["sweep"] == sweep and row["way"] == way]
        if len(cases) < 2:
            continue
        sizes, half = [row[sweep] for row in cases], len(cases) // 2
        parts = []
        for cost in COSTS:
            values = [max(1e-9, row[cost]) for row in cases]
            upper = (
                f", {exponent(sizes[-half:], values[-half:]):.2f} from {sizes[-half]} on"
                if half > 1
                else ""
            )
            parts.append(f"{COSTS[cost]} {exponent(sizes, values):.2f}{upper}")
        lines.append(f"{way:10} over {sweep}: " + "; ".join(parts))
    return lines


def line(row: dict[str, Any]) -> str:
    """Return a case's line of the table."""
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
    """Plot processor time and peak memory over length and over vocabulary."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), constrained_layout=True)
    for column, sweep in enumerate(("length", "vocabulary")):
        for number, (cost, scale, unit) in enumerate(
            (("cpu_seconds", 1, "processor s a step"), ("peak_bytes", 1e-6, "peak MB"))
        ):
            axis = axes[number, column]
            for way in ways:
                cases = [row for row in rows if row["sweep"] == sweep and row["way"] == way]
                axis.plot(
                    [row[sweep] for row in cases],
                    [row[cost] * scale for row in cases],
                    marker="o",
                    label=way,
                )
            axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel=unit)
            axis.grid(True, which="both", alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(file)
    pyplot.close(figure)


def measured(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all cases. A case that is in both sweeps is measured once."""
    cases = [("length", n, options["vocabulary"]) for n in options["lengths"]]
    cases += [("vocabulary", options["length"], v) for v in options["vocabularies"]]
    measurements: dict[tuple[str, int, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for sweep, length, vocabulary in cases:
            counts = products(options["width"], options["layers"], vocabulary, length)
            share = counts["attention"] / sum(counts.values())
            for way in options["ways"]:
                if (way, length, vocabulary) not in measurements:
                    words = str(length), str(vocabulary), f"{folder}/case.json"
                    worker("scripts.bench.growth", way, *words)
                    measurements[way, length, vocabulary] = {
                        "length": length,
                        "vocabulary": vocabulary,
                        "way": way,
                        "attention": share,
                    } | json.loads(Path(folder, "case.json").read_text())
                yield {**measurements[way, length, vocabulary], "sweep": sweep}


def main() -> int:
    """Measure all cases in turn; print a table and exponents, and write a plot."""
    options = parse(DEFAULTS, __doc__)
    if words := worker_arguments():
        way, length, vocabulary, file = words
        Path(file).write_text(json.dumps(case(options, way, int(length), int(vocabulary))))
        return 0
    rows: list[dict[str, Any]] = []
    shape = f"{options['layers']} layers of {options['width']}, {options['dtype']}"
    print(
        f"{shape}; {options['threads']} threads of {os.cpu_count()} cores, load"
        f" {os.getloadavg()[0]:.1f}, {options['device']}\n\n{HEADER}"
    )
    for row in measured(options):
        rows.append(row)
        print(line(row), flush=True)
    equal = crossing(options["width"], options["layers"], options["vocabulary"])
    closing = [
        *exponents(rows, "length", options["ways"]),
        *exponents(rows, "vocabulary", options["ways"]),
        f"attention's products are more than all others from a length of {equal} at"
        f" {options['vocabulary']} tokens on",
    ]
    print("\n" + "\n".join(closing))
    if options["out"] is not None:
        write(options, rows, shape, closing)
    return 0


def write(
    options: dict[str, Any], rows: list[dict[str, Any]], shape: str, closing: list[str]
) -> None:
    """Write OUT/growth.md, growth.svg and growth.json."""
    import torch

    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    plot(rows, options["ways"], out / "growth.svg")
    machine = (
        f"{shape}; {options['threads']} threads of {os.cpu_count()} cores,"
        f" {platform.machine()}, torch {torch.__version__}"
    )
    table = "\n".join([HEADER, *map(line, rows)])
    notes = "\n".join(f"- {text}" for text in closing)
    (out / "growth.md").write_text(f"{machine}\n\n{table}\n\n{notes}\n", "utf-8")
    text = json.dumps({"options": options, "rows": rows}, indent=1) + "\n"
    (out / "growth.json").write_text(text, "utf-8")
    print(f"{out / 'growth.md'}, growth.svg")


if __name__ == "__main__":
    raise SystemExit(main())
