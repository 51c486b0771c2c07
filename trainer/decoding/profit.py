"""Costs and gains of a longer chain on a machine, and the temperatures of predicted acceptances.

`graft speculate tree=search json=FILE` measures both; policy=profitable:FILE reads them.

Sequential temperature scaling (DSpark, arXiv 2607.05147, section 3.2): for k = 1 .. K in turn the
temperature θ_k is the one of a grid with which

    Π_{j<=k} σ(g_j / θ_j)        g_j the logit of the j-th token's predicted acceptance

is nearest to how often all of 1 .. k were accepted, by the expected calibration error over 15 bins
of equally many drafts. Earlier temperatures stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.drafters import DrafterError

GRID = np.geomspace(0.25, 4.0, 40)
BINS = 15
KEYS = ("seconds", "acceptance", "temperatures")

# For each token of a draft: the logit of its predicted acceptance, and whether it and all before it
# were accepted.
Observed = Sequence[tuple[float, bool]]


@dataclass(frozen=True)
class Profit:
    """A machine's seconds of a step, and a drafter's acceptance there."""

    seconds: list[float]  # of drafting and verifying k tokens, k = 0 .. K
    acceptance: list[float]  # of the token after k accepted ones, k = 0 .. K - 1
    temperatures: list[float]  # of the k-th token's predicted acceptance, k = 1 ..; 1 after the end

    def scaled(self, k: int, confidence: float) -> float:
        """Return the predicted acceptance of the k-th token, with its temperature."""
        theta = self.temperatures[k - 1] if k <= len(self.temperatures) else 1.0
        return _sigmoid(logit(confidence) / theta)


def logit(probability: float) -> float:
    """Return log(p / (1 - p)), within ±30."""
    p = min(max(probability, 1e-13), 1 - 1e-13)
    return math.log(p / (1 - p))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def temperatures(drafts: Sequence[Observed]) -> list[float]:
    """Return θ_1 .. θ_K for drafts that were observed, K the length of the longest one."""
    result: list[float] = []
    products = np.ones(len(drafts))
    for k in range(max(map(len, drafts), default=0)):
        reached = np.array([len(draft) > k for draft in drafts])
        logits = np.array([draft[k][0] if len(draft) > k else 0.0 for draft in drafts])
        taken = np.array([len(draft) > k and draft[k][1] for draft in drafts])
        tried = [products / (1 + np.exp(-logits / theta)) for theta in GRID]
        errors = [calibration_error(one[reached], taken[reached]) for one in tried]
        best = int(np.argmin(errors))
        result.append(float(GRID[best]))
        products = tried[best]
    return result


def calibration_error(predicted: np.ndarray, taken: np.ndarray) -> float:
    """Return the mean over equally large bins of |mean prediction - share taken|."""
    order = np.argsort(predicted, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [abs(predicted[part].mean() - taken[part].mean()) * len(part) for part in bins]
    return float(sum(gaps) / max(1, len(order)))


def read(file: str) -> Profit:
    """Read what a search has measured.

    Raises:
        DrafterError: there is no such file, or it is not of a search.
    """
    reason = "expected the file of graft speculate tree=search json=FILE"
    try:
        content: Any = json.loads(Path(file).expanduser().read_text("utf-8"))["profit"]
        lists = {key: [float(value) for value in content[key]] for key in KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DrafterError(f"policy=profitable:{file}: {reason} ({error})") from None
    bad = [x for values in lists.values() for x in values if not 0 <= x < math.inf]
    times = lists["seconds"]
    if bad or len(times) != len(lists["acceptance"]) + 1 or not all([*times, *lists[KEYS[2]]]):
        raise DrafterError(f"policy=profitable:{file}: {reason}; its numbers contradict each other")
    return Profit(**lists)
