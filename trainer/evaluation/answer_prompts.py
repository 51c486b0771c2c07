"""Answers of a target to a set of prompts, written as they come."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from trainer.assembly.build import instantiate
from trainer.config.answer_options import AnswerOptions
from trainer.config.options import values_of
from trainer.data import prompts
from trainer.data.prompts import PromptRow
from trainer.decoding.merged import merged
from trainer.evaluation import responses
from trainer.evaluation.responses import Responder
from trainer.storage.answers import AnswersFolder
from trainer.storage.progress import Progress
from trainer.storage.run_folder import write_template

# options that say where something is; what is there is recorded by its digest
_PLACES = ("out", "run", "base", "prompts", "task")


@dataclass(frozen=True)
class Work:
    """A target, the conversations that it answers, and the open folder for the answers."""

    options: AnswerOptions
    responder: Responder
    rows: list[PromptRow]
    folder: AnswersFolder


@contextlib.contextmanager
def opened(options: AnswerOptions, config: dict[str, Any]) -> Iterator[Work]:
    """Read the conversations, load the target, and open the folder, which is locked meanwhile.

    Raises:
        as prompts.load, responses.make_responder and AnswersFolder.
    """
    task = instantiate(config["task"])
    rows, digest = prompts.load(options, config, task)
    responder = responses.make_responder(options, config, task)
    with AnswersFolder(options.out, *described(options, responder, digest)) as folder:
        yield Work(options, responder, rows, folder)


def described(
    options: AnswerOptions, responder: Responder, digest: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (what the rows depend on, what else is recorded)."""
    settings = {
        **{name: value for name, value in values_of(options).items() if name not in _PLACES},
        "prompts": digest,
        "target": responder.described,
        "stops": responder.stops,
        **({"stop_texts": responder.stops.texts} if responder.stops.texts else {}),
        "template": hashlib.sha256(json.dumps(responder.renderer.template).encode()).hexdigest(),
        "template_options": options.template_variables,
    }
    described = {
        "base": responder.base.path,
        "run": options.run,
        "prompts": options.prompts or f"task={options.task}",
        "device": responder.device.type,
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")
        },
    }
    return settings, described


def write(work: Work) -> None:
    """Answer the conversations that the folder lacks, batch by batch."""
    folder = work.folder
    write_template(folder.path, work.responder.renderer.template)
    progress = Progress("respond", len(work.rows), "conversations", done=len(folder.done))
    with merged(work.responder.model), progress:
        for batch in prompts.batches(work.rows, work.options.batch_size, folder.done):
            folder.add(responses.respond(work.responder, batch, work.options))
            progress.advance(len(batch))
