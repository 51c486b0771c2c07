"""The accepted path and tokens of each sequence, from a verdict on all drafts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from trainer.decoding import verify
from trainer.decoding.verify import Verdict
from trainer.drafters import TargetUpdate


def joined(first: TargetUpdate, second: TargetUpdate) -> TargetUpdate:
    """Return two updates, one after the other, as one."""
    return TargetUpdate(
        torch.cat([first.hidden, second.hidden]),
        torch.cat([first.features, second.features]),
        torch.cat([first.ids, second.ids]),
        first.first,
        second.tried,
    )


def decisions_of(
    verdict: Verdict, trees: Sequence[list[int]], drafted: Int[Tensor, " n"]
) -> list[tuple[list[int], list[int]]]:
    """Return for each sequence the accepted path of nodes, and its tokens with the target's own
    after them."""
    # The only time that a step waits for the device.
    numbers = torch.cat([verdict.next_tokens, verdict.taken.to(drafted), drafted]).tolist()
    places, nodes = len(verdict.next_tokens), len(drafted)
    following, accepted = numbers[:places], numbers[places : places + nodes]
    tokens = numbers[places + nodes :]
    weights = None if verdict.weights is None else verdict.weights.tolist()
    decisions, start, place = [], 0, 0
    for parents in trees:
        end = start + len(parents)
        path = verify.walk(
            parents, accepted[start:end], None if weights is None else weights[start:end]
        )
        last = place + (path[-1] + 1 if path else 0)
        decisions.append((path, [*(tokens[start + node] for node in path), following[last]]))
        start, place = end, place + 1 + len(parents)
    return decisions
