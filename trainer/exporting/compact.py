"""Compressed adapters."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters import compress as coding
from adapters import io
from adapters.delta import AdapterError
from trainer.assembly.rows import Data, load_data
from trainer.assembly.trained import Trained, load_trained
from trainer.data.batches import Sequences
from trainer.data.held_out import HeldOut
from trainer.evaluation.loss import losses
from trainer.exporting import card, compressible
from trainer.exporting.adapter import save_adapter, verify_adapter
from trainer.exporting.compare import compare, outputs
from trainer.exporting.serving import Serving
from trainer.models.losses import CausalLoss, ClassLoss
from trainer.storage import atomic, door, run_folder

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # the range that ComPEFT's authors search
Q_STEPS = 8  # from 1 - drop to 1, in equal factors
SEARCH_ROWS = 64
BATCH_SIZE = 16
WEIGHTS = "adapter_model.safetensors"

# Tensors by PEFT's keys, for each subfolder: "" or those of a pair.
Files = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Choice:
    """The compression of the tensors. `strength` is alpha or the divisor; None searches for it.
    `factors` is both or B: which of a low-rank pair are compressed."""

    method: str
    factors: str
    keep: float = 1.0
    drop: float = 0.0
    strength: float | None = None
    seed: int = 0
    scope: str = "tensor"  # or run: of compeft's threshold and scale

    @classmethod
    def of(
        cls,
        method: str,
        factors: str | None,
        keep: float | None,
        drop: float | None,
        strength: float | str | None,
        seed: int | None,
        scope: str | None = None,
    ) -> Choice:
        """Return a method's choice; None takes its default, a strength of auto searches for it.
        dare has no strength to choose: it divides by 1 - drop."""
        dropped = 0.9 if drop is None else drop
        return cls(
            method,
            factors or ("both" if method in ("compeft", "levels") else "B"),
            0.2 if keep is None else keep,
            dropped,
            (
                1 - dropped
                if method == "dare"
                else 1.0
                if method == "levels"
                else strength
                if isinstance(strength, float)
                else None
            ),
            seed or 0,
            scope or "tensor",
        )

    @property
    def grid(self) -> list[float]:
        """The strengths that a search tries."""
        if self.method == "compeft":
            return list(ALPHAS)
        return [(1 - self.drop) ** (1 - step / Q_STEPS) for step in range(Q_STEPS + 1)]


@dataclass
class Compressed:
    """The result of `compress`. Sizes are in bytes, losses per trained token."""

    out: Path
    strength: float
    difference: float  # of the loaded adapter's logits, over their spread
    parameters: int
    before: int
    after: int
    loss_before: float | None = None
    loss_after: float | None = None
    searched: dict[float, float] = field(default_factory=dict)  # loss by strength
    searched_on: str = ""


def compress(run: str, choice: Choice, out: Path | None, evaluate: bool) -> Compressed:
    """Compress a run's adapter, write it, load it back and compare.

    Raises:
        AdapterError: there is nothing to compress, or compressing it makes no sense.
        Mismatch: the loaded adapter answers differently; nothing is left behind.
    """
    run_path, content, _ = run_folder.read(run)
    name = content["identity"]["choices"].get("adapter", "none")
    compressible.refuse(name, content["config"]["adapter"], choice.method)
    out = out or run_path / choice.method
    quantised = content["config"]["base"].get("quantization", "none") != "none"
    device = torch.device("cuda" if torch.cuda.is_available() and not quantised else "cpu")
    with _appearing(out) as temporary:
        source = load_trained(run, device, fp32=True)
        Serving.of(source).write(temporary, source.model)
        save_adapter(source.adapter, source.model, source.base, source.task, temporary)
        folders = _subfolders(temporary, WEIGHTS)
        files = {folder: load_file(temporary / folder / WEIGHTS) for folder in folders}
        before = sum((temporary / folder / WEIGHTS).stat().st_size for folder in files)
        searching = choice.strength is None
        data = (
            load_data(source.config, source.base, source.task, train=searching)
            if evaluate or searching
            else None
        )
        loss = _loss(source, device)
        held_out = data.held_out if data is not None and evaluate else None
        result = Compressed(out, 0.0, 0.0, _parameters(files), before, 0)
        result.loss_before = loss(held_out)
        if choice.method == "compeft" and choice.factors == "both":
            files = _balanced(source, files)
        if searching:
            assert data is not None
            rows, result.searched_on = _search_rows(data)
            for strength in choice.grid:
                put(source.model, compressed(files, choice, strength))
                result.searched[strength] = loss(rows) or 0.0
            result.strength = min(result.searched, key=lambda strength: result.searched[strength])
        else:
            result.strength = choice.strength  # type: ignore[assignment]
        small = compressed(files, choice, result.strength)
        if choice.method != "levels":
            put(source.model, small)
        result.loss_after = loss(held_out)
        for folder, tensors in small.items():
            compact = temporary / folder / coding.FILE
            coding.write(compact, tensors, coding.updates(tensors, choice.factors))
            save_file(coding.read(compact), temporary / folder / WEIGHTS, {"format": "pt"})
            result.after += compact.stat().st_size
        source.model.to("cpu")
        result.difference = verify_adapter(source, temporary)
        card.write(temporary, "adapter", source.folder, result.difference, source.step)
    return result


def expand(source: Path, out: Path) -> None:
    """Write an ordinary adapter from a folder's compact.safetensors and adapter_config.json.

    Raises:
        AdapterError: one of them is missing or damaged.
    """
    folders = _subfolders(source, coding.FILE) if source.is_dir() else []
    if not folders:
        raise AdapterError(
            f"{source} has no {coding.FILE}: give a folder that graft compress run=... wrote"
        )
    with _appearing(out) as temporary:
        for folder in folders:
            config = source / folder / "adapter_config.json"
            if not config.is_file():
                raise AdapterError(f"{config} is missing; it belongs to {coding.FILE}")
            tensors = coding.read(source / folder / coding.FILE)
            (temporary / folder).mkdir(exist_ok=True)
            save_file(tensors, temporary / folder / WEIGHTS, {"format": "pt"})
            shutil.copyfile(config, temporary / folder / config.name)
        for file in source.iterdir():  # the tokenizer and what ends an answer
            if file.is_file() and file.name not in (coding.FILE, WEIGHTS, "adapter_config.json"):
                shutil.copyfile(file, temporary / file.name)


def compressed(files: Files, choice: Choice, strength: float) -> Files:
    """Compress the updates among the tensors, with one seed for all. levels changes none."""
    if choice.method == "levels":
        return files
    if choice.scope == "run":
        return _compressed_together(files, choice, strength)
    draw = torch.Generator().manual_seed(choice.seed)
    result: Files = {}
    for folder, tensors in files.items():
        result[folder] = dict(tensors)
        for key in sorted(coding.updates(tensors, choice.factors)):
            result[folder][key] = (
                coding.compeft(tensors[key], choice.keep, strength)
                if choice.method == "compeft"
                else coding.dare(tensors[key], choice.drop, strength, draw)
            )
    return result


def _compressed_together(files: Files, choice: Choice, strength: float) -> Files:
    result = {folder: dict(tensors) for folder, tensors in files.items()}
    places = [
        (folder, key)
        for folder, tensors in files.items()
        for key in sorted(coding.updates(tensors, choice.factors))
    ]
    updates = [files[folder][key] for folder, key in places]
    together = coding.compeft_together(updates, choice.keep, strength)
    for (folder, key), tensor in zip(places, together, strict=True):
        result[folder][key] = tensor
    return result


@torch.no_grad()
def put(model: nn.Module, files: Files) -> None:
    """Copy the updates of an adapter folder into the model's adapter."""
    live = _live(model)
    for tensors in files.values():
        for key in coding.updates(tensors, "both"):
            # Sparse values may be padded in the file.
            live[key].copy_(tensors[key][: len(live[key])] if live[key].ndim == 1 else tensors[key])


def _live(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors by the keys they are saved under."""
    tensors: dict[str, Tensor] = {
        name.replace(".default", ""): p for name, p in model.named_parameters()
    }  # PEFT's name for its only adapter
    for name, delta in io.deltas(model):
        values = getattr(delta, "values", None)
        parts = {
            "lora_A.weight": getattr(delta, "A", None),
            "lora_B.weight": getattr(delta, "B", None),
            "supertuning_values": values,
            "shira_weight": values,
        }
        parts |= {
            f"supertuning_{key}": part for key, part in parts.items() if key.startswith("lora_")
        }
        tensors |= {
            f"{io.PREFIX}{name}.{key}": part for key, part in parts.items() if part is not None
        }
    return tensors


@torch.no_grad()
def _balanced(run: Trained, files: Files) -> Files:
    """Rewrite low-rank pairs by `coding.balanced`, and check that the model still gives the same
    outputs."""
    expected = outputs(run.model, run)
    result = {folder: dict(tensors) for folder, tensors in files.items()}
    for tensors in result.values():
        for a, b in coding.low_rank_pairs(tensors):
            tensors[b], tensors[a] = coding.balanced(tensors[b], tensors[a])
    put(run.model, result)
    compare(expected, outputs(run.model, run))
    return result


def _search_rows(data: Data) -> tuple[HeldOut, str]:
    """Return a few rows to search on, and their description."""
    if data.train is None and data.held_out is None:  # rows of a stream are not stored
        raise AdapterError(
            "there are no rows to search on: this run's task streams and has no held-out rows. Give"
            " alpha= or q= a number"
        )
    name = "training" if data.train is not None else "held-out"
    rows = (data.train or data.held_out.sequences).rows  # type: ignore[union-attr]
    labels = data.task.labels if data.task.kind == "label" else None
    collate = replace(data.collate, packed=False)
    count = min(SEARCH_ROWS, len(rows))
    return (
        HeldOut(Sequences(rows, [[row] for row in range(count)]), collate, labels),
        f"the first {count} {name} rows",
    )


def _loss(run: Trained, device: torch.device) -> Callable[[HeldOut | None], float | None]:
    labelled = run.task.kind == "label"
    loss = (
        ClassLoss(run.model)
        if labelled
        else CausalLoss(run.model, run.config["objective"]["logits_chunk"])
    )
    return lambda rows: (
        losses(loss, rows, BATCH_SIZE, device).get("loss") if rows is not None else None
    )


def _parameters(files: Files) -> int:
    return sum(
        t.numel() for tensors in files.values() for t in tensors.values() if t.is_floating_point()
    )


def _subfolders(root: Path, name: str) -> list[str]:
    """Return the subfolders that have a file of this name; the folder itself is ""."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    return [
        str(path.relative_to(root)) if path != root else ""
        for path in folders
        if (path / name).is_file()
    ]


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` if nothing fails.

    Raises:
        FolderError: `out` exists.
    """
    door.refuse_existing(out, "out=FOLDER")
    with atomic.folder(out) as temporary:
        yield temporary


def sizes_table(result: Compressed) -> Any:
    """Return the table of sizes and losses before and after."""
    from rich.table import Table

    table = Table("", "before", "after")
    smaller = f"{result.after:,} ({result.before / result.after:.1f}x smaller)"
    table.add_row("bytes", f"{result.before:,}", smaller)
    bits = [f"{8 * size / result.parameters:.2f}" for size in (result.before, result.after)]
    table.add_row("bits per parameter", *bits)
    if result.loss_before is not None and result.loss_after is not None:
        table.add_row("held-out loss", f"{result.loss_before:.4f}", f"{result.loss_after:.4f}")
    return table


def summary_lines(result: Compressed, name: str) -> Iterator[str]:
    """Yield the outcome of the search for alpha or q (`name`), the folder and the comparison."""
    if result.searched:
        tries = ", ".join(
            f"{strength:.3g}: {loss:.4f}" for strength, loss in result.searched.items()
        )
        yield f"{name}={result.strength:.4g}, of least loss on {result.searched_on} ({tries})"
        if "held-out" in result.searched_on:
            yield "searched on held-out rows: the held-out loss after is better than on others"
        if result.strength == max(result.searched):
            yield (
                "this is the end of the grid: a larger alpha may be better"
                if name == "alpha"
                else "this is the largest q, which does not scale"
            )
    yield str(result.out)
    yield f"loaded back and compared: logits differ by {result.difference:.2e} of their spread"
