"""A draft vocabulary: the tokens that a head can draft, the most frequent ones of the trained rows.

A head that has one stores two buffers, as engines read them:

    d2t (v,) int64   id in the target's vocabulary = i + d2t[i] of the i-th drafted token, ascending
    t2d (V,) bool    whether a token of the target's vocabulary can be drafted

and lm_head (v, d), the rows of these tokens in the target's output layer, or trained from them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from trainer.drafters import DrafterError


def register(head: Any, size: int, vocabulary: int, device: torch.device) -> None:
    """Give a head the buffers of the first `size` of `vocabulary` tokens."""
    head.register_buffer("d2t", torch.zeros(size, dtype=torch.long, device=device))
    head.register_buffer("t2d", torch.arange(vocabulary, device=device) < size)


def token_ids(head: Any) -> Int[Tensor, " v"]:
    """Return the target's ids of the drafted tokens, ascending."""
    return torch.arange(len(head.d2t), device=head.d2t.device) + head.d2t


def choose_most_frequent(head: Any, frequency: Int[Tensor, " V"], coverage: float) -> None:
    """Write the most frequent tokens into a head's buffers.

    Raises:
        DrafterError: they are a smaller share of the trained tokens than `coverage`.
    """
    frequency = frequency.to(head.d2t.device)
    # Tokens of equal frequency are in the order of their ids.
    order = torch.sort(frequency, descending=True, stable=True).indices
    shares = frequency[order].cumsum(0).double() / frequency.sum().clamp_min(1)
    size = len(head.d2t)
    if shares[size - 1] < coverage:
        enough = int((shares < coverage).sum()) + 1
        raise DrafterError(
            f"drafter.draft_vocab_size={size}: these tokens are {float(shares[size - 1]):.1%}"
            f" of the trained ones, and drafter.coverage requires {coverage:.1%}: set"
            f" {enough} tokens, or a smaller coverage"
        )
    chosen = order[:size].sort().values
    head.d2t.copy_(chosen - torch.arange(size, device=chosen.device))
    head.t2d.zero_()[chosen] = True


def check_stored(state: dict[str, Tensor]) -> None:
    """Refuse stored buffers that name different tokens.

    Raises:
        DrafterError: they do.
    """
    if "d2t" not in state or "t2d" not in state:
        return
    ids = torch.arange(len(state["d2t"])) + state["d2t"].cpu()
    if not torch.equal(ids, state["t2d"].cpu().nonzero()[:, 0]):
        raise DrafterError(
            "d2t and t2d of these drafter weights name different tokens: target id = draft id +"
            " d2t[draft id]"
        )
