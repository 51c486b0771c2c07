"""Memory of a step on one long row, with all of its prompt in the backward pass and with a window
of it (objective.context_window). Each case runs in a new process.

    python -m scripts.bench.context [lengths=[1024,2048,4096,8192,16384]] [answer=64] [window=64]
        [width=256] [layers=4] [path=FOLDER] [rank=16] [threads=1] [json=FILE]

The model is a Llama with random weights of `width` and `layers`, or the base at `path`; it has a
LoRA on all linear layers and the fused kernels of a run, in fp32. The last `answer` tokens are
trained. Columns: MB that autograd keeps between the passes, the process's peak above the model's
own memory, seconds of the step, the loss, and the cosine and ratio of norms between the gradient
with the window and the whole one (null where the whole one was not run).
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.options import parse
from scripts.bench.processes import worker, worker_arguments

DEFAULTS: dict[str, Any] = {
    "lengths": [1024, 2048, 4096, 8192, 16384],
    "answer": 64,
    "window": 64,
    "width": 256,
    "layers": 4,
    "path": None,
    "rank": 16,
    "threads": 1,
    "json": None,
    "most": 16384,  # rows longer than this are run with the window only
}
VOCABULARY = 4096


def model_of(options: dict[str, Any]) -> Any:
    """Return the base with a LoRA whose matrices are all random."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from adapters.delta import Start
    from adapters.lora import LoRAAdapter
    from trainer.speed import fused

    torch.manual_seed(0)
    if options["path"] is not None:
        model = AutoModelForCausalLM.from_pretrained(options["path"], dtype=torch.float32)
    else:
        width = options["width"]
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=options["layers"],
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 128),
            max_position_embeddings=max(options["lengths"]),
        )
        model = LlamaForCausalLM(config)
    fused.fuse(model)
    rank = options["rank"]
    adapter = LoRAAdapter(
        rank=rank,
        alpha=2.0 * rank,
        rslora=False,
        dropout=0.0,
        target_modules="all-linear",
        exclude_modules=[],
        lr_ratio=1.0,
        dtype="float32",
        fused=True,
        target_parameters=[],
        train_modules=[],
    )
    model = adapter.attach(model, Start(steps=1, data=list))
    for name, parameter in model.named_parameters():
        if name.endswith("delta.B"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def case(options: dict[str, Any], length: int, window: int | None, file: Path) -> dict[str, Any]:
    """Measure one step in this process, and write its gradient."""
    import torch

    from trainer.models.losses import CausalLoss

    model = model_of(options)
    loss = CausalLoss(model, None)
    loss.window = window
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length - options["answer"]] = -100
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    trained = [p for p in model.parameters() if p.requires_grad]
    own = sum(p.untyped_storage().nbytes() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summed, _ = loss({"input_ids": ids, "labels": labels})
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(size for pointer, size in sizes.items() if pointer not in storages)
    (summed / options["answer"]).backward()
    seconds = time.perf_counter() - start
    torch.save(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]), file)
    return {
        "length": length,
        "window": window,
        "held_bytes": held,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "model_bytes": own,
        "seconds": seconds,
        "loss": float(summed.detach()) / options["answer"],
    }


def compare(whole: Path, part: Path) -> dict[str, float | None]:
    """Return the cosine of two gradients, and the second's norm over the first's."""
    import torch

    if not whole.exists():
        return {"cosine": None, "norms": None}
    a, b = torch.load(whole).double(), torch.load(part).double()
    return {
        "cosine": float(a @ b / (a.norm() * b.norm())),
        "norms": float(b.norm() / a.norm()),
    }


def main() -> int:
    """Measure each length both ways, and print a table."""
    options = parse(DEFAULTS, __doc__)
    if arguments := worker_arguments():
        import torch

        torch.set_num_threads(options["threads"])
        length, window, out, file = arguments
        result = case(options, int(length), int(window) or None, Path(file))
        Path(out).write_text(json.dumps(result))
        return 0
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>7}{'window':>7}{'held MB':>9}{'peak MB':>9}{'s':>8}{'loss':>9}  gradient")
    for length in options["lengths"]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for window in (0, options["window"]):
                if not window and length > options["most"]:
                    continue
                words = [str(length), str(window), f"{folder}/case.json", f"{folder}/{window}.pt"]
                worker("scripts.bench.context", *words)
                row = json.loads((folder / "case.json").read_text())
                if window:
                    row |= compare(folder / "0.pt", folder / f"{window}.pt")
                rows.append(row)
                print(line(row), flush=True)
    text = json.dumps({"options": options, "load": os.getloadavg()[0], "rows": rows}, indent=1)
    if options["json"] is not None:
        Path(options["json"]).write_text(text + "\n", "utf-8")
    return 0


def line(row: dict[str, Any]) -> str:
    """Return a row's columns."""
    text = (
        f"{row['length']:7}{row['window'] or 'all':>7}{row['held_bytes'] / 1e6:9.1f}"
        f"{row['peak_bytes'] / 1e6:9.1f}{row['seconds']:8.2f}{row['loss']:9.4f}"
    )
    if row.get("cosine") is not None:
        text += f"  cosine {row['cosine']:.3f}, norm {row['norms']:.3f} of the whole one's"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
