"""Dashboards. They may never stop a run: metrics.jsonl is the record, W&B and TensorBoard hold copies of it."""

from __future__ import annotations

import logging
import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from trainer.config import ConfigError

log = logging.getLogger(__name__)


class _Wandb(WandbLogger):
    """Ends the W&B run with the fit, not with the process: a sweep's next run is one of its own, and its file is whole."""

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def wandb_logger(
    folder: Path, run_id: str, name: str, config: dict[str, Any], project: str, entity: str | None, mode: str, group: str | None,
    tags: list[str], notes: str | None, init_timeout: float,
) -> Logger | None:  # fmt: skip
    """A W&B run under the id that run.yaml holds, so that a run that goes on stays one run; offline where there is no key or
    no network, with one line that says so."""
    if mode == "disabled":
        return None
    import wandb

    tries = [mode]
    if mode == "auto":
        tries = ["online", "offline"] if _has_key() else ["offline"]
        if tries == ["offline"]:
            log.info(
                "W&B: no API key, so this run is logged offline. Upload it with: wandb sync %s", folder / "wandb/offline-run-*"
            )
    for chosen in tries:
        settings = wandb.Settings(
            init_timeout=init_timeout,
            finish_timeout=30,
            finish_timeout_raises=False,
            console="off",
            silent=True,
            save_code=False,
        )
        try:
            run = wandb.init(
                project=project,
                entity=entity,
                id=run_id,
                name=name,
                resume="allow",
                mode=chosen,  # type: ignore[arg-type]
                dir=folder,
                group=group,
                tags=list(tags),
                notes=notes,
                config=config,
                settings=settings,
            )
            return _Wandb(experiment=run)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if mode == "online" or chosen == "offline":
                log.warning("W&B could not be started (%s); the run goes on without it", first)
            else:
                log.info(
                    "W&B: %s, so this run is logged offline. Upload it with: wandb sync %s",
                    first,
                    folder / "wandb/offline-run-*",
                )
    return None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tensorboard_logger(folder: Path, run_id: str, name: str, config: dict[str, Any]) -> Logger | None:
    """Event files in the run folder.

    Raises:
        ConfigError: TensorBoard is not installed; the message says how.
    """
    try:
        return TensorBoardLogger(save_dir=folder, name="tensorboard", version="")
    except ModuleNotFoundError:
        raise ConfigError("logger=tensorboard needs a package that is not installed: pip install tensorboard") from None
