"""Dashboards. They may never stop a run nor hold it up: metrics.jsonl is the record, W&B and
TensorBoard hold copies of it.

Whatever fails in a copy is told once, and the run goes on. What W&B's server did not take stays in
RUN/wandb, each start of the run in a folder of its own, until `wandb sync` has uploaded it; a file
NAME.wandb.synced stands beside what is complete.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import platform
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil

from trainer.config.errors import ConfigError
from trainer.config.secrets import redact
from trainer.models.losses import NonFinite
from trainer.storage.atomic import write_text

log = logging.getLogger(__name__)

AXES = ("global_step", "tokens")
SLURM = (
    "JOB_ID",
    "ARRAY_JOB_ID",
    "ARRAY_TASK_ID",
    "RESTART_COUNT",
    "JOB_PARTITION",
    "JOB_NODELIST",
    "NTASKS",
)


class Dashboard(Protocol):
    """Holds a copy of the journal, and may raise anything."""

    name: str

    def log(self, kind: str, step: int, tokens: int | None, values: dict[str, Any]) -> None:
        """A row of the journal, as the run wrote it after so many tokens."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Generated answers."""

    def finish(self, error: BaseException | None) -> None:
        """The run is over; `error` ended it."""


class Dashboards:
    """The dashboards of a run, which end with it."""

    def __init__(self) -> None:
        self.all: list[Dashboard] = []

    def __enter__(self) -> Dashboards:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for dashboard in self.all:
            try:
                dashboard.finish(error)
            except Exception as fault:
                log.warning("%s: %s", dashboard.name, first_line(fault))
        self.all.clear()


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, without secrets."""
    return redact(str(error)).partition("\n")[0] or type(error).__name__


def numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of the journal under the names that dashboards group them by; see
    docs/dashboard.md."""
    named = {}
    for key, value in values.items():
        if isinstance(value, int | float) and key not in AXES:
            named[f"{_prefix(kind, key)}/{key}"] = value
    return named


def _prefix(kind: str, key: str) -> str:
    if key.startswith("offset") or key in ("accepted", "expected"):
        return {"step": "heads", "evaluation": "heads_eval"}.get(kind, f"heads_{kind}")
    if kind == "step" and key in ("tokens_per_s", "trained_per_s", "seconds", "memory_gb"):
        return "speed"
    names = {
        "step": "train",
        "evaluation": "eval",
        "average": "eval_average",
        "adapter": "mask",
        "penalty": "density",
    }
    return names.get(kind, kind)


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
            _ask_nothing_later(run)

    def log(self, kind: str, step: int, tokens: int | None, values: dict[str, Any]) -> None:
        if kind == "evaluation":
            self.first, self.last = self.first or values, values
        if kind == "skipped" and self.alerts:
            text = (
                f"Step {step} was skipped: loss {values.get('loss')}, gradient norm"
                f" {values.get('grad_norm')}."
            )
            self.run.alert(f"{self.title}: not finite", text, level="WARN", wait_duration=3600)
        if named := numbers(kind, values):
            self.run.log(
                named | {"global_step": step} | ({} if tokens is None else {"tokens": tokens})
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
        """End the W&B run with the run, not with the process: a sweep's next run is one of its own,
        and its file is whole.

        W&B's own limit does not hold while an artifact waits for a server that hangs, so that there
        is one of ours.
        """
        # of requeue.Stopped: the queue kills what takes its time
        signal = getattr(error, "number", None)
        code = 0 if error is None else 128 + signal if signal else getattr(error, "code", 1)
        code = code if isinstance(code, int) else 1
        limit = min(self.limit, 10) if code > 128 else self.limit
        late: list[BaseException] = []

        def end() -> None:
            try:
                self._say_how_it_ended(error)
                if error is None and self.artifacts:
                    self._upload()
                if code > 128:
                    self.run.mark_preempting()
                self.run.finish(exit_code=code)
            except BaseException as fault:
                late.append(fault)

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(limit + 5)
        if thread.is_alive():
            late.append(TimeoutError(f"it took longer than {limit:g} s to end"))
            for process in _services():
                process.kill()
            thread.join(3)
        part = Path(self.run.dir).parent
        if late:
            log.warning(
                "W&B: %s, so that not all was uploaded. %s",
                first_line(late[0]).rstrip("."),
                command(self.folder),
            )
        elif self.online:
            for file in part.glob("*.wandb"):
                write_text(file.with_name(f"{file.name}.synced"), "")
        else:
            log.info("W&B: this run was logged offline. %s", command(self.folder))

    def _say_how_it_ended(self, error: BaseException | None) -> None:
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
                if name != "seconds" and isinstance(value, int | float)
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
    """A W&B run under the id that run.yaml holds, so that a run that goes on stays one run; offline
    where there is no key or no network, with one line that says so. `start` is run.yaml's entry of
    this start."""
    if mode == "auto":
        asked = os.environ.get("WANDB_MODE", mode)
        mode = {"dryrun": "offline"}.get(asked, asked)  # W&B's older word
    if mode == "disabled":
        return None
    if left := [
        part for part in (folder / "wandb").glob(f"*run-*-{run_id}*/*.wandb") if not _complete(part)
    ]:
        log.info(
            "W&B: %d earlier parts of this run are not uploaded. %s", len(left), command(folder)
        )
    online = mode != "offline"
    if online and not _has_key():
        online = False
        log.info("W&B: no API key, so this run is logged offline. %s", command(folder))
    limits = {
        "init_timeout": init_timeout,
        "finish_timeout": finish_timeout,
        "finish_timeout_raises": True,
    }
    stats = {"x_disable_stats": True} if system is None else {"x_stats_sampling_interval": system}
    about = {
        "project": project,
        "entity": entity,
        "id": os.environ.get("WANDB_RUN_ID", run_id) if "WANDB_SWEEP_ID" in os.environ else run_id,
        "name": title or name,
        "resume": "allow",
        "dir": folder,
        "group": group,
        "job_type": job_type,
        "tags": list(tags),
        "notes": notes,
        "config": config | {"start": start | _environment()},
    }
    for chosen in ["online", "offline"] if online else ["offline"]:
        before = set((folder / "wandb").glob("*"))
        try:
            with _public_arguments():
                run = _started(about | {"mode": chosen}, limits | stats)
            return Wandb(
                run,
                folder,
                title or name,
                chosen == "online",
                artifacts,
                alerts,
                samples,
                finish_timeout,
            )
        except Exception as error:
            _give_up(before, folder / "wandb")
            if chosen == "offline":
                log.warning(
                    "W&B could not be started (%s); the run goes on without it", first_line(error)
                )
            else:
                log.warning(
                    "W&B: %s, so this run is logged offline. %s", first_line(error), command(folder)
                )
    return None


def _started(about: dict[str, Any], more: dict[str, Any]) -> Any:
    import wandb

    # W&B reads the whole command line and the repository's address, either of which may hold what
    # is nobody's business.
    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_transaction_log_flush_interval=1,
        **more,
    )
    return wandb.init(**about, settings=settings)


def _give_up(before: set[Path], place: Path) -> None:
    """Forget a run that could not be started: W&B's service would refuse its id to the next try,
    and `wandb sync` would find it."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    for path in set(place.glob("run-*")) - before:
        shutil.rmtree(path, ignore_errors=True)


def _ask_nothing_later(run: Any) -> None:
    """Let logging a table or an artifact ask the server nothing, which would hold up training while
    the server hangs.

    W&B checks the key once and keeps the answer; the other question only finds a wrong type early.
    """
    with contextlib.suppress(Exception):
        run._public_api()
        run._assert_can_log_artifact = lambda artifact: None


def _services() -> Iterator[psutil.Process]:
    """W&B's own processes that this one has started."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("wandb-core"):
                yield process


@contextlib.contextmanager
def _public_arguments() -> Iterator[None]:
    """The command line without what looks like a secret."""
    had = list(sys.argv)
    sys.argv[:] = [redact(word) for word in had]
    try:
        yield
    finally:
        sys.argv[:] = had


def _environment() -> dict[str, Any]:
    """Where the run runs, for W&B's config."""
    job = {
        f"slurm_{name.lower()}": os.environ[f"SLURM_{name}"]
        for name in SLURM
        if f"SLURM_{name}" in os.environ
    }
    return {"host": platform.node(), **job}


def _complete(file: Path) -> bool:
    return file.with_name(f"{file.name}.synced").exists()


def command(folder: Path) -> str:
    """What uploads all that W&B's server has not got of a run."""
    return f"Upload it with: wandb sync --include-online {shlex.quote(str(folder / 'wandb'))}"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    """Event files in the run folder."""

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
    """Event files in the run folder.

    Raises:
        ConfigError: TensorBoard is not installed; the message says how.
    """
    try:
        return TensorBoard(folder)
    except ModuleNotFoundError:
        raise ConfigError(
            "logger=tensorboard needs a package that is not installed: pip install tensorboard"
        ) from None
