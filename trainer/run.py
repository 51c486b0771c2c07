"""The program, top to bottom: open the folder, check, load, fit, export, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from adapters.delta import Adapter, Start
from adapters.full import Full, Nothing
from tasks.reading import DataError
from trainer.assembly import quiet
from trainer.assembly import rows as rows_module
from trainer.assembly import trained as trained_module
from trainer.assembly.build import instantiate, new_modules, schedule
from trainer.callbacks import Context, progress
from trainer.callbacks.averaging import Averaging
from trainer.callbacks.evaluation import Evaluation
from trainer.callbacks.metrics import Metrics
from trainer.callbacks.schedulefree import ScheduleFree
from trainer.callbacks.stopping import Stopping
from trainer.callbacks.tracking import Dashboards
from trainer.cluster import slurm_job
from trainer.cluster.signals import Signals
from trainer.config.conflicts import schedule_free
from trainer.config.errors import ConfigError
from trainer.data import hidden_states
from trainer.data.batches import Batches, BatchOrder
from trainer.data.held_out import to_device
from trainer.data.loader import Loader
from trainer.data.streaming import Stream
from trainer.drafters import Drafter
from trainer.drafters import io as drafter_io
from trainer.exporting.adapter import save_adapter
from trainer.models.base import Base
from trainer.models.packing_check import check_packing_isolation
from trainer.models.precision import compute
from trainer.penalties.deft import DensityDEFT
from trainer.schedules import length
from trainer.session import fork, report_html, results, resume
from trainer.session.footprint import parameters
from trainer.session.inspect import quick
from trainer.speed import cpu_load, fused, liger, malloc
from trainer.speed.compile import compile_layers, refuse
from trainer.speed.flash import use_flash
from trainer.storage import atomic, checkpoints
from trainer.storage.journal import Journal
from trainer.storage.run_folder import RunFolder
from trainer.training import lightning_trainer
from trainer.training.distill import DraftLoss
from trainer.training.finetune import FineTune
from trainer.training.fsdp import Sharded
from trainer.training.ranks import first_decides, part, shared_run_folder

log = logging.getLogger("trainer")


class Unfinished(RuntimeError):
    """The run ended before its planned steps. `code` is the process's exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run(cfg: DictConfig, signals: Signals) -> float | None:
    """Run a composed, checked config; returns the last held-out loss, for sweeps.

    Raises:
        requeue.Stopped: a signal ended it. Others: see trainer.session.failures.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    quiet.quiet()
    adapter: Adapter = instantiate(config["adapter"])
    path = Path(HydraConfig.get().runtime.output_dir)
    lightning_ = lightning_trainer.make_trainer(config, adapter, path)
    if lightning_.world_size > 1:
        path = shared_run_folder(lightning_, path)
    with RunFolder.create(path, lightning_.is_global_zero) as place:
        log.info("run folder: %s", place.path)
        choices, overrides = (
            dict(HydraConfig.get().runtime.choices),
            list(HydraConfig.get().overrides.task),
        )
        try:
            with Dashboards() as dashboards:
                return _run(
                    config, adapter, lightning_, place, signals, dashboards, choices, overrides
                )
        except SystemExit:
            if signals.received is None:
                raise
            saved = checkpoints.complete(place.checkpoints)
            raise slurm_job.Stopped(
                signals.received, place.path, int(saved[-1].stem[5:]) if saved else None, None
            ) from None


def _where_to_begin(
    place: RunFolder,
    config: dict[str, Any],
    plan: BatchOrder | None,
    identity: dict[str, Any],
    restart: int,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, Path | None, bool]:
    """(run.yaml of an earlier start, what the run branches off, the checkpoint to go on from,
    whether a cooldown is left out)."""
    earlier = place.earlier()
    if earlier is not None:
        return (
            earlier,
            None,
            *resume.where_to_go_on(place, config, plan, identity, earlier, restart),
        )
    if config["branch"]:
        return None, *fork.fork(place, config, identity, True), False
    return None, None, None, False


def _run(
    config: dict[str, Any],
    adapter: Adapter,
    lightning_: lightning.Trainer,
    place: RunFolder,
    signals: Signals,
    dashboards: Dashboards,
    choices: dict[str, Any],
    overrides: list[str],
) -> float | None:
    before = cpu_load.seconds()
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    if config["fused"]:
        malloc.keep_freed()

    base: Base = instantiate(config["base"])
    task = instantiate(config["task"])
    tuned = (
        trained_module.load_tuned(path) if (path := config["target"]["run"]) is not None else None
    )
    sharded = isinstance(lightning_.strategy, Sharded)
    device = lightning_.strategy.root_device
    if config["fused"] == "liger":
        fault = liger.fault(
            base.config.model_type, device.type == "cuda", config["lightning"]["accelerator"]
        )
        if fault is not None:
            raise ConfigError(fault)
    if config["compile"]:
        refuse(adapter, device)
    dtype, _, precision = compute(
        config["precision"],
        config["base"]["dtype"],
        isinstance(adapter, Full),
        device.type == "cuda",
    )

    found = rows_module.load_data(config, base, task)
    labels = task.labels if task.kind == "label" else None
    plan = (
        rows_module.batch_order(config, found, lightning_.world_size)
        if found.train is not None
        else None
    )
    steps = (
        plan.steps(config["max_steps"], config["max_tokens"])
        if plan is not None
        else config["max_steps"]
    )
    trains = not isinstance(adapter, Nothing) or bool(config["drafter"])
    steps = steps if trains else 0
    checked = quick(config, base, adapter, found, plan, steps, place.path)
    identity = {
        "choices": choices,
        "base": base.fingerprint,
        "data": found.identity,
        "precision": precision,
        "trains_base": isinstance(adapter, Full),
        "labels": labels,
        "steps": steps,
        "ranks": lightning_.world_size,
        "target": tuned.about if tuned is not None else None,
    }
    begin = partial(_where_to_begin, place, config, plan, identity, adapter.restart)
    earlier, parent, saved_path, longer = first_decides(lightning_, begin)
    if (
        lightning_.is_global_zero
    ):  # after the decision, which reads the row counts of an earlier start
        atomic.write_text(place.path / "preflight.json", json.dumps(checked, indent=2))
    done = int(saved_path.stem[5:]) if saved_path else 0
    journal = Journal(place.path, [], lightning_.is_global_zero)
    if earlier is not None and (
        ended := resume.ended(place, journal, done, steps, config["max_time"])
    ):
        log.info(
            "this run %s; nothing is left to do. Its report: %s", ended, place.path / "report.html"
        )
        return results.last_loss(journal)
    record = (
        place.record(config, overrides, identity, earlier, parent)
        if lightning_.is_global_zero
        else {}
    )
    journal.rewind(done if saved_path else -1, cooled=not longer)
    if longer and earlier is not None and lightning_.is_global_zero:
        resume.leave_out(place, done, earlier["identity"]["steps"])

    lightning.seed_everything(config["seed"], verbose=False)
    log.info(
        "loading %s in %s%s",
        base.path,
        str(dtype).removeprefix("torch."),
        "" if base.quantization == "none" else f" as {base.quantization}",
    )
    # A model that is shared out may be larger than one device's memory.
    model = base.load(dtype, labels, torch.device("cpu") if sharded else device)
    flash = (
        base.attn_implementation == "auto"
        and config["packing"]
        and not config["drafter"]
        and not config["deterministic"]
    )
    if flash and use_flash(model, device, dtype):
        log.info(
            "attention of packed rows by flash-attn; base.attn_implementation=sdpa leaves it to"
            " torch"
        )
    if config["fused"] == "liger":
        log.info(
            "Liger-Kernel: %s",
            ", ".join(f"{count} {kind}" for kind, count in liger.put_in(model).items()),
        )
    elif config["fused"]:
        fused.fuse(model)
    lightning.seed_everything(config["seed"], verbose=False)
    drafter = _drafter(config, found, model, new=saved_path is None) if config["drafter"] else None
    if tuned is not None:
        model = tuned.attach(model)
        log.info(
            "target: %s after step %d, %s",
            tuned.about["run"],
            tuned.about["step"],
            type(tuned.adapter).__name__,
        )
    saved = checkpoints.load(saved_path)["adapter"] if saved_path else None
    # loading may draw; a resumed start must not depend on it
    lightning.seed_everything(config["seed"], verbose=False)
    start = Start(
        new_modules(model, labels),
        max(1, steps),
        partial(_calibration, found, plan),
        place.path if lightning_.is_global_zero else None,
        saved,
    )
    model = adapter.attach(model, start)
    log.info("trained: %s", parameters(model))
    if drafter is not None:
        log.info("drafter: %s", parameters(drafter))
    if config["packing"]:
        check_packing_isolation(model, base)
    if config["compile"]:
        log.info(
            "compiled in training: %d layers, when the first batches come", compile_layers(model)
        )
    penalty = instantiate(config["penalty"])(model=model) if config["penalty"] else None
    module: FineTune = instantiate(config["objective"])(
        model=model,
        adapter=adapter,
        optimizer=instantiate(config["optimizer"]),
        steps=steps,
        labelled=labels is not None,
        schedule=schedule(config, plan),
        accumulate=config["accumulate"],
        seed=config["seed"],
        penalty=penalty,
        drafter=drafter,
        cooling=fork.cooling(config["branch"]) if config["branch"] else None,
    )
    if config["target"]["features"] is not None:
        _read_states(module, config, base, tuned, found, dtype, device)
    rows_module.add_prompts(found, _prompts(config), model)
    journal.loggers = dashboards.all = (
        _loggers(config, place, record) if lightning_.is_global_zero else []
    )
    if penalty is not None and saved_path is None:
        _calibrate(module, penalty, found, plan, device, journal)
    context = Context(
        place,
        journal,
        signals,
        steps,
        found.held_out,
        found.rows_of,
        not isinstance(adapter, Full | Nothing),
        config["max_time"],
        config["max_tokens"],
    )
    context.constant_until, module.drop_cooldown = _constant_until(config, plan, steps), longer
    lightning_.callbacks = _callbacks(config, context)  # type: ignore[attr-defined]

    if not trains:
        _evaluate_only(lightning_, module.to(device))
    else:
        loader = _loader(config, found, plan, steps, done, lightning_)
        if device.type == "cpu" and lightning_.world_size == 1:
            advice = cpu_load.crowded(
                before, cpu_load.seconds(), torch.get_num_threads(), cpu_load.available()
            )
            if advice is not None:
                log.warning("%s", advice)
        lightning_.fit(module.train(), loader, ckpt_path=str(saved_path) if saved_path else None)
        part(lightning_)
        _say_why_it_ended(context, module)
        if not lightning_.is_global_zero:
            return results.last_loss(journal)
        if sharded:
            result = trained_module.load_trained(f"{place.path}@last")
            module.model, module.adapter, adapter = result.model, result.adapter, result.adapter
        if drafter is not None and drafter.proposes:
            results.save_drafter(place, drafter, base, config, record, module.step)
        if adapter.exportable and not isinstance(adapter, Nothing):
            for callback in lightning_.callbacks:  # type: ignore[attr-defined]
                # before save_adapter, which may load another checkpoint's weights
                if isinstance(callback, Averaging):
                    callback.save(partial(save_adapter, adapter, module.model, base, task))
            results.save_adapter(place, module, base, task, adapter, config["export"])
    report_html.write(place.path)
    results.show(journal)
    log.info("report: %s", place.path / "report.html")
    return results.last_loss(journal)


def _constant_until(config: dict[str, Any], plan: BatchOrder | None, steps: int) -> int | None:
    """The steps before the cooldown of the schedule, if it has one."""
    if config["branch"] or "cooldown" not in config["schedule"]:
        return None
    tokens = config["schedule"]["cooldown_tokens"]
    down = (
        length(config["schedule"]["cooldown"], steps)
        if tokens is None or plan is None
        else plan.last_steps(tokens, steps)
    )
    return (steps - down) or None


def _drafter(
    config: dict[str, Any], found: rows_module.Data, model: torch.nn.Module, new: bool
) -> Drafter:
    """The drafter as it is before a run's first step: calibrated on its rows, or as an earlier run
    left it."""
    drafter: Drafter = instantiate(config["drafter"])(model=model)
    if new and config["target"]["draft"] is not None:
        drafter_io.fill(drafter, drafter_io.folder_of(config["target"]["draft"]))
    elif new:
        drafter.calibrate(
            lambda: rows_module.token_counts(found, model.config.get_text_config().vocab_size)
        )  # type: ignore[operator, union-attr]
    return drafter


def _read_states(
    module: FineTune,
    config: dict[str, Any],
    base: Base,
    tuned: trained_module.Tuned | None,
    found: rows_module.Data,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let a drafter learn from its target's states on disk, which are made first where they are
    missing."""
    assert isinstance(module.loss, DraftLoss)
    assert module.drafter is not None
    assert found.train is not None
    loss, width = module.loss, base.config.get_text_config().hidden_size
    key = hidden_states.key_of(
        base,
        dtype,
        None if tuned is None else tuned.saved,
        found.identity["train"]["sha256"],
        module.drafter.layers,
    )
    loss.states = hidden_states.prepared(
        Path(config["target"]["features"]).expanduser(),
        key,
        found.train,
        lambda batch: loss.forward(batch)[:2],
        width,
        base.tokenizer.pad_token_id,
        config["batch_size"],
        device,
    ).states


def _calibration(
    found: rows_module.Data, plan: BatchOrder | None
) -> Iterator[dict[str, torch.Tensor]]:
    """The run's first micro-batches as transformers' models take them, for adapters that are
    computed from data."""
    if plan is None:
        raise DataError(
            "this initialisation reads training data beforehand, which task.streaming=true does not"
            " allow"
        )
    assert found.train is not None
    for step in range(plan.steps(None, None)):
        for picks in plan.micro_batches(step):
            items = [found.train[pick] for pick in picks]
            batch = found.collate(items)
            lengths = torch.tensor([[sum(len(row.ids) for row in rows)] for _, rows in items])
            mask = (torch.arange(batch["input_ids"].shape[1]) < lengths).long()
            yield {
                "input_ids": batch["input_ids"],
                "attention_mask": mask,
                "labels": batch.get("classes", batch["labels"]),
            }


def _calibrate(
    module: FineTune,
    penalty: DensityDEFT,
    found: rows_module.Data,
    plan: BatchOrder | None,
    device: torch.device,
    journal: Journal,
) -> None:
    """Let the penalty measure on the run's first micro-batches, the same on every rank, what it
    keeps from then on."""
    if plan is not None and found.train is not None:
        rows = found.train
        picked = (
            picks for step in range(plan.steps(None, None)) for picks in plan.micro_batches(step)
        )
        module.calibrate(
            to_device(found.collate([rows[pick] for pick in picks]), device) for picks in picked
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
    journal.write("penalty", 0, taus)


def _prompts(config: dict[str, Any]) -> int:
    evaluation = config["callbacks"].get("evaluation")
    return max(evaluation["generate"], evaluation["samples"]) if evaluation else 0


def _loggers(config: dict[str, Any], place: RunFolder, record: dict[str, Any]) -> list[Any]:
    start = record["starts"][-1] | {"number": len(record["starts"])}
    made = [instantiate(node) for node in config["logger"].values() if node is not None]
    loggers = [
        make(
            folder=place.path, run_id=record["id"], name=config["name"], config=config, start=start
        )
        for make in made
    ]
    return [logger for logger in loggers if logger is not None]


def _callbacks(config: dict[str, Any], context: Context) -> list[lightning.Callback]:
    """In their order at the end of a step: metrics, evaluation, what decides to cool down and stop,
    what saves, what shows."""
    nodes = config["callbacks"]
    made = {name: instantiate(node)(context) for name, node in nodes.items() if node is not None}
    every = nodes["progress"]["every"] if nodes.get("progress") else 1
    before = [made.pop(name) for name in ("evaluation", "averaging", "cooldown") if name in made]
    # first: what comes behind it sees the average
    free = [ScheduleFree()] if schedule_free(config) else []
    return [*free, Metrics(context, every), *before, Stopping(context), *made.values()]


def _loader(
    config: dict[str, Any],
    found: rows_module.Data,
    plan: BatchOrder | None,
    steps: int,
    done: int,
    lightning_: lightning.Trainer,
) -> DataLoader:
    pinned = lightning_.strategy.root_device.type == "cuda"
    rank, ranks = lightning_.global_rank, lightning_.world_size
    if plan is None:
        stream = Stream(found.task, found.renderer, found.collate, config, steps, done, rank, ranks)
        return DataLoader(stream, batch_size=None, pin_memory=pinned)
    assert found.train is not None
    sampler = Batches(plan, done, steps, rank)
    return Loader(
        found.train,
        batch_sampler=sampler,
        collate_fn=found.collate,
        num_workers=config["workers"],
        pin_memory=pinned,
        minutes=config["loading_timeout"],
    )


def _evaluate_only(lightning_: lightning.Trainer, module: FineTune) -> None:
    for callback in lightning_.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Evaluation):
            callback.run(lightning_, module, graded=True)


def _say_why_it_ended(context: Context, module: FineTune) -> None:
    context.journal.write_csv()
    if context.signals.received is not None:
        raise slurm_job.Stopped(
            context.signals.received,
            context.folder.path,
            module.step,
            progress.planned(context.steps),
        )
    if context.stopped is not None:
        log.info(
            "stopped after step %d%s: %s", module.step, progress.of(context.steps), context.stopped
        )
    elif module.step != context.steps:
        raise Unfinished(
            f"the run ended after step {module.step}{progress.of(context.steps)} without a reason",
            1,
        )
