"""Several runs' adapters, combined into one folder that stock PEFT loads.

The folder is compared before it counts as written: with the base's own weights plus the update that
was meant. With method=cat that is the weighted sum of the runs' updates, else what PEFT's method
makes of them.

merge.json has the runs with the digests of their checkpoints, the method, and the figures.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import combine, containers, io
from adapters.combine import Combination, LowRank, Sparse, Summed
from adapters.delta import AdapterError
from adapters.sparse import layers
from adapters.sparse_adapter import SparseAdapter
from trainer.assembly.rows import load_data
from trainer.assembly.trained import Trained, dequantised, load_trained
from trainer.data.held_out import HeldOut
from trainer.evaluation.loss import losses
from trainer.exporting import card_merged, combinable
from trainer.exporting.adapter import check_tensors, save_adapter
from trainer.exporting.compare import compare, effect, outputs
from trainer.exporting.serving import Serving
from trainer.models.losses import CausalLoss
from trainer.storage import atomic, door
from trainer.storage.progress import Progress

RECORD = "merge.json"
BATCH_SIZE = 16


@dataclass
class Source:
    """A run's adapter, taken off its model."""

    run: str
    record: dict[str, Any]  # the run, its id, the step and the checkpoint's digest
    folder: Path | None  # its low-rank part, as stock PEFT reads it
    sparse: dict[str, Sparse]
    held_out: HeldOut | None
    logits_chunk: int
    loss: float | None


@dataclass
class Merged:
    """The result of `merge`. Losses are per trained token of each run's held-out rows."""

    out: Path
    difference: float  # of the loaded folder's logits, over their spread
    from_sum: float  # norm of (update - weighted sum of the updates) over that of the sum
    losses: list[dict[str, Any]] = field(default_factory=list)  # run, own, merged


def merge(runs: list[str], how: Combination, out: Path, evaluate: bool) -> Merged:
    """Combine the adapters of runs of one base, write the folder, load it back and compare.

    Raises:
        AdapterError, FolderError: the runs cannot be combined, or the folder exists.
        Mismatch: the loaded folder answers differently; nothing is left behind.
    """
    door.refuse_existing(out, "to=FOLDER")
    contents = combinable.read(runs)
    combinable.check_method(runs, contents, how.method, how.rank)
    with atomic.folder(out) as temporary, Progress(f"merging {len(runs)} runs to {out}"):
        parts = temporary / "parts"
        sources, first = [], None
        for position, run in enumerate(runs):
            source = load_trained(run, _device(contents[position]["config"]), fp32=True)
            sources.append(_taken_off(run, source, parts / str(position), evaluate))
            if first is None:
                Serving.of(source).write(temporary, source.model)
                first = source
            source.model = nn.Module()  # its memory is free before the next is loaded
        assert first is not None
        result = _written(first, sources, how, temporary)
        result.out = out
        shutil.rmtree(parts, ignore_errors=True)
        record = _record(contents[0], sources, how, result)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        card_merged.write(temporary, out.name, contents, record)
    return result


def _device(config: dict[str, Any]) -> torch.device:
    quantised = config["base"].get("quantization", "none") != "none"
    return torch.device("cuda" if torch.cuda.is_available() and not quantised else "cpu")


@torch.no_grad()
def _taken_off(run: str, source: Trained, folder: Path, evaluate: bool) -> Source:
    """Save a run's low-rank part into `folder`, and copy its sparse part."""
    if not source.adapter.exportable:
        raise AdapterError(
            f"{run} has an adapter that stock PEFT cannot load, on this base:"
            " graft export to=merged writes its model"
        )
    held_out = loss = None
    chunk = source.config["objective"]["logits_chunk"]
    if evaluate:
        held_out = load_data(source.config, source.base, source.task, train=False).held_out
        loss = _loss(source.model, held_out, chunk)
    adapter: Any = source.adapter
    own = isinstance(adapter, SparseAdapter)
    sparse = {
        name: (layer.delta.indices.cpu().clone(), layer.delta.values.detach().cpu().clone())
        for name, layer in layers(source.model)
        if layer.delta.has_support
    }
    if own and not sparse and adapter.rank is None:
        raise AdapterError(
            f"{run} ended before its mask: it has no update yet. Train it for longer"
        )
    low = not own or adapter.rank is not None
    if low and own:
        kind = io.task_type(source.model, False)
        containers.save_low_rank(source.adapter, source.model, folder, source.base.path, kind)
    elif low:
        save_adapter(source.adapter, source.model, source.base, source.task, folder)
    record = source.adapted or {}
    return Source(run, record, folder if low else None, sparse, held_out, chunk, loss)


def _loss(model: nn.Module, rows: HeldOut | None, chunk: int) -> float | None:
    if rows is None:
        return None
    device = next(model.parameters()).device
    return losses(CausalLoss(model, chunk), rows, BATCH_SIZE, device).get("loss")


@torch.no_grad()
def _written(first: Trained, sources: list[Source], how: Combination, folder: Path) -> Merged:
    """Combine the parts, write the adapter into `folder`, load it back and compare."""
    model: Any = first.base.load(torch.float32, None)
    folders = {i: source.folder for i, source in enumerate(sources) if source.folder is not None}
    low = combine.low_rank(model, folders, how) if folders else LowRank(0, {}, [], False)
    kind = io.task_type(model, False)
    if any(source.sparse for source in sources):
        sparse = combine.add_sparse(low, model, [source.sparse for source in sources], how)
        adapter: Any = Summed(low.rank)
        adapter.put(model, low, sparse)
        adapter.save(model, folder, first.base.path, kind)
        adapter.take_off(model)
    else:
        adapter = Summed(low.rank)
        _save_low_rank(low, model, folder, first.base.path, kind)
    if first.base.quantization != "none" or first.base.is_quantized:
        model = dequantised(model)
    base_logits = outputs(model, first)[-1]
    for name, update in low.meant.items():
        _add(model.get_submodule(name), update)
    expected = outputs(model, first)
    loaded = adapter.load_stock(first.base.load(torch.float32, None), folder).eval()
    check_tensors(loaded, folder)
    moved = effect(expected[-1], base_logits)
    result = Merged(folder, compare(expected, outputs(loaded, first), moved), combine.lost(low))
    del loaded
    model.to(_device(first.config))
    result.losses = [
        {"run": s.run, "own": s.loss, "merged": _loss(model, s.held_out, s.logits_chunk)}
        for s in sources
        if s.held_out is not None
    ]
    return result


def _save_low_rank(
    low: LowRank, model: nn.Module, folder: Path, base_name: str, task_type: str
) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=low.rank,
        lora_alpha=low.rank,
        target_modules=io.shortened(low.names, model),
        fan_in_fan_out=low.transposed,
        base_model_name_or_path=base_name,
        task_type=task_type,  # type: ignore[arg-type]
        inference_mode=True,
    )
    io.write(folder, config, low.tensors)


def _add(layer: Any, update: Tensor) -> None:
    """Add an update to a layer's weight, untied from any other that shares it."""
    layer.weight = nn.Parameter(layer.weight + update.to(layer.weight), requires_grad=False)


def _record(
    content: dict[str, Any], sources: list[Source], how: Combination, result: Merged
) -> dict[str, Any]:
    return {
        "format": 1,
        "runs": [source.record | {"given": source.run} for source in sources],
        "base": content["identity"]["base"],
        **asdict(how),
        "logits_difference": result.difference,
        "difference_from_weighted_sum": result.from_sum,
        "held_out_loss": result.losses,
        "versions": {name: metadata.version(name) for name in ("peft", "torch", "transformers")},
    }


def losses_table(result: Merged) -> Any:
    """Return the table of held-out losses: one row for each run's rows."""
    from rich.table import Table

    table = Table("held-out rows of", "loss of that run", "loss of the merged adapter")
    for row in result.losses:
        table.add_row(row["run"], f"{row['own']:.4f}", f"{row['merged']:.4f}")
    return table
