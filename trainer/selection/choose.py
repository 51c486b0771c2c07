"""Rows chosen by their closeness to targets, by their leverage, or by their loss.

    round robin  for k = 1, 2, ...: the k-th closest row of every target, until n are there. A row
                 that another target has taken is not replaced
    transport    the same, but the last round is cut by the dual potential of the entropic optimal
                 transport between the candidates and the targets: those that carry mass to targets
                 cheaply come first
    leverage     n draws without replacement, with probabilities by leverage
    middle       the rows whose loss is nearest to the median

Closeness is the cosine of whitened features. All rows are read block by block; memory holds the
closest K rows of each of m targets.

Sources: TAROT (Feng et al. 2025, arXiv 2412.00420), LESS (Xia et al. 2024, arXiv 2402.04333),
arXiv 2602.14696 (round robin is best on average at small budgets), Marion et al. 2023 (arXiv
2309.04564, the middle of perplexity).

Differs from the papers: LESS scales the pool's gradients by Adam's moments and takes a row's best
target; TAROT averages features over checkpoints. Here whitening takes the place of the former, and
there is one checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]  # (first row, features (b, d))
BLUR, SCALING = 0.01, 0.5  # TAROT's: the last regularisation, and its factor from round to round
SWEEPS = 20  # Sinkhorn iterations for each regularisation


@dataclass(frozen=True)
class Choice:
    """Rows in the order of choice, with what chose them."""

    rows: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float64
    targets: np.ndarray | None = None  # (n,) int64: the target that a row was taken for


def closest(blocks: Blocks, targets: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k closest rows of each target, the closest first: (m, k) rows and cosines. Of
    equal cosines the earlier row comes first; places that no row fills have -1."""
    m = len(targets)
    rows = np.full((m, 0), -1, np.int64)
    scores = np.empty((m, 0))
    for first, block in blocks():
        new = np.broadcast_to(np.arange(first, first + len(block)), (m, len(block)))
        rows = np.concatenate([rows, new], axis=1)
        scores = np.concatenate([scores, targets @ block.T], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(rows, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
    return rows, scores


def rounds(
    blocks: Blocks, targets: np.ndarray, n: int, total: int
) -> tuple[list[list[tuple[int, float, int]]], int]:
    """Return the rounds of round robin, (row, cosine, target) of each new row, until n rows are
    there; and how many of the last round's rows are too many. `total` is the number of rows."""
    k = min(total, 2 * -(-n // len(targets)) + 4)
    while True:
        rows, scores = closest(blocks, targets, k)
        seen: set[int] = set()
        result: list[list[tuple[int, float, int]]] = []
        for place in range(rows.shape[1]):
            new = []
            for target in range(len(targets)):
                row = int(rows[target, place])
                if row not in seen:
                    seen.add(row)
                    new.append((row, float(scores[target, place]), target))
            result.append(new)
            if len(seen) >= n:
                return result, len(seen) - n
        k = min(total, 2 * k)  # targets share their closest rows: look at more of them


def round_robin(blocks: Blocks, targets: np.ndarray, n: int, total: int) -> Choice:
    """Choose n rows by round robin; of the last round the first targets' rows."""
    every, _ = rounds(blocks, targets, n, total)
    return _choice([entry for part in every for entry in part][:n])


def transport(blocks: Blocks, targets: np.ndarray, n: int, total: int) -> Choice:
    """Choose n rows by round robin; of the last round those of the largest dual potential."""
    every, over = rounds(blocks, targets, n, total)
    before = [entry for part in every[:-1] for entry in part]
    last = every[-1]
    if over:
        candidates = np.array([row for row, _, _ in [*before, *last]])
        features = _gathered(blocks, candidates, targets.shape[1])
        cost = np.sqrt(np.abs(2 - 2 * features @ targets.T))
        potential = sinkhorn(cost)[0][len(before) :]
        order = np.argsort(-potential, kind="stable")
        last = [last[place] for place in sorted(order[: n - len(before)])]
    return _choice([*before, *last])


def _gathered(blocks: Blocks, rows: np.ndarray, d: int) -> np.ndarray:
    result = np.empty((len(rows), d))
    for first, block in blocks():
        here = np.flatnonzero((rows >= first) & (rows < first + len(block)))
        result[here] = block[rows[here] - first]
    return result


def _choice(entries: list[tuple[int, float, int]]) -> Choice:
    rows, scores, targets = zip(*entries, strict=True)
    return Choice(np.array(rows), np.array(scores), np.array(targets))


def sinkhorn(
    cost: np.ndarray, blur: float = BLUR, scaling: float = SCALING
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the dual potentials f (n,), g (m,) of the entropic transport between uniform weights,
    and the transport's cost <P, cost>.

    ε falls from the largest cost to `blur` by the factor `scaling`; with it, in the log domain,
        f_i = -ε log Σ_j exp((g_j - c_ij) / ε) / m        g_j alike
        P_ij = exp((f_i + g_j - c_ij) / ε) / (n m)
    """
    n, m = cost.shape
    c = torch.from_numpy(cost)
    f, g = torch.zeros(n, dtype=c.dtype), torch.zeros(m, dtype=c.dtype)
    epsilon = max(float(c.max()), blur)
    while True:
        last = epsilon <= blur
        for _ in range(SWEEPS * (10 if last else 1)):
            f = -epsilon * (torch.logsumexp((g - c) / epsilon, 1) - math.log(m))
            g = -epsilon * (torch.logsumexp((f[:, None] - c) / epsilon, 0) - math.log(n))
        if last:
            break
        epsilon = max(blur, epsilon * scaling)
    plan = ((f[:, None] + g - c) / epsilon).exp() / (n * m)
    return f.numpy(), g.numpy(), float((plan * c).sum())


def by_leverage(leverage: np.ndarray, n: int, seed: int) -> Choice:
    """Draw n rows without replacement, with probabilities by leverage (Gumbel's largest n)."""
    noise = np.random.default_rng(seed).gumbel(size=len(leverage))
    with np.errstate(divide="ignore"):
        keys = np.log(leverage) + noise
    rows = np.argsort(-keys, kind="stable")[:n]
    return Choice(rows, leverage[rows])


def by_loss(loss: np.ndarray, n: int) -> Choice:
    """Choose the n rows whose loss is nearest to the median."""
    rows = np.argsort(np.abs(loss - np.median(loss)), kind="stable")[:n]
    return Choice(rows, loss[rows])


def at_random(total: int, n: int, seed: int) -> Choice:
    """Draw n rows."""
    return Choice(np.random.default_rng(seed).permutation(total)[:n], np.zeros(n))
