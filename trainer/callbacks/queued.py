"""MLflow, Comet and Trackio. A separate thread sends each row, so that a slow or unreachable server
neither stops nor delays a run. metrics.jsonl is the record.

The first failure is logged once; the rows after it are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from trainer.callbacks.dashboards import Dashboard, first_line, numbers
from trainer.config.errors import ConfigError

log = logging.getLogger(__name__)

WAITING = 10_000  # rows that may wait for a server, at most
# of each dashboard: its module, its package and its choice of logger
PACKAGES = {
    "MLflow": ("mlflow", "mlflow-skinny", "mlflow"),
    "Comet": ("comet_ml", "comet-ml", "comet"),
    "Trackio": ("trackio", "trackio", "trackio"),
}


class Remote(Protocol):
    """A server's client, used by one thread."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the numbers of a step."""

    def close(self, failed: bool) -> None:
        """End the run there."""


class Queued:
    """A dashboard whose client is opened and used by a thread."""

    def __init__(self, name: str, connect: Callable[[], Remote], limit: float):
        self.name, self.connect, self.limit = name, connect, limit
        self.rows: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(WAITING)
        self.failed = False  # the run, which decides how it ends there
        self.lost = False  # the server
        self.thread = threading.Thread(target=self._send, name=name, daemon=True)
        self.thread.start()

    def log(self, kind: str, step: int, tokens: int | None, values: dict[str, Any]) -> None:
        """Queue the numbers of a row. A full queue means that the server hangs."""
        if self.lost:
            return
        row = numbers(kind, values) | ({} if tokens is None else {"tokens": float(tokens)})
        try:
            self.rows.put_nowait((row, step))
        except queue.Full:
            self._give_up(f"{WAITING:,} rows wait for the server")

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Leave answers to the report and to W&B."""

    def finish(self, error: BaseException | None) -> None:
        """Wait until all rows are sent, at most `limit` seconds."""
        if self.lost:
            return
        self.failed = error is not None
        end = time.monotonic() + self.limit
        with contextlib.suppress(queue.Full):
            self.rows.put(None, timeout=self.limit)
        self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            self._give_up(f"{self.rows.qsize():,} rows were not sent within {self.limit:g} seconds")

    def _send(self) -> None:
        remote = None
        try:
            remote = self.connect()
            while (row := self.rows.get()) is not None:
                remote.log(*row)
            remote.close(self.failed)
        except BaseException as error:  # clients raise SystemExit, too
            self._give_up(first_line(error))

    def _give_up(self, reason: str) -> None:
        if not self.lost:
            log.warning("%s: %s. The run continues without it", self.name, reason)
        self.lost = True


class Lightnings:
    """A logger of Lightning's."""

    def __init__(self, logger: Any, config: dict[str, Any]):
        self.logger = logger
        logger.log_hyperparams(config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the numbers of a step."""
        self.logger.log_metrics(values, step)

    def close(self, failed: bool) -> None:
        """End the run there."""
        self.logger.finalize("failed" if failed else "success")


class Trackio:
    """A Trackio run."""

    def __init__(self, run: Any):
        self.run = run

    def log(self, values: dict[str, float], step: int) -> None:
        """Write the numbers of a step."""
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self.run.finish()


def mlflow_logger(
    folder: Path,
    run_id: str,
    name: str,
    config: dict[str, Any],
    start: dict[str, Any],
    tracking_uri: str | None,
    experiment: str,
    finish_timeout: float,
) -> Dashboard | None:
    """Log to MLflow by Lightning's logger. A resumed run continues its MLflow run, which has the
    tag `graft.id`.

    Raises:
        ConfigError: MLflow is not installed; the message says how.
    """
    _needs("MLflow")

    def connect() -> Remote:
        from lightning.pytorch.loggers import MLFlowLogger
        from mlflow import MlflowClient, get_tracking_uri

        place = tracking_uri or get_tracking_uri()
        client = MlflowClient(place)
        known = client.get_experiment_by_name(experiment)
        tag = re.sub(r"[^\w.-]", "", run_id)
        earlier = known and client.search_runs([known.experiment_id], f"tags.`graft.id` = '{tag}'")
        logger = MLFlowLogger(
            experiment,
            name,
            place,
            tags={"graft.id": tag},
            run_id=earlier[0].info.run_id if earlier else None,
        )
        return Lightnings(logger, {} if earlier else config)

    return Queued("MLflow", connect, finish_timeout)


def comet_logger(
    folder: Path,
    run_id: str,
    name: str,
    config: dict[str, Any],
    start: dict[str, Any],
    workspace: str | None,
    project: str,
    online: bool,
    finish_timeout: float,
) -> Dashboard | None:
    """Log to Comet by Lightning's logger. A resumed run continues its experiment, whose key is
    made from the run's id.

    Raises:
        ConfigError: Comet is not installed; the message says how.
    """
    _needs("Comet")

    def connect() -> Remote:
        from lightning.pytorch.loggers import CometLogger

        logger = CometLogger(
            workspace=workspace,
            project=project,
            experiment_key=hashlib.sha256(run_id.encode()).hexdigest()[:32],
            mode="get_or_create",
            online=online,
            name=name,
        )
        return Lightnings(logger, config)

    return Queued("Comet", connect, finish_timeout)


def trackio_logger(
    folder: Path,
    run_id: str,
    name: str,
    config: dict[str, Any],
    start: dict[str, Any],
    project: str,
    space_id: str | None,
    finish_timeout: float,
) -> Dashboard | None:
    """Log to Trackio, a dashboard on this machine (`trackio show`), or in a Space of the hub. A
    resumed run continues under its name, which ends in the run's id.

    Raises:
        ConfigError: Trackio is not installed; the message says how.
    """
    _needs("Trackio")

    def connect() -> Remote:
        import trackio

        run = trackio.init(
            project=project,
            name=f"{name}-{run_id}",
            config=config,
            space_id=space_id,
            resume="allow",
            embed=False,
        )
        return Trackio(run)

    return Queued("Trackio", connect, finish_timeout)


def _needs(name: str) -> None:
    """Check that the package of a dashboard is installed.

    Raises:
        ConfigError: it is not.
    """
    from importlib.util import find_spec

    module, package, choice = PACKAGES[name]
    if find_spec(module) is None:
        raise ConfigError(
            f"logger={choice} needs a package that is not installed: pip install {package}"
        )
