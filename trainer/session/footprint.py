"""What a run trains, and the memory and disk that it takes: counted on the base without its
weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from adapters.delta import Adapter, NeedsWeights, Start, features, targets
from adapters.full import Full, Nothing
from trainer.assembly.build import instantiate, new_modules
from trainer.assembly.rows import Data
from trainer.callbacks import every_steps
from trainer.drafters import Drafter, DrafterError
from trainer.models.base import Base
from trainer.models.losses import positions
from trainer.models.precision import compute
from trainer.penalties.deft import PenaltyError


def estimate(
    config: dict[str, Any],
    base: Base,
    adapter: Adapter,
    found: Data,
    steps: int,
    place: Path,
    errors: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """Parameters, and estimates in bytes of the memory and disk that `steps` steps take, of which
    those of disk are free at `place`.

    What does not fit is added to `errors` and `warnings`: a drafter, a penalty, memory, the disk.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    labels = found.task.labels if found.task.kind == "label" else None
    skeleton = base.skeleton(labels)
    total = sum(p.numel() for p in skeleton.parameters())
    linears = sum(math.prod(features(linear)) for _, linear in targets(skeleton, "all-linear"))
    drafted = _drafter(config, skeleton, found, errors)
    try:
        model = adapter.attach(skeleton, Start(new_modules(skeleton, labels), max(1, steps)))
        trainable = drafted + sum(p.numel() for p in model.parameters() if p.requires_grad)
    except NeedsWeights:
        model, trainable = skeleton, None
        warnings.append(
            "how many parameters are trained is known only when the base is loaded; memory and"
            " checkpoint leave them out"
        )
    if trainable == 0 and not isinstance(adapter, Nothing):
        errors.append("the adapter has no trainable parameter")
    _penalty(config, adapter, model, errors)
    cuda = torch.cuda.is_available() and config["lightning"]["accelerator"] != "cpu"
    trains_base, known = isinstance(adapter, Full), trainable or 0  # as the run itself says it
    dtype, _, precision = compute(config["precision"], config["base"]["dtype"], trains_base, cuda)
    parts = _memory(config, base, dtype, total, linears, known, found)
    needed = sum(parts.values())
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        warnings.append(
            f"the run needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
    checkpoint_bytes = known * (4 + 8 if not trains_base else dtype.itemsize * 3) if steps else 0
    keep = _checkpoints(config["callbacks"].get("checkpoints") or {}, steps)
    disk = shutil.disk_usage(_existing(place)).free
    if checkpoint_bytes * (keep + 2) > disk:
        errors.append(
            f"{keep + 2} checkpoints of about {checkpoint_bytes / 1e6:.3g} MB do not fit on the"
            f" disk of {place}, which has {disk / 1e6:.3g} MB free: free some space, or choose"
            " another place with runs=FOLDER"
        )
    return {
        "parameters": total,
        "trainable": trainable,
        "precision": precision,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_bytes": parts,
        "memory_needed": needed,
        "memory_free": free,
        "checkpoint_bytes": checkpoint_bytes,
        "disk_free": disk,
    }


def _checkpoints(settings: dict[str, Any], steps: int) -> int:
    """How many checkpoints the run will hold, beside the best one."""
    if settings.get("keep", 1) is not None:
        return settings.get("keep", 1)
    return steps // (every_steps(settings["every"], steps) or max(1, steps))


def _penalty(config: dict[str, Any], adapter: Adapter, model: nn.Module, errors: list[str]) -> None:
    if not config["penalty"]:
        return
    if isinstance(adapter, Nothing):
        errors.append(
            "adapter=none trains nothing, so that a penalty has no effect: set penalty=none"
        )
        return
    if config["penalty"]["eps"] == "auto" and config["task"].get("streaming"):
        errors.append(
            "penalty.eps=auto is measured on training data beforehand, which task.streaming=true"
            " does not allow: set penalty.eps to a number"
        )
    try:
        instantiate(config["penalty"])(model=model)
    except PenaltyError as error:
        errors.append(str(error))


def _drafter(config: dict[str, Any], skeleton: nn.Module, found: Data, errors: list[str]) -> int:
    """The number of parameters that the drafter trains."""
    if not config["drafter"]:
        return 0
    if found.task.kind == "label":
        errors.append(
            "a drafter predicts tokens, and this task gives one label to each row: set drafter=none"
        )
        return 0
    try:
        drafter: Drafter = instantiate(config["drafter"])(model=skeleton)
    except DrafterError as error:
        errors.append(str(error))
        return 0
    longest = found.train.rows.report.longest if found.train is not None else config["max_length"]
    if longest < drafter.offsets + 2:
        errors.append(
            f"the longest row has {longest} tokens, and a drafter of {drafter.offsets} offsets"
            f" needs {drafter.offsets + 2}: set fewer"
            f" drafter.{'d_max' if 'd_max' in config['drafter'] else 'offsets'}, or give longer"
            " rows"
        )
    return sum(p.numel() for p in drafter.parameters() if p.requires_grad)


def _memory(
    config: dict[str, Any],
    base: Base,
    dtype: torch.dtype,
    total: int,
    linears: int,
    trainable: int,
    found: Data,
) -> dict[str, int]:
    """An estimate, in bytes. Activations of a decoder layer are near 30 d + 5 m numbers a token,
    fused ones 12 d + 3 m (SmolLM2 with LoRA, measured)."""
    text = base.config.get_text_config()
    width, inner = getattr(text, "hidden_size", 0), getattr(text, "intermediate_size", 0) or 0
    layers = getattr(text, "num_hidden_layers", 0)
    packed = {"none": dtype.itemsize, "nf4": 0.53, "int8": 1.0}[base.quantization]
    longest = (
        min(config["max_length"], found.train.rows.report.longest)
        if found.train is not None
        else config["max_length"]
    )
    tokens = config["batch_size"] * (config["max_length"] if config["packing"] else longest)
    per_layer = (
        12 * width + 3 * inner if config["fused"] else 30 * width + 5 * inner
    ) * dtype.itemsize
    vocabulary, device = (
        getattr(text, "vocab_size", 0),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    # the target keeps nothing for a backward pass
    if config["objective"]["_target_"] == "trainer.training.distill.Distill":
        kept = config["drafter"]["offsets"] * per_layer
    else:
        every = int(config["objective"]["gradient_checkpointing"])  # False is none, True is each
        recomputed = math.ceil(layers / every) if every else 0
        kept = (
            recomputed * width * dtype.itemsize
            + (layers - recomputed) * per_layer
            + (per_layer if recomputed else 0)
        )
    moments = 2 if "8bit" in config["optimizer"]["_target_"] else 8
    return {
        "weights": int(linears * packed + (total - linears) * dtype.itemsize),
        "trained": trainable * (4 + 4 + moments),
        "activations": int(tokens * kept),
        "logits": (
            (config["objective"]["logits_chunk"] or positions(vocabulary, device)) * vocabulary * 12
        ),
    }


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


def parameters(model: nn.Module) -> str:
    """How much of a model is trained, for people."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"
