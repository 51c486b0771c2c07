"""The program, top to bottom: open the folder, check, load, fit, export, report."""

from __future__ import annotations

import gc
import logging

from omegaconf import DictConfig

from trainer.callbacks.rollback import RolledBack
from trainer.cluster.signals import Signals
from trainer.session.model import make_module
from trainer.session.session import Session

log = logging.getLogger("trainer")


def run(cfg: DictConfig, signals: Signals) -> float | None:
    """Run a composed, checked config. Return the last held-out loss, for sweeps.

    Raises:
        slurm_job.Stopped: a signal ended it. Others: see trainer.session.failures.
    """
    while True:
        try:
            return run_once(cfg, signals)
        except RolledBack as back:
            log.warning("%s", back)
        signals.restart()
        gc.collect()  # the model of the start that is over


def run_once(cfg: DictConfig, signals: Signals) -> float | None:
    """Start or resume the run, and do what is left of it. Raises RolledBack if it has to resume
    from an earlier checkpoint."""
    with Session.open(cfg, signals) as session:
        recipe = session.make_recipe()  # base, task, adapter, tokenised rows, order of batches
        session.check(recipe)  # preflight: warnings are logged, errors end the run
        start = session.start_point(recipe)  # fresh, resumed or branched off
        if start.ended is not None:
            return session.last_loss()
        session.record(recipe, start)  # run.yaml
        loaded = session.load_model(recipe, start)  # base, kernels, target, drafter, adapter
        module = make_module(recipe, loaded, start)  # objective, schedule, penalty
        session.attach(module, recipe, start)  # dashboards, callbacks
        if recipe.trains:
            session.fit(module, recipe, start)
            session.save_results(module, recipe)  # adapter/, drafter/
        else:
            session.evaluate(module, recipe)
        return session.report()
