"""When to end a tree of drafted tokens early.

A policy decides before each level except the first, and sees only the tokens that were drawn above
that level. So the text keeps the target's distribution: whether a level exists is decided before
its tokens are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from trainer.drafters import DrafterError


class Policy(Protocol):
    """Decides whether a tree gets one more level."""

    def __call__(
        self,
        top: Callable[[], float],
        alive: Callable[[], float],
        entropy: Callable[[], float],
    ) -> bool:
        """`top` returns the largest probability of any token of that level, given its parent.
        `alive` returns, over all drawn paths, the largest probability that every token of the path
        is accepted: by the drafter's `confidence` or, without it, by its own probabilities of the
        tokens. `entropy` returns the least entropy, in nats, of that level's distributions."""


def confidence_policy(threshold: float) -> Policy:
    """Continue while the next level's best token has at least this probability (Kangaroo, arXiv
    2404.18911, section 3.2: 0.6)."""
    return lambda top, alive, entropy: top() >= threshold


def refusal_policy(threshold: float) -> Policy:
    """Continue while the probability of a refusal, 1 - Π of the predicted acceptances, is at most
    `threshold` (SpecDec++, arXiv 2405.19715, section 3: 0.3 to 0.9). For a drafter that predicts no
    acceptance, the draft's own probability of its token is used."""
    return lambda top, alive, entropy: 1 - alive() <= threshold


def entropy_policy(threshold: float) -> Policy:
    """Continue while some distribution of the next level has at most this entropy, in nats (AdaEDL,
    arXiv 2410.18351, bounds the acceptance by the draft's entropy)."""
    return lambda top, alive, entropy: entropy() <= threshold


_POLICIES = {
    "confidence": confidence_policy,
    "refusal": refusal_policy,
    "entropy": entropy_policy,
}


def named_policy(text: str) -> Policy | None:
    """Read fixed, confidence:THRESHOLD, refusal:THRESHOLD or entropy:NATS."""
    if text == "fixed":
        return None
    kind, _, threshold = text.partition(":")
    if kind not in _POLICIES:
        raise DrafterError(
            f"policy={text}: one of fixed, {', '.join(f'{name}:THRESHOLD' for name in _POLICIES)}"
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
