"""Policies that end a tree of drafted tokens early.

A policy decides before each level except the first, and sees only the tokens that were drawn above
that level. So the text keeps the target's distribution: whether a level exists is decided before
its tokens are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.decoding.profit import Profit, read
from trainer.drafters import DrafterError


@dataclass(frozen=True)
class Level:
    """A level of a tree that may follow: what is known before its tokens are drawn."""

    number: int  # from 2
    q: Float[Tensor, "m v"]  # the distributions of its tokens, one for each node of the level above
    # Of these nodes: predicted acceptance, by the drafter's `confidence` or, without it, its own
    # probabilities of their tokens; and the product of that over each one's path.
    confidence: Float[Tensor, " m"]
    alive: Float[Tensor, " m"]


class Policy(Protocol):
    """Decides whether a tree gets one more level."""

    def __call__(self, level: Level) -> bool: ...


def confidence_policy(threshold: float) -> Policy:
    """Continue while the next level's best token has at least this probability (Kangaroo, arXiv
    2404.18911, section 3.2: 0.6)."""
    return lambda level: float(level.q.max()) >= threshold


def refusal_policy(threshold: float) -> Policy:
    """Continue while the probability of a refusal, 1 - Π of the predicted acceptances, is at most
    `threshold` (SpecDec++, arXiv 2405.19715, section 3: 0.3 to 0.9). For a drafter that predicts no
    acceptance, the draft's own probability of its token is used."""
    return lambda level: 1 - float(level.alive.max()) <= threshold


def entropy_policy(threshold: float) -> Policy:
    """Continue while some distribution of the next level has at most this entropy, in nats (AdaEDL,
    arXiv 2410.18351, bounds the acceptance by the draft's entropy)."""
    return lambda level: float(torch.special.entr(level.q).sum(-1).min()) <= threshold


class ProfitablePolicy:
    """Continue a chain while the expected tokens per second of the step rise (DSpark, arXiv
    2607.05147, section 3.2, for one sequence).

    After k tokens a step gives 1 + Σ_{j<=k} a_j tokens in verify[k] + draft[k] seconds. a_j is the
    product of the predicted acceptances up to j, each with its temperature. The acceptance of the
    next token is not known before it is drawn: its measured mean is taken.
    """

    def __init__(self, profit: Profit):
        self.profit, self.alive, self.sum = profit, 1.0, 1.0

    def __call__(self, level: Level) -> bool:
        profit, drafted = self.profit, level.number - 1
        if drafted == 1:
            self.alive, self.sum = 1.0, 1.0
        if drafted >= len(profit.seconds) - 1:
            return False
        self.alive *= profit.scaled(drafted, float(level.confidence[0]))
        self.sum += self.alive
        more = self.sum + self.alive * profit.acceptance[drafted]
        now = self.sum / profit.seconds[drafted]
        return more / profit.seconds[drafted + 1] > now


_POLICIES = {
    "confidence": confidence_policy,
    "refusal": refusal_policy,
    "entropy": entropy_policy,
}


def named_policy(text: str) -> Policy | None:
    """Read fixed, confidence:THRESHOLD, refusal:THRESHOLD, entropy:NATS or profitable:FILE.

    Raises:
        DrafterError: it is none of these, or the file cannot be read.
    """
    if text == "fixed":
        return None
    kind, _, threshold = text.partition(":")
    if kind == "profitable":
        return ProfitablePolicy(read(threshold))
    if kind not in _POLICIES:
        raise DrafterError(
            f"policy={text}: one of fixed, {', '.join(f'{name}:THRESHOLD' for name in _POLICIES)},"
            " profitable:FILE.json"
        )
    try:
        value = float(threshold)
    except ValueError:
        raise DrafterError(
            f"policy={text}: add a threshold from 0 to 1, as in {kind}:0.6"
        ) from None
    if kind == "entropy" and 0 <= value < math.inf:
        return entropy_policy(value)
    if kind == "entropy":
        raise DrafterError(f"policy={text}: an entropy in nats, 0 or more")
    if not 0 <= value <= 1:
        raise DrafterError(f"policy={text}: its threshold is a probability, from 0 to 1")
    return _POLICIES[kind](value)
