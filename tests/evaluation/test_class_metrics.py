"""The metrics of regression and of multi-label classification."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torchmetrics.functional import (
    mean_squared_error,
    pearson_corrcoef,
    spearman_corrcoef,
)
from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

from trainer.evaluation import class_metrics


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def naive_pearson(x: list[float], y: list[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    shared = sum((p - a) * (q - b) for p, q in zip(x, y, strict=True))
    return shared / math.sqrt(sum((p - a) ** 2 for p in x) * sum((q - b) ** 2 for q in y))


def naive_ranks(x: list[float]) -> list[float]:
    return [sum(v < w for v in x) + (sum(v == w for v in x) + 1) / 2 for w in x]


@pytest.mark.parametrize("count", [7, 50])
def test_regression_is_naive_loops_and_torchmetrics(count):
    scores, values = drawn(count), (drawn(count + 1)[:count] * 2).round() / 2  # with ties
    actual = class_metrics.regression(scores, values)
    x, y = scores.tolist(), values.tolist()
    assert actual["mse"] == pytest.approx(float(mean_squared_error(scores, values)), rel=1e-5)
    assert actual["pearson"] == pytest.approx(naive_pearson(x, y), rel=1e-5)
    assert actual["pearson"] == pytest.approx(float(pearson_corrcoef(scores, values)), abs=1e-5)
    ranked = naive_pearson(naive_ranks(x), naive_ranks(y))
    assert actual["spearman"] == pytest.approx(ranked, rel=1e-6)
    assert actual["spearman"] == pytest.approx(float(spearman_corrcoef(scores, values)), abs=1e-4)


def test_a_constant_output_has_no_correlation():
    actual = class_metrics.regression(torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (actual["mse"], actual["pearson"], actual["spearman"]) == (3.5, 0.0, 0.0)


def test_several_labels_are_naive_loops_and_torchmetrics():
    scores, values = drawn(40, 5), (drawn(41, 5)[:40] > 0.3).float()
    scores[:, 3], values[:, 3] = -1.0, 0.0  # a class that no row has and no guess names
    actual = class_metrics.multi_label(scores, values)
    f1, hits, sizes = [], 0, 0
    for c in range(5):
        guess, true = scores[:, c] > 0, values[:, c] == 1
        right = sum(bool(g and t) for g, t in zip(guess, true, strict=True))
        size = int(guess.sum() + true.sum())
        f1.append(2 * right / size if size else 0.0)
        hits, sizes = hits + right, sizes + size
    assert actual["f1_macro"] == pytest.approx(sum(f1) / 5)
    assert actual["f1_micro"] == pytest.approx(2 * hits / sizes)
    rows = [
        all((s > 0) == (v == 1) for s, v in zip(row, want, strict=True))
        for row, want in zip(scores.tolist(), values.tolist(), strict=True)
    ]
    assert actual["exact_match"] == pytest.approx(sum(rows) / 40)
    chances, truth = scores.sigmoid(), values.int()
    for average in ("micro", "macro"):
        assert actual[f"f1_{average}"] == pytest.approx(
            float(multilabel_f1_score(chances, truth, 5, average=average)), abs=1e-6
        )
    assert actual["exact_match"] == pytest.approx(float(multilabel_exact_match(chances, truth, 5)))


def test_each_problem_has_the_metrics_that_its_names_say():
    for problem, columns in (("regression", 1), ("multi_label_classification", 3)):
        actual = class_metrics.of_values(drawn(6, columns), drawn(6, columns).sign().clamp(min=0))
        assert tuple(actual) == class_metrics.NAMES[problem]
    assert not set(itertools.chain(*class_metrics.NAMES.values())) & {"loss"}
