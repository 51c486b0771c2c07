"""The live run: its folder, signals, dashboards and Lightning's trainer."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from adapters.delta import Adapter
from adapters.full import Full, Nothing
from trainer.assembly import quiet
from trainer.assembly.build import instantiate
from trainer.assembly.recipe import Recipe
from trainer.assembly.rows import add_prompts
from trainer.callbacks import RunState, benchmarked, progress
from trainer.callbacks.dashboards import Dashboards, make_dashboards
from trainer.callbacks.end_of_step import EndOfStep
from trainer.callbacks.evaluation import Evaluation
from trainer.callbacks.metrics import Metrics
from trainer.callbacks.rollback import Rollback
from trainer.callbacks.schedulefree import ScheduleFree
from trainer.callbacks.stopping import Stopping
from trainer.cluster import slurm_job
from trainer.cluster.signals import Signals
from trainer.config import history
from trainer.config.conflicts import schedule_free
from trainer.data import ends
from trainer.data.batches import Batches
from trainer.data.chat_template import use_day
from trainer.data.loader import Loader
from trainer.data.streaming import StreamingBatches
from trainer.models.losses import NonFinite
from trainer.schedules import length
from trainer.session import kernels, report_html, results
from trainer.session.inspect import check_before_start, refuse_monitor
from trainer.session.model import LoadedModel, calibrate_penalty, load_model
from trainer.session.start_point import (
    StartPoint,
    drop_cooldown,
    find_start_point,
    record_places,
    skips_of,
)
from trainer.speed import cpu_load
from trainer.storage import atomic, checkpoints, run_folder
from trainer.storage.journal import Journal
from trainer.storage.run_folder import FolderError, RunFolder, read
from trainer.training.finetune import FineTune
from trainer.training.lightning_trainer import make_trainer
from trainer.training.ranks import decide_on_rank0, destroy_process_group, shared_run_folder

log = logging.getLogger("trainer")


class Unfinished(RuntimeError):
    """The run ended before its planned steps. `code` is the process's exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass
class Session:
    """One run in this process."""

    config: dict[str, Any]
    choices: dict[str, Any]  # the file of conf/ that each config group uses
    overrides: list[str]
    adapter: Adapter
    lightning_trainer: lightning.Trainer
    run_folder: RunFolder
    signals: Signals
    dashboards: Dashboards
    journal: Journal
    owns_process_group: bool  # False where the process group was there before the run
    cpu_before: cpu_load.Seconds
    run_yaml: dict[str, Any] = field(default_factory=dict)  # stays empty on ranks other than 0
    earlier: dict[str, Any] | None = None  # run.yaml of the run that this one continues

    @classmethod
    @contextlib.contextmanager
    def open(cls, cfg: DictConfig, signals: Signals) -> Iterator[Session]:
        """Create and lock the run folder and create Lightning's trainer; release both at the end.

        Raises:
            slurm_job.Stopped: a signal came before there was a step to save.
        """
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        quiet.quiet()
        adapter: Adapter = instantiate(config["adapter"])
        path = Path(HydraConfig.get().runtime.output_dir)
        owns_process_group = not torch.distributed.is_initialized()
        trainer = make_trainer(config, adapter, path)
        if trainer.world_size > 1:
            path = shared_run_folder(trainer, path)
        with RunFolder.create(path, trainer.is_global_zero) as run_folder:
            log.info("run folder: %s", run_folder.path)
            try:
                with Dashboards() as dashboards:
                    yield cls(
                        config,
                        dict(HydraConfig.get().runtime.choices),
                        list(HydraConfig.get().overrides.task),
                        adapter,
                        trainer,
                        run_folder,
                        signals,
                        dashboards,
                        Journal(run_folder.path, [], trainer.is_global_zero),
                        owns_process_group,
                        kernels.set_up_process(config),
                    )
            except SystemExit:
                if signals.received is None:
                    raise
                saved = checkpoints.complete(run_folder.checkpoints)
                raise slurm_job.Stopped(
                    signals.received,
                    run_folder.path,
                    saved[-1].step if saved else None,
                    None,
                ) from None

    @property
    def is_rank0(self) -> bool:
        """Return whether this process is rank 0, which alone writes the run folder."""
        return self.lightning_trainer.is_global_zero

    def make_recipe(self) -> Recipe:
        """Collect everything that is known before weights are loaded."""
        trainer = self.lightning_trainer
        earlier = None
        with contextlib.suppress(FolderError):  # reported by start_point
            earlier = self.run_folder.earlier()
            if earlier is None and self.config["branch"]:
                earlier = read(self.config["branch"]["run"])[1]
        if earlier is not None and history.adopt(self.config, earlier["config"]):
            self.adapter = instantiate(self.config["adapter"])
        self.earlier = earlier

        def check(config: dict[str, Any], task: Any) -> None:
            refuse_monitor(config, task)
            use_day(earlier or {}, task)

        recipe = Recipe.of(
            self.config,
            self.adapter,
            trainer.strategy.root_device,
            trainer.world_size,
            check,
            ((earlier or {}).get("identity") or {}).get("target"),
        )
        if earlier is not None:
            recipe.data.earlier_ends = ends.recorded(earlier, recipe.base.tokenizer) or []
            if recipe.order is not None:
                recipe.order.skips = skips_of(earlier, self.config["branch"])
        return recipe

    def check(self, recipe: Recipe) -> None:
        """Check the run as preflight does, and log the warnings.

        Raises:
            BaseError: the checks found errors.
        """
        self.preflight = check_before_start(recipe, self.run_folder.path)

    def start_point(self, recipe: Recipe) -> StartPoint:
        """Find out where the run starts; rank 0 decides.

        Raises:
            UnusableCheckpoint, FolderError: see trainer.session.start_point.
        """
        identity = recipe.identity(self.choices)
        if self.config["threads"] == "auto" and self.lightning_trainer.world_size == 1:
            kernels.set_threads(recipe, self.earlier, self.cpu_before)

        def decide() -> StartPoint:
            start = find_start_point(self.run_folder, recipe, identity)
            if start.ended is not None:
                return start
            return kernels.choose(start, recipe, self.earlier)

        start = decide_on_rank0(self.lightning_trainer, decide, StartPoint)
        if self.is_rank0:  # after the decision, which reads the row counts of an earlier start
            text = json.dumps(self.preflight, indent=2)
            atomic.write_text(self.run_folder.path / "preflight.json", text)
            if start.ended is not None:
                record_places(self.run_folder, self.config)
        if start.ended is not None:
            report = self.run_folder.path / "report.html"
            place = f"report: {report}" if report.exists() else f"folder: {report.parent}"
            log.info("this run %s; nothing is left to do. Its %s", start.ended, place)
        return start

    def record(self, recipe: Recipe, start: StartPoint) -> None:
        """Write run.yaml, and remove the journal's rows after the start point."""
        if self.is_rank0:
            self.run_yaml = self.run_folder.record(
                self.config,
                self.overrides,
                recipe.identity(self.choices),
                start.earlier,
                start.parent,
                ends.record(recipe.ends, recipe.base.tokenizer),
                {"threads": torch.get_num_threads()}
                | {name: record for name, record in start.kernels().items() if record is not None},
            )
            run_folder.write_template(self.run_folder.path, recipe.data.renderer.template)
        self.journal.rewind(-1 if start.fresh else start.step, cooled=not start.drops_cooldown)
        if start.drops_cooldown and self.is_rank0:
            drop_cooldown(self.run_folder, start)

    def load_model(self, recipe: Recipe, start: StartPoint) -> LoadedModel:
        """Load the base and attach kernels, target, drafter and adapter to it.

        Raises:
            ConfigError: lm-eval lacks a task that the run is measured on.
        """
        benchmarked.refuse_unknown(self.config)
        return load_model(recipe, start, self.run_folder.path if self.is_rank0 else None)

    def attach(self, module: FineTune, recipe: Recipe, start: StartPoint) -> None:
        """Connect the run to its dashboards and callbacks, and take its first measurements."""
        stops = ends.stop_set(
            recipe.base.tokenizer, module.model, recipe.ends, recipe.data.renderer
        )
        add_prompts(recipe.data, _prompt_count(self.config), stops)
        if self.is_rank0:
            self.dashboards.all = make_dashboards(self.config, self.run_folder.path, self.run_yaml)
        self.journal.loggers = self.dashboards.all
        if module.penalty is not None and start.fresh:
            self.journal.write("penalty", 0, calibrate_penalty(module, recipe))
        self.run_state = RunState(
            self.run_folder,
            self.journal,
            self.signals,
            recipe.steps,
            recipe.data.held_out,
            recipe.data.rows_of,
            not isinstance(self.adapter, Full | Nothing) and not self.config["adapter"].get("from"),
            recipe.data.renderer,
            stops,
            self.config["max_time"],
            self.config["max_tokens"] if recipe.order is None else None,
        )
        self.run_state.constant_until = _constant_until(recipe)
        self.callbacks = _callbacks(self.config, self.run_state)
        self.lightning_trainer.callbacks = self.callbacks  # type: ignore[attr-defined]

    def fit(self, module: FineTune, recipe: Recipe, start: StartPoint) -> None:
        """Train from the start point to the end of the run.

        Raises:
            slurm_job.Stopped: a signal ended the run. Unfinished: it ended for no known reason.
            RolledBack: the run has to resume from an earlier checkpoint.
        """
        trainer = self.lightning_trainer
        loader = _loader(recipe, start.step, trainer)
        if recipe.device.type == "cpu" and trainer.world_size == 1:
            advice = cpu_load.crowded(
                self.cpu_before, cpu_load.seconds(), torch.get_num_threads(), cpu_load.available()
            )
            if advice is not None:
                log.warning("%s", advice)
        checkpoint = str(start.checkpoint.path) if start.checkpoint else None
        try:
            trainer.fit(module.train(), loader, ckpt_path=checkpoint)
        except NonFinite as error:
            for callback in self.callbacks:
                if isinstance(callback, Rollback):
                    callback.go_back(error, module)
            raise
        if self.owns_process_group and torch.distributed.is_initialized():
            destroy_process_group(trainer)
        report_end(self.run_state, module)

    def evaluate(self, module: FineTune, recipe: Recipe) -> None:
        """Evaluate a run that trains nothing."""
        module.to(recipe.device)
        for callback in self.callbacks:
            if isinstance(callback, Evaluation):
                callback.run(self.lightning_trainer, module, graded=True)

    def save_results(self, module: FineTune, recipe: Recipe) -> None:
        """Write adapter/ and drafter/, loaded back to compare them; rank 0 alone does."""
        if self.is_rank0:
            results.save(self.run_folder, self.run_yaml, recipe, module, self.callbacks)

    def report(self) -> float | None:
        """Write report.html, print the held-out numbers, and record that the run is finished.
        Return the last loss, for sweeps."""
        if self.is_rank0:
            results.show(self.journal)
            if self.config["report"]:
                report_html.write(self.run_folder.path)
                log.info("report: %s", self.run_folder.path / "report.html")
            self.run_folder.finish()
        return self.last_loss()

    def last_loss(self) -> float | None:
        """The loss of the last evaluation."""
        return results.last_loss(self.journal)


def report_end(run_state: RunState, module: FineTune) -> None:
    """Say why training ended.

    Raises:
        slurm_job.Stopped: a signal ended the run. Unfinished: it ended for no known reason.
    """
    run_state.journal.write_csv()
    if run_state.signals.received is not None:
        raise slurm_job.Stopped(
            run_state.signals.received,
            run_state.folder.path,
            module.step,
            progress.planned(run_state.steps),
        )
    if run_state.stopped is not None:
        log.info(
            "stopped after step %d%s: %s",
            module.step,
            progress.of(run_state.steps),
            run_state.stopped,
        )
    elif module.step != run_state.steps:
        step = f"step {module.step}{progress.of(run_state.steps)}"
        raise Unfinished(
            f"the run ended after {step} without a reason. Resume it with resume=auto", 1
        )


def _prompt_count(config: dict[str, Any]) -> int:
    """Return how many held-out prompts an evaluation answers."""
    evaluation = config["callbacks"].get("evaluation")
    return max(evaluation["generate"], evaluation["samples"]) if evaluation else 0


def _constant_until(recipe: Recipe) -> int | None:
    """Return the number of steps before the schedule's cooldown; None if it has none."""
    schedule, steps = recipe.config["schedule"], recipe.steps
    if recipe.config["branch"] or "cooldown" not in schedule:
        return None
    tokens = schedule["cooldown_tokens"]
    scheduled = steps - recipe.adapter.restart
    if tokens is None or recipe.order is None:
        cooldown = length(schedule["cooldown"], scheduled)
    else:
        cooldown = recipe.order.last_steps(tokens, steps)
    return (steps - cooldown) or None


def _callbacks(config: dict[str, Any], run_state: RunState) -> list[lightning.Callback]:
    """Make the run's callbacks. Lightning calls their hooks at the start of training in this order;
    EndOfStep has the order at the end of a step."""
    nodes = {name: node for name, node in config["callbacks"].items() if node is not None}
    interval = nodes["progress"]["every"] if "progress" in nodes else 1
    metrics, stopping = Metrics(run_state, interval), Stopping(run_state)
    callbacks = {name: instantiate(node)(run_state) for name, node in nodes.items()}
    end_of_step = EndOfStep(metrics, stopping, **callbacks)
    # These three start first: an evaluation that a signal interrupted is repeated before training,
    # the average is evaluated after the weights, and the cooldown reads the evaluation's counts.
    ordered = ("evaluation", "averaging", "cooldown")
    measuring = [callbacks.pop(name) for name in ordered if name in callbacks]
    # before all others, which see the averaged weights of a schedule-free optimiser
    schedulefree = [ScheduleFree()] if schedule_free(config) else []
    return [*schedulefree, end_of_step, metrics, *measuring, stopping, *callbacks.values()]


def _loader(recipe: Recipe, done: int, trainer: lightning.Trainer) -> DataLoader:
    """Make the loader of this rank's micro-batches, from the first one after `done` steps."""
    config, data, steps = recipe.config, recipe.data, recipe.steps
    pinned = recipe.device.type == "cuda"
    rank = trainer.global_rank
    if recipe.order is None:
        stream = StreamingBatches(
            data.task, data.renderer, data.collate, config, steps, done, rank, recipe.ranks
        )
        return DataLoader(stream, batch_size=None, pin_memory=pinned)
    assert data.train is not None
    return Loader(
        data.train,
        batch_sampler=Batches(recipe.order, done, steps, rank),
        collate_fn=data.collate,
        num_workers=config["workers"],
        pin_memory=pinned,
        minutes=config["loading_timeout"],
    )
