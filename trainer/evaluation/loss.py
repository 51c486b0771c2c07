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
    """Loss per trained token, perplexity and accuracy, unless it is a drafter's alone; macro F1 for
    classes; trainer.drafters.metrics with a drafter. Each rank takes every ranks-th batch.

    `stop` is asked as often on each rank, between batches; when it says yes, the sums so far are
    given up and {} comes back.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    # long rows first: memory runs out at once or not at all
    order = np.argsort(-held_out.sequences.sizes()[0], kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    picks = [[Pick(int(sequence), True, 1) for sequence in batch] for batch in batches[rank::ranks]]
    # A rank with a batch less computes one that counts for nothing: what ranks do together, they do
    # equally often.
    picks += [[Pick(int(order[-1]), False, 1)]] * (-(-len(batches) // ranks) - len(picks))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    guesses = True  # whether the loss is that of next tokens
    offsets: torch.Tensor | None = None
    confusion = torch.zeros(len(held_out.labels or ()), len(held_out.labels or ()), device=device)
    with Progress("evaluation", len(picks), "batches") as progress:
        loader = DataLoader(held_out.sequences, batch_sampler=picks, collate_fn=held_out.collate)  # type: ignore[arg-type]
        for batch in progress.each(loader):
            if stop():
                return {}
            _, found = loss(to_device(batch, device))
            guesses = "right" in found
            sums += torch.stack(
                [
                    found[key].double()
                    for key in ("loss", "tokens", "right" if guesses else "tokens")
                ]
            )
            if "offsets" in found:
                offsets = (
                    found["offsets"].double() if offsets is None else offsets + found["offsets"]
                )
            if "scores" in found:
                confusion += multiclass_confusion_matrix(
                    found["scores"],
                    batch["classes"].to(device),
                    found["scores"].shape[-1],
                    ignore_index=-100,
                )
    total, tokens, right = reduce(sums).tolist()
    if not tokens:
        return {}
    result = {"loss": total / tokens} | ({"accuracy": right / tokens} if guesses else {})
    if held_out.labels is None:
        if guesses:
            result["perplexity"] = math.exp(min(total / tokens, 700))
        if offsets is not None:
            result |= drafters.metrics(reduce(offsets))
    else:
        confusion = reduce(confusion)
        marked = confusion.sum(0) + confusion.sum(1)  # as a class by its row or by the guess
        result["f1"] = float((2 * confusion.diagonal() / marked)[marked > 0].mean())
    return result


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and as it was afterwards."""
    was = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in was:
            child.training = mode
