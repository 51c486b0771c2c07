"""Held-out loss and accuracy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer import drafters
from trainer.data.batches import Pick
from trainer.data.held_out import HeldOut, to_device
from trainer.evaluation import class_metrics
from trainer.storage.progress import Progress


@torch.no_grad()
def losses(
    loss: Callable[[dict[str, Any]], Any],
    held_out: HeldOut,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return loss per trained token, perplexity and accuracy (only the loss if it is a drafter's
    alone); macro F1 for classes; trainer.drafters.metrics with a drafter. Each rank takes every
    ranks-th batch.

    `stop` is called equally often on each rank, between batches. If it returns True, the result is
    {}.
    """
    picks = _picks(held_out, batch_size, rank, ranks)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    guesses = True  # whether the loss is on next tokens
    offsets: torch.Tensor | None = None
    classes = len(held_out.labels or ())
    confusion = torch.zeros(classes, classes, device=device)
    # of each row, the model's outputs and the numbers that they should be; each rank fills its own
    outputs: torch.Tensor | None = None
    with Progress("evaluation", len(picks), "batches") as progress:
        loader = DataLoader(
            held_out.sequences,  # type: ignore[arg-type]
            batch_sampler=picks,
            collate_fn=held_out.collate,
        )
        for batch in progress.each(loader):
            if stop():
                return {}
            _, counts = loss(to_device(batch, device))
            guesses = "right" in counts
            sums += torch.stack(
                [
                    counts[key].double()
                    for key in ("loss", "tokens", "right" if guesses else "tokens")
                ]
            )
            if "offsets" in counts:
                offsets = (
                    counts["offsets"].double() if offsets is None else offsets + counts["offsets"]
                )
            if "scores" in counts:
                targets = batch["classes"].to(device)
                if targets.is_floating_point():
                    if outputs is None:
                        shape = (len(held_out.sequences), 2, classes)
                        outputs = torch.zeros(shape, dtype=torch.float64, device=device)
                    _fill(outputs, batch["sequences"], counts["scores"], targets)
                else:
                    confusion += _confusion(counts["scores"], targets)
    scored = (guesses, offsets, outputs, confusion)
    return _numbers(reduce, sums, held_out.labels is not None, *scored)


def _numbers(
    reduce: Callable[[torch.Tensor], torch.Tensor],
    sums: torch.Tensor,
    labelled: bool,
    guesses: bool,
    offsets: torch.Tensor | None,
    outputs: torch.Tensor | None,
    confusion: torch.Tensor,
) -> dict[str, float]:
    """Return the numbers of an evaluation from the sums of a rank."""
    total, tokens, right = reduce(sums).tolist()
    if not tokens:
        return {}
    result = {"loss": total / tokens} | ({"accuracy": right / tokens} if guesses else {})
    if not labelled:
        if guesses:
            result["perplexity"] = math.exp(min(total / tokens, 700))
        if offsets is not None:
            result |= drafters.metrics(reduce(offsets))
    elif outputs is not None:
        result |= class_metrics.of_values(*reduce(outputs).unbind(1))
    else:
        result["f1"] = _macro_f1(reduce(confusion))
    return result


def _fill(
    outputs: torch.Tensor, rows: list[int], scores: torch.Tensor, targets: torch.Tensor
) -> None:
    """Put the outputs and targets of some rows into their places, but for fillers."""
    for row, score, target in zip(rows, scores, targets, strict=True):
        if not target.isnan().any():
            outputs[row] = torch.stack([score, target])


def _confusion(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(scores, classes, scores.shape[-1], ignore_index=-100)


def _macro_f1(confusion: torch.Tensor) -> float:
    """Return the mean F1 over classes that occur in a row or in a guess."""
    marked = confusion.sum(0) + confusion.sum(1)
    return float((2 * confusion.diagonal() / marked)[marked > 0].mean())


def _picks(held_out: HeldOut, batch_size: int, rank: int, ranks: int) -> list[list[Pick]]:
    """Return a rank's batches."""
    # Long rows first: an out-of-memory error comes at once or not at all.
    order = np.argsort(-held_out.sequences.sizes()[0], kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    picks = [[Pick(int(sequence), True, 1) for sequence in batch] for batch in batches[rank::ranks]]
    # A rank with one batch less computes one more that does not count: all ranks must run the same
    # number of collective operations.
    missing = -(-len(batches) // ranks) - len(picks)
    return picks + [[Pick(int(order[-1]), False, 1)]] * missing


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode, and restore its modes afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def prefixed(name: str, values: dict[str, float]) -> dict[str, float]:
    """Return the numbers of a further set of evaluation under its name, as hard/loss."""
    return {f"{name}/{key}": value for key, value in values.items()}
