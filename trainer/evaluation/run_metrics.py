"""The metrics of a run's model over its held-out rows, with and without the adapter."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from trainer import drafters
from trainer.assembly.rows import add_prompts, load_held_out
from trainer.assembly.trained import load_trained
from trainer.evaluation.answers import answers, means
from trainer.evaluation.loss import losses, prefixed
from trainer.models.losses import CausalLoss, ClassLoss


def run_metrics(
    run: str, compare: bool, generate: int, batch_size: int, max_new_tokens: int
) -> dict[str, dict[str, float]]:
    """Return the metrics of the adapted model; with `compare` those of the base first. `generate`
    is the number of prompts whose answers are graded.

    Raises:
        DataError: the run holds out no rows. Others: see load_trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(run, device)
    data = load_held_out(trained.config, trained.base, trained.task)
    if generate:
        add_prompts(data, generate, trained.stops)
    held_out: Any = data.held_out
    loss: Any
    if trained.task.kind == "label":
        loss = ClassLoss(trained.model)
    else:
        target = drafters.Target(trained.model) if trained.drafter is not None else None
        chunk = trained.config["objective"]["logits_chunk"]
        loss = CausalLoss(trained.model, chunk, trained.drafter, target)
    results: dict[str, dict[str, float]] = {}
    for name in ["base", "adapted"] if compare else ["adapted"]:
        base = trained.adapter.disabled(trained.model) if name == "base" else None
        with base or contextlib.nullcontext():
            results[name] = {}
            for of_set, part in [(None, held_out), *held_out.more.items()]:
                values = losses(loss, part, batch_size, device)
                if part.prompts:
                    graded = answers(trained.model, part, batch_size, max_new_tokens, device)
                    values |= means(graded or [])
                results[name] |= values if of_set is None else prefixed(of_set, values)
    return results
