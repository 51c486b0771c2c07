"""W&B and TensorBoard. They never stop or delay a run: metrics.jsonl is the record, and they hold
copies of it.

A failing copy is logged once, and the run continues. Data that W&B's server did not receive stays
in RUN/wandb, one folder for each start of the run, until `wandb sync` has uploaded it. A file
NAME.wandb.synced marks a file as uploaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from trainer.callbacks import wandb_settings
from trainer.callbacks.dashboards import AXES, Dashboard, first_line, numbers
from trainer.config.errors import ConfigError
from trainer.config.secrets import redact
from trainer.models.losses import NonFinite
from trainer.storage.atomic import write_text
from trainer.storage.journal import NO_METRICS

log = logging.getLogger(__name__)

SLURM = (
    "JOB_ID",
    "ARRAY_JOB_ID",
    "ARRAY_TASK_ID",
    "RESTART_COUNT",
    "JOB_PARTITION",
    "JOB_NODELIST",
    "NTASKS",
)


class Wandb:
    """A W&B run under the id of run.yaml."""

    name = "W&B"

    def __init__(
        self,
        run: Any,
        folder: Path,
        title: str,
        online: bool,
        artifacts: bool,
        alerts: bool,
        samples: int,
        limit: float,
    ):
        self.run, self.folder, self.title, self.online = run, folder, title, online
        self.artifacts, self.alerts, self.samples, self.limit = artifacts, alerts, samples, limit
        self.first: dict[str, Any] = {}  # evaluation of this start
        self.last: dict[str, Any] = {}
        for axis in AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="global_step", step_sync=True)
        if online:
            _check_server_now(run)

    def log(self, kind: str, step: int, tokens: int | None, values: dict[str, Any]) -> None:
        if kind == "evaluation":
            self.first, self.last = self.first or values, values
        if kind == "skipped" and self.alerts:
            text = (
                f"Step {step} was skipped: loss {values.get('loss')}, gradient norm"
                f" {values.get('grad_norm')}."
            )
            self.run.alert(f"{self.title}: not finite", text, level="WARN", wait_duration=3600)
        if metrics := numbers(kind, values):
            self.run.log(
                metrics | {"global_step": step} | ({} if tokens is None else {"tokens": tokens})
            )

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        if not self.samples or not samples:
            return
        import wandb

        scores = list(dict.fromkeys(name for row in samples for name in row.get("scores", {})))
        texts = ["where", "prompt", "expected", "answer"]
        rows = [
            [row.get(k) for k in texts] + [row.get("scores", {}).get(k) for k in scores]
            for row in samples[: self.samples]
        ]
        table = wandb.Table(columns=["step", *texts, *scores], data=[[step, *row] for row in rows])
        self.run.log({f"samples/{'after' if step else 'before'}": table, "global_step": step})

    def finish(self, error: BaseException | None) -> None:
        """End the W&B run with the run, not with the process, so that its file is complete before a
        sweep starts the next run.

        W&B's own time limit does not apply while an artifact waits for a server that hangs, so the
        limit is kept here."""
        # slurm_job.Stopped has the signal's number. Then time is short: the queue kills slow jobs.
        signal = getattr(error, "number", None)
        code = 0 if error is None else 128 + signal if signal else getattr(error, "code", 1)
        code = code if isinstance(code, int) else 1
        limit = min(self.limit, 10) if code > 128 else self.limit
        errors: list[BaseException] = []

        def end() -> None:
            try:
                self._alert_end(error)
                if error is None and self.artifacts:
                    self._upload()
                if code > 128:
                    self.run.mark_preempting()
                self.run.finish(exit_code=code)
            except BaseException as fault:
                errors.append(fault)

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(limit + 5)
        if thread.is_alive():
            errors.append(TimeoutError(f"it took longer than {limit:g} s to end"))
            for process in _services():
                process.kill()
            thread.join(3)
        local = Path(self.run.dir).parent
        if errors:
            log.warning(
                "W&B: %s, so not everything was uploaded. %s",
                first_line(errors[0]).rstrip("."),
                command(self.folder),
            )
        elif self.online:
            for file in local.glob("*.wandb"):
                write_text(file.with_name(f"{file.name}.synced"), "")
        else:
            log.info("W&B: this run was logged offline. %s", command(self.folder))

    def _alert_end(self, error: BaseException | None) -> None:
        if not self.alerts:
            return
        if error is None:
            held_out = ", ".join(
                f"{name} {value:.4g}"
                + (
                    f" (before {self.first[name]:.4g})"
                    if self.first is not self.last and name in self.first
                    else ""
                )
                for name, value in self.last.items()
                if name not in NO_METRICS and isinstance(value, int | float)
            )
            self.run.alert(
                f"{self.title} has finished",
                f"Held out: {held_out}" if held_out else "It was not evaluated.",
            )
        elif isinstance(error, NonFinite):
            self.run.alert(f"{self.title}: not finite", first_line(error), level="ERROR")
        else:
            self.run.alert(f"{self.title} has stopped", first_line(error), level="WARN")

    def _upload(self) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{self.run.id}", "adapter")
        for name in ("adapter", "adapter-averaged", "drafter"):
            if (self.folder / name).is_dir():
                artifact.add_dir(str(self.folder / name), name=name)
        if (self.folder / "report.html").exists():
            artifact.add_file(str(self.folder / "report.html"))
        self.run.log_artifact(artifact)


def wandb_logger(
    folder: Path,
    run_id: str,
    name: str,
    config: dict[str, Any],
    start: dict[str, Any],
    title: str | None,
    project: str,
    entity: str | None,
    mode: str,
    group: str | None,
    job_type: str | None,
    tags: list[str],
    notes: str | None,
    samples: int,
    artifacts: bool,
    alerts: bool,
    system: float | None,
    init_timeout: float,
    finish_timeout: float,
) -> Dashboard | None:
    """Start a W&B run under the id of run.yaml, so that a resumed run stays one run. Without a key
    or a network it is logged offline, and one line says so. `start` is run.yaml's entry of this
    start."""
    mode = _mode_of(mode)
    if mode == "disabled":
        return None
    files = (folder / "wandb").glob(f"*run-*-{run_id}*/*.wandb")
    if count := sum(not _complete(file) for file in files):
        log.info("W&B: %d earlier parts of this run are not uploaded. %s", count, command(folder))
    online = mode != "offline"
    if online and not wandb_settings.has_key():
        online = False
        log.info("W&B: no API key, so this run is logged offline. %s", command(folder))
    settings: dict[str, Any] = {"x_stats_sampling_interval": system}
    if system is None:
        settings = {"x_disable_stats": True}
    settings |= {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
    in_sweep = "WANDB_SWEEP_ID" in os.environ
    arguments = {
        "project": project,
        "entity": entity,
        "id": os.environ.get("WANDB_RUN_ID", run_id) if in_sweep else run_id,
        "name": title or name,
        "resume": "allow",
        "dir": folder,
        "group": group,
        "job_type": job_type,
        "tags": list(tags),
        "notes": notes,
        "config": config | {"start": start | _environment()},
    }
    run, online = _start(online, arguments, settings, folder)
    if run is None:
        return None
    return Wandb(run, folder, title or name, online, artifacts, alerts, samples, finish_timeout)


def _mode_of(mode: str) -> str:
    """Return the config's mode; `auto` follows W&B's environment variable."""
    if mode != "auto":
        return mode
    requested = os.environ.get("WANDB_MODE", mode)
    return {"dryrun": "offline"}.get(requested, requested)  # W&B's older word


def _start(
    online: bool, arguments: dict[str, Any], settings: dict[str, Any], folder: Path
) -> tuple[Any, bool]:
    """Return (the W&B run, whether it is online). If it cannot start online it starts offline; if
    it cannot start at all it is None."""
    for mode in ["online", "offline"] if online else ["offline"]:
        existing = set((folder / "wandb").glob("*"))
        try:
            with _public_arguments():
                return _init(arguments | {"mode": mode}, settings), mode == "online"
        except Exception as error:
            _discard(existing, folder / "wandb")
            if mode == "offline":
                log.warning(
                    "W&B could not be started (%s); the run continues without it", first_line(error)
                )
            else:
                log.warning(
                    "W&B: %s, so this run is logged offline. %s", first_line(error), command(folder)
                )
    return None, False


def _init(arguments: dict[str, Any], more_settings: dict[str, Any]) -> Any:
    import wandb

    # W&B would record the command line and the repository's address, which may hold secrets.
    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_transaction_log_flush_interval=1,
        finish_timeout_raises=True,
        **more_settings,
    )
    wandb_settings.own_only()
    run = wandb.init(**arguments, settings=settings)
    if arguments["mode"] == "online":
        wandb_settings.report_server(run)
    return run


def _discard(existing: set[Path], folder: Path) -> None:
    """Remove a run that could not be started. Otherwise W&B's service would refuse its id at the
    next attempt, and `wandb sync` would upload it."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    for path in set(folder.glob("run-*")) - existing:
        shutil.rmtree(path, ignore_errors=True)


def _check_server_now(run: Any) -> None:
    """Let W&B check its key now, and skip its check of an artifact's type. It would do both when a
    table or an artifact is logged, and training would wait for a server that hangs.

    W&B remembers the result of the first. The second only reports a wrong type early.
    """
    with contextlib.suppress(Exception):
        run._public_api()
        run._assert_can_log_artifact = lambda artifact: None


def _services() -> Iterator[psutil.Process]:
    """Yield W&B's processes that this one has started."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("wandb-core"):
                yield process


@contextlib.contextmanager
def _public_arguments() -> Iterator[None]:
    """Redact secrets in sys.argv, which W&B reads."""
    argv = list(sys.argv)
    sys.argv[:] = [redact(word) for word in argv]
    try:
        yield
    finally:
        sys.argv[:] = argv


def _environment() -> dict[str, Any]:
    """Return the host and the SLURM job, for W&B's config."""
    job = {
        f"slurm_{name.lower()}": os.environ[f"SLURM_{name}"]
        for name in SLURM
        if f"SLURM_{name}" in os.environ
    }
    return {"host": platform.node(), **job}


def _complete(file: Path) -> bool:
    return file.with_name(f"{file.name}.synced").exists()


def command(folder: Path) -> str:
    """Return the command that uploads the parts of a run that W&B's server lacks."""
    return f"Upload it with: wandb sync --include-online {shlex.quote(str(folder / 'wandb'))}"


class TensorBoard:
    """Event files in the run folder, for TensorBoard."""

    name = "TensorBoard"

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, kind: str, step: int, tokens: int | None, values: dict[str, Any]) -> None:
        for name, value in (
            numbers(kind, values) | ({} if tokens is None else {"tokens": tokens})
        ).items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        pass

    def finish(self, error: BaseException | None) -> None:
        self.writer.close()


def tensorboard_logger(
    folder: Path, run_id: str, name: str, config: dict[str, Any], start: dict[str, Any]
) -> Dashboard | None:
    """Write event files into the run folder.

    Raises:
        ConfigError: TensorBoard is not installed; the message says how.
    """
    try:
        return TensorBoard(folder)
    except ModuleNotFoundError:
        raise ConfigError(
            "logger=tensorboard needs a package that is not installed: pip install tensorboard"
        ) from None
