"""The trained parameters of a run, and estimates of its memory and disk. Everything is counted on
the base's modules without their weights (torch's meta device)."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from adapters.delta import Adapter, NeedsWeights, Start
from adapters.experts import adapted_ids, expert_tensors
from adapters.full import Nothing
from adapters.linear import features
from adapters.targets import targets
from trainer.assembly import start_heads
from trainer.assembly.build import instantiate, new_modules, new_tokens
from trainer.assembly.recipe import Recipe
from trainer.callbacks import every_steps
from trainer.drafters import DrafterError, head_lora
from trainer.exporting.draft_head import described
from trainer.models.base import BaseError
from trainer.models.cache_argument import rolls_back
from trainer.models.losses import positions
from trainer.session import smaller
from trainer.training import heal


@dataclass
class Footprint:
    """The parameters of a run, and its memory and disk in bytes, estimated."""

    parameters: int
    trainable: int | None  # None where only the loaded base can tell
    experts: int  # parameters of routed experts
    experts_frozen: int  # of them, how many stay as they are
    precision: str
    dtype: str
    memory_bytes: dict[str, int]
    memory_needed: int
    memory_free: int
    checkpoint_bytes: int
    disk_free: int
    draft_head: str | None  # the class of its layer, and which engines load it
    errors: list[str]
    warnings: list[str]

    def as_record(self) -> dict[str, Any]:
        """Return the numbers as preflight.json holds them."""
        return {key: value for key, value in asdict(self).items() if key not in _MESSAGES}


_MESSAGES = ("errors", "warnings")


def estimate(recipe: Recipe, folder: Path) -> Footprint:
    """Count parameters, and estimate the memory and disk that the run takes, on the disk of
    `folder`. The result holds errors for a drafter or penalty that does not fit the base and for a
    disk that is too small, and a warning where memory is too small.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    errors: list[str] = []
    warnings: list[str] = []
    skeleton = recipe.base.skeleton(recipe.labels)
    total = sum(p.numel() for p in skeleton.parameters())
    linears = sum(math.prod(features(linear)) for _, linear in targets(skeleton, "all-linear"))
    experts = list(expert_tensors(skeleton).values())
    in_drafter, draft_head = _drafter(recipe, skeleton, errors)
    trainable = _trainable(recipe, skeleton, in_drafter, errors, warnings)
    frozen = _frozen_experts(recipe.adapter, skeleton, experts, warnings)
    cuda = recipe.device.type == "cuda"
    parts = _memory(recipe, total, linears, trainable or 0)
    needed = sum(parts.values())
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        warnings.append(
            f"the run needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are"
            f" free. {_smaller(recipe, total, linears, trainable or 0)}"
        )
    checkpoint_bytes, disk = _disk(recipe, trainable or 0, folder, errors)
    return Footprint(
        parameters=total,
        trainable=trainable,
        experts=sum(p.numel() for p in experts),
        experts_frozen=frozen,
        precision=recipe.precision,
        dtype=str(recipe.dtype).removeprefix("torch."),
        memory_bytes=parts,
        memory_needed=needed,
        memory_free=free,
        checkpoint_bytes=checkpoint_bytes,
        disk_free=disk,
        draft_head=draft_head,
        errors=errors,
        warnings=warnings,
    )


def _trainable(
    recipe: Recipe,
    skeleton: nn.Module,
    in_drafter: int,
    errors: list[str],
    warnings: list[str],
) -> int | None:
    """Count the trained parameters; None where only the loaded base can tell."""
    adapter = recipe.adapter
    try:
        start = Start(
            new_modules(skeleton, recipe.labels),
            max(1, recipe.steps),
            new_tokens=new_tokens(skeleton),
        )
        model = adapter.attach(skeleton, start)
        trainable = in_drafter + sum(p.numel() for p in model.parameters() if p.requires_grad)
    except NeedsWeights:
        model, trainable = skeleton, None
        warnings.append(
            "the number of trained parameters is known only when the base is loaded; the estimates"
            " of memory and checkpoint leave them out"
        )
    if trainable == 0 and not isinstance(adapter, Nothing):
        errors.append("the adapter has no trainable parameter")
    _penalty(recipe.config, adapter, model, errors)
    return trainable


def _frozen_experts(
    adapter: Adapter, model: nn.Module, experts: list[nn.Parameter], warnings: list[str]
) -> int:
    """Return how many parameters of experts get no update: they are no linear layers, so that
    `all-linear` does not reach them."""
    adapted = adapted_ids(model)
    frozen = sum(p.numel() for p in experts if not p.requires_grad and id(p) not in adapted)
    if frozen and not isinstance(adapter, Nothing):
        total = sum(p.numel() for p in model.parameters())
        low_rank = getattr(adapter, "rank", None) is not None
        way = "" if low_rank and hasattr(adapter, "target_parameters") else "adapter=lora with "
        warnings.append(
            f"{frozen:,} parameters ({frozen / total:.0%}) sit in experts, which are no linear"
            f" layers and stay frozen: {way}adapter.target_parameters=all-experts trains them"
        )
    return frozen


def _disk(recipe: Recipe, trainable: int, folder: Path, errors: list[str]) -> tuple[int, int]:
    """Return (bytes of a checkpoint, bytes that are free on the disk of `folder`)."""
    # A trained tensor and its two moments: in the base's dtype if it is trained itself, else fp32.
    bytes_each = recipe.dtype.itemsize * 3 if recipe.trains_base else 4 + 8
    checkpoint_bytes = trainable * bytes_each if recipe.steps else 0
    keep = _checkpoints(recipe.config["callbacks"].get("checkpoints") or {}, recipe.steps)
    free = shutil.disk_usage(_existing(folder)).free
    # Besides those that are kept: the best one, and the one that is being written.
    if checkpoint_bytes * (keep + 2) > free:
        errors.append(
            f"{keep + 2} checkpoints of about {checkpoint_bytes / 1e6:.3g} MB do not fit on the"
            f" disk of {folder}, which has {free / 1e6:.3g} MB free: free some space, or choose"
            " another folder with runs=FOLDER"
        )
    return checkpoint_bytes, free


def _checkpoints(settings: dict[str, Any], steps: int) -> int:
    """Count the checkpoints that the run keeps, without the best one."""
    if settings.get("keep", 1) is not None:
        return settings.get("keep", 1)
    return steps // (every_steps(settings["every"], steps) or max(1, steps))


def _penalty(config: dict[str, Any], adapter: Adapter, model: nn.Module, errors: list[str]) -> None:
    if not config["penalty"]:
        return
    if isinstance(adapter, Nothing):
        errors.append("adapter=none trains nothing, so a penalty has no effect: set penalty=none")
        return
    if config["penalty"]["eps"] == "auto" and config["task"].get("streaming"):
        errors.append(
            "penalty.eps=auto is measured on training data beforehand, which task.streaming=true"
            " does not allow: set penalty.eps to a number"
        )
    try:
        instantiate(config["penalty"])(model=model)
    except BaseError as error:
        errors.append(str(error))


def _drafter(recipe: Recipe, skeleton: nn.Module, errors: list[str]) -> tuple[int, str | None]:
    """Return (the number of the drafter's trained parameters, what engines can do with it)."""
    config, train = recipe.config, recipe.data.train
    if not config["drafter"]:
        return 0, None
    if recipe.labels is not None:
        errors.append(
            "a drafter predicts tokens, and this task gives one label to each row: set drafter=none"
        )
        return 0, None
    if recipe.base.decoder_start is not None:
        errors.append(
            f"a drafter continues the sequence that the model reads, and {recipe.base.path} is an"
            " encoder-decoder, whose decoder writes another one: set drafter=none"
        )
        return 0, None
    try:
        drafter = start_heads.make(config, skeleton, None)
    except DrafterError as error:
        errors.append(str(error))
        return 0, None
    if drafter.proposes and not drafter.elsewhere and not rolls_back(skeleton):
        errors.append(
            f"{type(skeleton).__name__} has layers whose state cannot be rolled back by some tokens"
            " (a recurrence), which every refused draft needs: a drafter for it could never decode."
            " Set drafter=none"
        )
    longest = train.rows.report.longest if train is not None else config["max_length"]
    if longest < drafter.offsets + 2:
        errors.append(
            f"the longest row has {longest} tokens, and a drafter of {drafter.offsets} offsets"
            f" needs {drafter.offsets + 2}: set fewer"
            f" drafter.{'d_max' if 'd_max' in config['drafter'] else 'offsets'}, or give longer"
            " rows"
        )
    count = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    head_lora.merge(drafter)  # engines get the merged head
    return count, described(drafter, skeleton)


def _memory(recipe: Recipe, total: int, linears: int, trainable: int) -> dict[str, int]:
    """Estimate the memory in bytes. A decoder layer's activations take about 15 d + 4 m numbers per
    token, 12 d + 3 m if fused, and its backward pass four times as many for a moment (SmolLM2 with
    LoRA, `graft preflight probe=true`, docs/speed.md)."""
    config, base, dtype, train = recipe.config, recipe.base, recipe.dtype, recipe.data.train
    text = base.config.get_text_config()
    width, inner = getattr(text, "hidden_size", 0), getattr(text, "intermediate_size", 0) or 0
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # Gemma 3n: one a layer
    layers = getattr(text, "num_hidden_layers", 0)
    # bytes of a linear layer's weight; NF4: half a byte, and a scale for each block
    linear_bytes = {"none": dtype.itemsize, "nf4": 0.53, "int8": 1.0}[base.quantization]
    longest = (
        min(config["max_length"], train.rows.report.longest)
        if train is not None
        else config["max_length"]
    )
    window = config["objective"]["context_window"]
    if window is not None and train is not None and len(train.rows):
        longest = int((train.rows.lengths - np.maximum(train.rows.prompts - window, 0)).max())
    tokens = config["batch_size"] * (config["max_length"] if config["packing"] else longest)
    per_layer = (
        12 * width + 3 * inner if config["fused"] else 15 * width + 4 * inner
    ) * dtype.itemsize
    vocabulary, device = (
        getattr(text, "vocab_size", 0),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    # Activations that are saved for the backward pass. A target saves none, only the drafter does.
    if config["objective"]["_target_"] == "trainer.training.distill.Distill":
        saved = config["drafter"]["offsets"] * per_layer
    else:
        interval = int(config["objective"]["gradient_checkpointing"])  # False is none, True is each
        recomputed = math.ceil(layers / interval) if interval else 0
        saved = (
            recomputed * width * dtype.itemsize
            + (layers - recomputed) * per_layer
            + (per_layer if recomputed else 0)
        )
    chunk = min(tokens, config["objective"]["logits_chunk"] or positions(vocabulary, device))
    logits = chunk * vocabulary * 12
    # Recomputing leaves the logits' memory in pieces, which the backward pass cannot take.
    backward = 4 * tokens * per_layer
    backward = backward if config["objective"]["gradient_checkpointing"] else backward - logits
    teacher = config["objective"].get("teacher")
    taught = heal.parameters(teacher) * dtype.itemsize if teacher is not None else 0
    moments = 2 if "8bit" in config["optimizer"]["_target_"] else 8
    return {
        "weights": int(linears * linear_bytes + (total - linears) * dtype.itemsize) + taught,
        "trained": trainable * (4 + 4 + moments),
        "activations": int(tokens * saved),
        "logits": logits,
        "backward": max(0, int(backward)),
    }


def _smaller(recipe: Recipe, total: int, linears: int, trainable: int) -> str:
    """Say what the run would need with each setting that takes less memory, and with all."""
    changes = smaller.settings(recipe.config)
    if not changes:
        return smaller.advice(recipe.config)
    together = {key: value for change in changes.values() for key, value in change.items()}
    sizes = {}
    for words, change in {**changes, "all of these": together}.items():
        config = smaller.changed(recipe.config, change)
        base = copy.copy(recipe.base)
        base.quantization = config["base"]["quantization"]
        other = replace(recipe, config=config, base=base)
        if config["precision"] != recipe.config["precision"]:
            other = replace(other, dtype=torch.bfloat16)
        sizes[words] = sum(_memory(other, total, linears, trainable).values())
    texts = [f"{size / 1e9:.1f} GB with {words}" for words, size in sizes.items()]
    return "It would need about " + "; ".join(texts)


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def parameters(model: nn.Module) -> str:
    """Say how much of a model is trained."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"
