"""Answers of a target to a set of prompts, written as they come."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from typing import Any

from trainer.data import prompts
from trainer.data.prompts import PromptRow
from trainer.evaluation import responses
from trainer.evaluation.responses import Responder
from trainer.storage.answers import AnswersFolder
from trainer.storage.progress import Progress


def described(
    options: dict[str, Any], responder: Responder, key: str, jinja: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (what the rows depend on, what else is recorded)."""
    settings = {
        **{
            name: value
            for name, value in options.items()
            if name not in ("out", "run", "base", "prompts", "task")
        },
        "prompts": key,
        "target": responder.described,
        "stops": responder.stops,
        "template": hashlib.sha256(json.dumps(responder.renderer.template).encode()).hexdigest(),
        "template_options": jinja,
    }
    described = {
        "base": responder.base.path,
        "run": options["run"],
        "prompts": options["prompts"] or f"task={options['task']}",
        "device": responder.device.type,
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")
        },
    }
    return settings, described


def write(
    responder: Responder, rows: list[PromptRow], folder: AnswersFolder, options: dict[str, Any]
) -> None:
    """Answer the conversations that the folder lacks, batch by batch."""
    with Progress("respond", len(rows), "conversations", done=len(folder.done)) as progress:
        for batch in prompts.batches(rows, options["batch_size"], folder.done):
            folder.add(responses.respond(responder, batch, options))
            progress.advance(len(batch))
