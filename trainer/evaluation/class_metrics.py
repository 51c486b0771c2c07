"""The metrics of classifiers, over all rows of a split."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# by transformers' names of problems
NAMES = {
    "single_label_classification": ("accuracy", "f1"),
    "regression": ("mse", "pearson", "spearman"),
    "multi_label_classification": ("f1_micro", "f1_macro", "exact_match"),
}


def of_values(scores: Float[Tensor, "N C"], values: Float[Tensor, "N C"]) -> dict[str, float]:
    """Return the metrics of a model's outputs: those of regression where it has one, else those of
    multi-label classification, where an output above 0 is a guess of its class."""
    if scores.shape[-1] == 1:
        return regression(scores[:, 0], values[:, 0])
    return multi_label(scores, values)


def regression(scores: Float[Tensor, " N"], values: Float[Tensor, " N"]) -> dict[str, float]:
    """Return the mean squared error, and Pearson's and Spearman's correlations. Between numbers
    that are all the same a correlation is not defined, and counts as 0."""
    return {
        "mse": float((scores - values).square().mean()),
        "pearson": _correlation(scores, values),
        "spearman": _correlation(_ranks(scores), _ranks(values)),
    }


def _correlation(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0


def _ranks(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the rank of each number; equal ones share the mean of their ranks."""
    _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


def multi_label(scores: Float[Tensor, "N C"], values: Float[Tensor, "N C"]) -> dict[str, float]:
    """Return F1 over all pairs of row and class, the mean F1 of the classes, and the share of rows
    whose classes are all right. A class that no row has and no guess names has an F1 of 0."""
    guesses, truth = scores > 0, values > 0.5
    right, marked = (guesses & truth).sum(0).double(), (guesses.sum(0) + truth.sum(0)).double()
    return {
        "f1_micro": float(2 * right.sum() / marked.sum().clamp(min=1)),
        "f1_macro": float((2 * right / marked.clamp(min=1)).mean()),
        "exact_match": float((guesses == truth).all(-1).double().mean()),
    }
