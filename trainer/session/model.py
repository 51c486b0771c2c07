"""The model of a run and the module that trains it, as they are before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

from adapters.delta import Start
from tasks.reading import DataError
from trainer.assembly import continued, start_heads
from trainer.assembly.build import instantiate, new_modules, new_tokens, schedule, set_problem
from trainer.assembly.recipe import Recipe
from trainer.assembly.rows import token_counts
from trainer.data import hidden_states
from trainer.data.held_out import to_device
from trainer.decoding.trial import check_decoding
from trainer.drafters import Drafter
from trainer.drafters import io as drafter_io
from trainer.models import flops
from trainer.models.causality import check_causality
from trainer.models.context import check_context
from trainer.models.packing_check import check_packing_isolation
from trainer.session import same_step
from trainer.session.footprint import parameters
from trainer.session.start_point import StartPoint, cooldown_of
from trainer.speed import attention_choice, elementwise_choice, fused, liger
from trainer.speed.compile import compile_layers
from trainer.speed.flash import use_flash
from trainer.speed.varlen import use_varlen
from trainer.storage import checkpoints
from trainer.storage.progress import Progress
from trainer.training.distill import DraftLoss
from trainer.training.finetune import FineTune, real_tokens

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class LoadedModel:
    """The base with its adapter, and the drafter that is trained with it."""

    model: nn.Module
    drafter: Drafter | None


def load_model(recipe: Recipe, start: StartPoint, folder: Path | None) -> LoadedModel:
    """Load the base, then attach kernels, target, drafter and adapter. `folder` is the run folder
    on rank 0, where an adapter may write what it measures.

    Loading may draw random numbers, and how many depends on the libraries. So the generators are
    seeded again before the drafter and before the adapter are initialised.
    """
    config, seed = recipe.config, recipe.config["seed"]
    lightning.seed_everything(seed, verbose=False)
    model = _load_base(recipe)
    if recipe.labels is None and not getattr(model.config, "is_encoder_decoder", False):
        check_causality(model, recipe.base)
    _use_kernels(model, recipe, start)
    lightning.seed_everything(seed, verbose=False)
    drafter = _make_drafter(recipe, model, start, folder) if config["drafter"] else None
    if (target := recipe.target) is not None:
        model = target.attach(model)
        log.info(
            "target: %s after step %d, %s",
            target.record["run"],
            target.record["step"],
            type(target.adapter).__name__,
        )
    saved = checkpoints.load(start.checkpoint)["adapter"] if start.checkpoint else None
    lightning.seed_everything(seed, verbose=False)
    with Progress("attaching the adapter", unit="batches read") as progress:
        adapter_start = Start(
            new_modules(model, recipe.labels),
            max(1, recipe.steps),
            lambda: progress.each(_calibration_batches(recipe)),
            folder,
            saved,
            new_tokens(model),
        )
        model = continued.attach(config, recipe.adapter, model, adapter_start)
    log.info("trained: %s", parameters(model))
    if drafter is not None:
        log.info("drafter: %s", parameters(drafter))
        if start.fresh and not recipe.sharded and drafter.proposes:
            check_decoding(model, drafter)
    if config["packing"]:
        check_packing_isolation(model, recipe.base, config["max_length"])
    if config["objective"]["context_window"] is not None:
        check_context(model, recipe.base)
    if config["compile"]:
        log.info(
            "compiled in training: %d layers, when the first batches come", compile_layers(model)
        )
    return LoadedModel(model, drafter)


def make_module(recipe: Recipe, loaded: LoadedModel, start: StartPoint) -> FineTune:
    """Make the objective with its schedule and penalty, and with stored hidden states for a
    drafter."""
    config, model = recipe.config, loaded.model
    module: FineTune = instantiate(config["objective"])(
        model=model,
        adapter=recipe.adapter,
        optimizer=instantiate(config["optimizer"]),
        steps=recipe.steps,
        labelled=recipe.labels is not None,
        schedule=schedule(config, recipe.order),
        accumulate=config["accumulate"],
        seed=config["seed"],
        penalty=instantiate(config["penalty"])(model=model) if config["penalty"] else None,
        drafter=loaded.drafter,
        runtime_cooldown=cooldown_of(config["branch"]) if config["branch"] else None,
    )
    module.drop_cooldown = start.drops_cooldown
    module.parts_differ = same_step.parts_differ(config, recipe)
    module.work = _work(module, recipe)
    if config["target"]["features"] is not None:
        _use_stored_states(module, recipe)
    return module


def _work(module: FineTune, recipe: Recipe) -> flops.Work | None:
    """Return the operations of the run's training, if the formula describes it: one pass of a
    decoder over its rows, and nothing besides."""
    model: Any = module.model
    plain = type(module) is FineTune and module.drafter is None and module.penalty is None
    encodes = recipe.labels is not None or getattr(model.config, "is_encoder_decoder", False)
    lengths = getattr(getattr(recipe.data.train, "rows", None), "lengths", None)
    if not plain or encodes or lengths is None:
        return None
    dtype = torch.bfloat16 if recipe.precision == "bf16-mixed" else recipe.dtype
    rate, source = flops.peak(recipe.device, dtype)
    work = flops.Work.of(model, lengths, rate)
    log.info("peak: %.3g TFLOP/s of products, %s", rate / 1e12, source)
    return work


def calibrate_penalty(module: FineTune, recipe: Recipe) -> dict[str, float]:
    """Measure the penalty's thresholds on the run's first micro-batches, the same on all ranks.
    Return the threshold of each layer."""
    data, penalty = recipe.data, module.penalty
    assert penalty is not None
    if recipe.order is not None and data.train is not None:
        rows = data.train
        with Progress("calibrating the penalty", unit="batches read") as progress:
            module.calibrate(
                to_device(data.collate([rows[pick] for pick in picks]), recipe.device)
                for picks in progress.each(_micro_batches(recipe))
            )
    taus = {
        f"tau/{name}": tau for (name, _), tau in zip(penalty.layers, penalty.tau or [], strict=True)
    }
    log.info(
        "penalty: the density of %d MLPs, tau from %.3g to %.3g",
        len(taus),
        min(taus.values()),
        max(taus.values()),
    )
    return taus


def _load_base(recipe: Recipe) -> Any:
    base = recipe.base
    log.info(
        "loading %s in %s%s",
        base.path,
        str(recipe.dtype).removeprefix("torch."),
        "" if base.quantization == "none" else f" as {base.quantization}",
    )
    # A model that FSDP2 shards may be larger than the memory of one device.
    device = torch.device("cpu") if recipe.sharded else recipe.device
    with Progress(f"loading {base.path}"):
        model = base.load(recipe.dtype, recipe.labels, device)
    set_problem(model, recipe.task)
    return model


def _use_kernels(model: Any, recipe: Recipe, start: StartPoint) -> None:
    """Replace attention, norms and activations by the kernels that the config asks for, on a CPU by
    those that the start point records."""
    config = recipe.config
    flash = (
        recipe.base.attn_implementation == "auto"
        and config["packing"]
        and not config["drafter"]
        and not config["deterministic"]
    )
    if flash and use_flash(model, recipe.device, recipe.dtype):
        log.info(
            "attention of packed rows uses flash-attn; base.attn_implementation=sdpa uses torch's"
        )
    elif flash and use_varlen(model, recipe.device, recipe.dtype):
        log.info(
            "attention of packed rows uses torch.nn.attention.varlen; base.attn_implementation=sdpa"
            " uses a mask"
        )
    if config["fused"] == "liger":
        log.info(
            "Liger-Kernel: %s",
            ", ".join(f"{count} {kind}" for kind, count in liger.put_in(model).items()),
        )
    elif config["fused"]:
        parts = elementwise_choice.recorded(start.elementwise)
        native = parts.kinds if parts is not None else ()
        fused.fuse(model, attention_choice.recorded(start.attention), native)


def _make_drafter(recipe: Recipe, model: Any, start: StartPoint, folder: Path | None) -> Drafter:
    """Make the drafter. In a fresh run it starts from an earlier drafter, or is calibrated on its
    rows; otherwise the checkpoint replaces its weights, or those of its LoRA."""
    config = recipe.config
    run = start.checkpoint.path.parent.parent if start.checkpoint is not None else None
    source = start_heads.source_of(config, run)
    drafter = start_heads.make(config, model, source)
    if source is not None and folder is not None:
        start_heads.keep(source, folder)
    draft = config["target"]["draft"]
    if not start.fresh or config["drafter_adapter"]:
        return drafter
    if draft is not None:
        drafter_io.fill(drafter, drafter_io.folder_of(draft))
    else:
        drafter.calibrate(
            lambda: token_counts(recipe.data, model.config.get_text_config().vocab_size)
        )
    return drafter


def _use_stored_states(module: FineTune, recipe: Recipe) -> None:
    """Train the drafter on its target's hidden states on disk. Missing ones are computed first."""
    assert isinstance(module.loss, DraftLoss)
    assert module.drafter is not None
    assert recipe.data.train is not None
    loss, config, base = module.loss, recipe.config, recipe.base
    key = hidden_states.key_of(
        base,
        recipe.dtype,
        recipe.target.saved if recipe.target is not None else None,
        recipe.data.identity["train"]["sha256"],
        module.drafter.layers,
    )
    target = hidden_states.TargetPass(
        lambda batch: loss.forward(batch)[:2],
        base.config.get_text_config().hidden_size,
        base.tokenizer.pad_token_id,
        config["batch_size"],
        recipe.device,
    )
    folder = Path(config["target"]["features"]).expanduser()
    rows = recipe.data.train
    loss.states = hidden_states.HiddenStates.prepare(folder, key, rows, target).states


def _micro_batches(recipe: Recipe) -> Iterator[list[Any]]:
    """Yield rank 0's micro-batches from the start of the run."""
    order = recipe.order
    assert order is not None
    for step in range(order.steps(None, None)):
        yield from order.micro_batches(step)


def _calibration_batches(recipe: Recipe) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the run's first micro-batches as inputs of transformers' models, for adapters that are
    initialised from data."""
    data = recipe.data
    if recipe.order is None:
        raise DataError(
            "this initialisation reads training data beforehand, which task.streaming=true does not"
            " allow: set task.streaming=false, or choose another initialisation"
        )
    assert data.train is not None
    for picks in _micro_batches(recipe):
        items = [data.train[pick] for pick in picks]
        batch = data.collate(items)
        real, labels = real_tokens(batch)[0].long(), batch.get("classes", batch["labels"])
        if "decoder_input_ids" in batch:  # the model itself puts the start token before its labels
            labels = labels[:, 1:].contiguous()
        yield {"input_ids": batch["input_ids"], "attention_mask": real, "labels": labels}
