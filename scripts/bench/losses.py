"""Three implementations of the vocabulary's loss: all logits at once, ours chunk by chunk, and
torch's fused operation. Each case runs in a new process.

    python -m scripts.bench.losses [positions=[1024,2048]] [heads=[1,4]] [dtypes=[bfloat16,float32]]
        [ways=[...]] [repeats=3] [seconds=30] [threads=1] [device=cpu] [width=576]
        [vocabulary=49152] [json=FILE]

A case is the summed mean cross-entropy of `heads` sets of `positions` hidden states under one
frozen output head, forward and backward to those states, as in the main loss and a drafter's
offsets. The shapes are SmolLM2's. The numbers are the same in each dtype, since they are rounded to
bf16 first. Ways:

    materialised   every head's logits, then F.cross_entropy(logits.float())
    ours_C         trainer.models.losses.chunked_predictions with chunks of C positions; it also
                   returns which guesses are correct
    torch_C        F.linear_cross_entropy(reduction="mean") with
                   LinearCrossEntropyOptions(batch_chunk_size=C)
    torch_auto     the same with the chunk that torch chooses
    torch_none_C   reduction="none", and the mean in fp32

Columns: median seconds of wall clock and of processor time (without the first of several passes; no
further pass starts after `seconds`), peak memory above the inputs, the largest error of a head's
reported mean loss against float64, and the relative error of the gradient (on every sixteenth
position).
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.options import parse
from scripts.bench.processes import worker, worker_arguments

DEFAULTS: dict[str, Any] = {
    "positions": [1024, 2048],
    "heads": [1, 4],
    "dtypes": ["bfloat16", "float32"],
    "repeats": 3,
    "seconds": 30,
    "threads": 1,
    "device": "cpu",
    "width": 576,
    "vocabulary": 49152,
    "json": None,
    "ways": ["materialised", "ours_256", "ours_512", "torch_256", "torch_auto", "torch_none_256"],
}
SAMPLE = 16  # the gradient is compared with float64 on every 16th position


def inputs(options: dict[str, Any], dtype: Any, device: str) -> tuple[Any, Any, Any]:
    """Return (hidden (K, n, d), weight (V, d), targets (K, n)) of the largest case; a smaller case
    uses the first of them."""
    import torch

    draw = torch.Generator().manual_seed(0)

    def filled(std: float, *shape: int) -> torch.Tensor:
        # Block by block: a temporary of the full size would be the measured peak.
        block_tensor = torch.empty(shape, dtype=dtype)
        for block in block_tensor.view(-1, shape[-1]).split(1024):
            block.copy_(torch.randn(block.shape, generator=draw).mul_(std).bfloat16())
        return block_tensor.to(device)

    weight = filled(0.1, options["vocabulary"], options["width"])
    hidden = filled(1.0, max(options["heads"]), max(options["positions"]), options["width"])
    return (
        hidden,
        weight,
        torch.randint(0, len(weight), hidden.shape[:2], generator=draw).to(device),
    )


def exact(options: dict[str, Any], file: str) -> None:
    """Write each position's loss (K, n) and every sixteenth's d loss / d hidden (K, n / 16, d), in
    float64."""
    import torch

    hidden, weight, targets = inputs(options, torch.float64, "cpu")
    losses = torch.empty(targets.shape, dtype=torch.float64)
    gradients = torch.empty(hidden[:, ::SAMPLE].shape, dtype=torch.float64)
    for head, start in itertools.product(range(len(hidden)), range(0, hidden.shape[1], 8 * SAMPLE)):
        rows = slice(start, start + 8 * SAMPLE)
        logits, target = hidden[head, rows] @ weight.T, targets[head, rows, None]
        total = logits.logsumexp(-1, keepdim=True)
        losses[head, rows] = (total - logits.gather(-1, target))[:, 0]
        slopes = (logits[::SAMPLE] - total[::SAMPLE]).exp()
        slopes.scatter_add_(-1, target[::SAMPLE], torch.full_like(total[::SAMPLE], -1.0))
        gradients[head, start // SAMPLE : start // SAMPLE + len(slopes)] = slopes @ weight
    torch.save((losses, gradients), file)


def means(way: str, hidden: Any, weight: Any, targets: Any) -> list[Any]:
    """Return each head's mean loss, differentiable."""
    import torch
    from torch.nn import functional as F

    from trainer.models.losses import chunked_predictions

    name, _, chunk = way.rpartition("_")
    pairs = list(zip(hidden, targets, strict=True))
    if way == "materialised":
        return [F.cross_entropy(F.linear(h, weight).float(), t) for h, t in pairs]
    if name == "ours":
        return [
            chunked_predictions(h, t, lambda part: F.linear(part, weight), int(chunk))[0] / len(h)
            for h, t in pairs
        ]
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    settings = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=None if chunk == "auto" else int(chunk)
    )
    reduction = "none" if name == "torch_none" else "mean"
    return [
        F.linear_cross_entropy(h, weight, t, reduction=reduction, options=settings).float().mean()
        for h, t in pairs
    ]


def case(
    options: dict[str, Any], way: str, dtype: str, positions: int, heads: int, file: str
) -> dict[str, Any]:
    """Measure one case in this process; `exact` wrote `file`. Return {skipped: reason} if this
    torch lacks the operation."""
    import torch

    cuda = options["device"] != "cpu"
    hidden, weight, targets = inputs(options, getattr(torch, dtype), options["device"])
    hidden, targets = (
        hidden[:heads, :positions].clone().requires_grad_(True),
        targets[:heads, :positions].contiguous(),
    )
    try:  # a small call first: libraries that load on first use are not the loss's memory
        sum(means(way, hidden[:, :2], weight[:8], targets[:, :2] % 8)).backward()  # type: ignore[union-attr]
    except NotImplementedError as error:
        return {"skipped": str(error)}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while not times or (
        len(times) <= options["repeats"] and time.perf_counter() - began < options["seconds"]
    ):
        hidden.grad = None
        started = time.perf_counter(), time.process_time()
        reported = means(way, hidden, weight, targets)
        sum(reported).backward()  # type: ignore[union-attr]
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    losses, gradients = torch.load(file)
    assert hidden.grad is not None
    gradient = hidden.grad[:, ::SAMPLE].double().cpu() * positions
    target = gradients[:heads, : gradient.shape[1]]
    wall, processor = (
        statistics.median(values) for values in zip(*(times[1:] or times), strict=True)
    )
    return {
        "seconds": wall,
        "cpu_seconds": processor,
        "passes": len(times),
        "peak_bytes": peak - before,
        "loss_error": max(
            abs(float(r) - float(w))
            for r, w in zip(reported, losses[:heads, :positions].mean(1), strict=True)
        ),
        "gradient_error": float((gradient - target).norm() / target.norm()),
    }


def main() -> int:
    """Measure each case in turn, and print a table."""
    options = parse(DEFAULTS, __doc__)
    if words := worker_arguments():
        import torch

        torch.set_num_threads(options["threads"])
        file, *what = words
        if what:
            way, dtype, positions, heads, out = what
            result = case(options, way, dtype, int(positions), int(heads), file)
            Path(out).write_text(json.dumps(result | {"torch": torch.__version__}))
        else:
            exact(options, file)
        return 0
    rows: list[dict[str, Any]] = []
    print(
        f"{options['threads']} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f},"
        f" {options['device']}",
        flush=True,
    )
    print(
        f"\n{'dtype':10}{'n':>6}{'heads':>6}  {'way':16}{'s':>8}{'cpu s':>8}{'passes':>7}"
        f"{'peak MB':>9}{'loss error':>12}{'gradient':>10}"
    )
    with tempfile.TemporaryDirectory() as folder:
        worker("scripts.bench.losses", f"{folder}/exact.pt")
        for dtype, n, heads, way in itertools.product(
            *(options[key] for key in ("dtypes", "positions", "heads", "ways"))
        ):
            case_words = way, dtype, str(n), str(heads), f"{folder}/case.json"
            worker("scripts.bench.losses", f"{folder}/exact.pt", *case_words)
            row = {
                "dtype": dtype,
                "positions": n,
                "heads": heads,
                "way": way,
                "load": os.getloadavg()[0],
            }
            rows.append(row | json.loads(Path(folder, "case.json").read_text()))
            print(f"{dtype:10}{n:6}{heads:6}  {way:16}" + line(rows[-1]), flush=True)
            if options["json"] is not None:
                Path(options["json"]).write_text(
                    json.dumps({"options": options, "rows": rows}, indent=1) + "\n", "utf-8"
                )
    print(f"\ntorch {rows[-1]['torch']}, load {os.getloadavg()[0]:.1f} at the end")
    return 0


def line(row: dict[str, Any]) -> str:
    """Return a row's measured columns."""
    if "skipped" in row:
        return f"  skipped: {row['skipped']}"
    return (
        f"{row['seconds']:8.2f}{row['cpu_seconds']:8.2f}{row['passes']:7}"
        f"{row['peak_bytes'] / 1e6:9.0f}{row['loss_error']:12.1e}{row['gradient_error']:10.1e}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
