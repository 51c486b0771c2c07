"""A study as an array of SLURM jobs: one task for each run that can start now."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import OmegaConf

from trainer.cluster.batch_file import script, submit
from trainer.cluster.submission import resources, slurm_settings
from trainer.config import compose
from trainer.config.errors import ConfigError
from trainer.studies.pieces import Piece, Results, missing
from trainer.studies.plan import Study


def queue(
    study: Study, results: Results, words: list[str], slurm: list[str], dry: bool
) -> str | None:
    """Queue what can run now. `words` are those of the command line that name the study, `slurm`
    its settings of conf/slurm.yaml. Return a message; None if nothing is missing.

    Raises:
        ConfigError: the jobs cannot run, or SLURM refuses them.
    """
    pieces = list(missing(study, results))
    if not pieces:
        return None
    settings = slurm_settings(slurm, None)
    needs = _needs(study, pieces, settings)
    logs = (study.folder / "slurm").absolute()
    # Each task runs `graft study ... piece=KEY`. resume= keeps the batch file from naming the run.
    per_task = [["study", *words, f"piece={piece.key}", "resume=auto"] for piece in pieces]
    name = re.sub(r"\W", "-", study.name)
    text = script(name, logs, settings, needs, [], per_task)
    if len(per_task) == 1:  # an array of one task, so that each piece has the same file
        text = script(name, logs, settings, needs, per_task[0], [[]])
    if dry:
        return text
    number, file = submit(text, name, logs)
    return (
        f"job {number}: {len(pieces)} runs. Script: {file}\nWhen they have ended, give the same"
        " command again: it queues what follows from their results, or writes the table"
    )


def _needs(study: Study, pieces: list[Piece], settings: dict[str, Any]) -> dict[str, Any]:
    needs: dict[str, Any] | None = None
    for piece in {piece.method: piece for piece in pieces}.values():
        words = [*piece.words(study), "name=x"]
        plain: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
        mine = resources(plain, settings)
        if mine["tasks"] * mine["nodes"] != 1:
            raise ConfigError(
                f"methods.{piece.method} takes {mine['tasks']} processes on {mine['nodes']} nodes:"
                " the jobs of a study have one process"
            )
        if needs is not None and mine != needs:
            raise ConfigError(f"methods.{piece.method} needs {mine}, and others {needs}")
        needs = mine
    assert needs is not None
    return needs


def of_key(study: Study, key: str) -> Piece:
    """Return the piece of a key, as a job names it.

    Raises:
        ConfigError: the study has no such piece.
    """
    match = re.fullmatch(r"(search-)?([^-]+)-([^-]+)-([\d.e+-]+)-(\d+)", key)
    if match is None or match[2] not in study.data or match[3] not in study.methods:
        raise ConfigError(f"piece={key}: the study {study.name} has no such run")
    return Piece(match[2], match[3], float(match[4]), int(match[5]), bool(match[1]))
