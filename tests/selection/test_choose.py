"""Choices against naive loops, and sketches, whitening and transport against dense references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trainer.selection import choose
from trainer.selection.gradients import Sketch
from trainer.selection.selected import dimensions
from trainer.selection.store import Store
from trainer.selection.whiten import Whitening


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_blocks(features: np.ndarray, size: int) -> choose.Blocks:
    return lambda: ((at, features[at : at + size]) for at in range(0, len(features), size))


def store_of(folder, features: np.ndarray, identity=None) -> Store:
    store = Store(folder, *features.shape, identity or {"of": "a test"})
    store.fill("numbers", lambda row: features[row].astype(np.float32))
    return store


def naive_round_robin(features, targets, n):
    cosines = features @ targets.T
    rows = range(len(features))
    ranks = [sorted(rows, key=lambda r, t=t: (-cosines[r, t], r)) for t in range(len(targets))]
    chosen: list[int] = []
    for place in range(len(features)):
        for rank in ranks:
            if rank[place] not in chosen:
                chosen.append(rank[place])
                if len(chosen) == n:
                    return chosen
    return chosen


@pytest.mark.parametrize(("n", "m"), [(1, 3), (7, 3), (20, 1), (40, 40), (50, 5)])
@pytest.mark.parametrize("size", [7, 100])
def test_round_robin_against_a_loop(n, m, size):
    draw = np.random.default_rng(n * m)
    features, targets = unit(draw.normal(size=(50, 6))), unit(draw.normal(size=(m, 6)))
    result = choose.round_robin(in_blocks(features, size), targets, n, 50)
    assert result.rows.tolist() == naive_round_robin(features, targets, n)
    assert result.targets is not None
    cosines = (features[result.rows] * targets[result.targets]).sum(1)
    np.testing.assert_allclose(result.scores, cosines)


def test_targets_that_agree_share_a_list():
    """Equal targets want the same rows, so the list of each must be n long."""
    draw = np.random.default_rng(0)
    features, one = unit(draw.normal(size=(60, 5))), unit(draw.normal(size=(1, 5)))
    result = choose.round_robin(in_blocks(features, 16), np.repeat(one, 9, 0), 30, 60)
    expected = np.argsort(-(features @ one[0]), kind="stable")[:30]
    assert result.rows.tolist() == expected.tolist()


def test_transport_changes_the_last_round_alone():
    draw = np.random.default_rng(3)
    features, targets = unit(draw.normal(size=(80, 4))), unit(draw.normal(size=(9, 4)))
    every, over = choose.rounds(in_blocks(features, 30), targets, 21, 80)
    assert over
    first = [row for part in every[:-1] for row, _, _ in part]
    result = choose.transport(in_blocks(features, 30), targets, 21, 80)
    assert result.rows[: len(first)].tolist() == first
    last = {row for row, _, _ in every[-1]}
    assert set(result.rows[len(first) :].tolist()) < last
    cost = np.sqrt(np.abs(2 - 2 * features[[*first, *(r for r, _, _ in every[-1])]] @ targets.T))
    potentials = dict(
        zip([r for r, _, _ in every[-1]], choose.sinkhorn(cost)[0][len(first) :], strict=True)
    )
    worst_in = min(potentials[row] for row in result.rows[len(first) :].tolist())
    assert worst_in >= max(potentials[row] for row in last - set(result.rows.tolist()))


def test_sinkhorn_against_all_permutations():
    cost = np.random.default_rng(1).random((4, 4))
    best = min(
        sum(cost[i, j] for i, j in enumerate(permutation)) / 4
        for permutation in itertools.permutations(range(4))
    )
    f, g, value = choose.sinkhorn(cost, blur=0.005)
    assert value == pytest.approx(best, abs=2e-3)
    # the dual's value, and the plan's marginals
    assert f.mean() + g.mean() == pytest.approx(best, abs=2e-2)
    plan = np.exp((f[:, None] + g - cost) / 0.005) / 16
    np.testing.assert_allclose(plan.sum(0), 0.25, atol=1e-6)
    np.testing.assert_allclose(plan.sum(1), 0.25, atol=2e-2)


def test_whitened_features_have_the_identity_as_covariance(tmp_path):
    draw = np.random.default_rng(0)
    mixing = draw.normal(size=(5, 5))
    pool, targets = draw.normal(size=(400, 5)) @ mixing + 3, draw.normal(size=(30, 5)) @ mixing
    stores = store_of(tmp_path / "a", pool), store_of(tmp_path / "b", targets)
    whitening = Whitening(*stores)
    rows = np.concatenate([block for store in stores for _, block in whitening.blocks(store)])
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.T @ rows / 430, np.eye(5), atol=1e-3)
    lengths = np.linalg.norm(
        np.concatenate([block for _, block in whitening.directions(stores[0])]), axis=1
    )
    np.testing.assert_allclose(lengths, 1)


def test_few_rows_are_whitened_carefully(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 8))
    whitening = Whitening(store_of(tmp_path, features))
    covariance = np.cov(features.astype(np.float32).astype(float).T, bias=True)
    assert whitening.ridge == pytest.approx(0.1 * np.trace(covariance) / 8, rel=1e-6)


def test_leverage_is_the_diagonal_of_the_hat_matrix(tmp_path):
    features = np.random.default_rng(0).normal(size=(300, 4)) * [1, 5, 0.2, 3]
    store = store_of(tmp_path, features)
    leverage = Whitening(store).leverage(store)
    x = features - features.mean(0)
    hat = x @ np.linalg.inv(x.T @ x) @ x.T
    np.testing.assert_allclose(leverage, np.diag(hat), rtol=2e-2)
    assert leverage.sum() == pytest.approx(4, rel=1e-2)


def test_features_that_do_not_differ_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not differ"):
        Whitening(store_of(tmp_path, np.ones((40, 3))))


def test_a_sketch_keeps_products_on_average():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, generator=draw)
    b = a + b
    products = [
        float(np.dot(*(sketch(v).astype(float) for v in (a, b))))
        for sketch in (Sketch(500, 64, seed, torch.device("cpu")) for seed in range(300))
    ]
    spread = float(a.norm() * b.norm()) / 64**0.5
    assert np.mean(products) == pytest.approx(float(a @ b), abs=4 * spread / 300**0.5)
    assert np.std(products) < 2 * spread
    sketch = Sketch(500, 64, 7, torch.device("cpu"))
    dense = torch.zeros(500, 64, dtype=torch.float64)
    dense[torch.arange(500), sketch.places] = sketch.signs.double()
    np.testing.assert_allclose(sketch(a), a.double() @ dense, rtol=1e-6, atol=1e-6)


def test_leverage_draws_favour_large_ones():
    leverage = np.repeat([1e-3, 1.0], [90, 10])
    hits = np.zeros(100)
    for seed in range(200):
        hits[choose.by_leverage(leverage, 5, seed).rows] += 1
    assert hits[90:].sum() / hits.sum() > 0.9
    assert np.array_equal(
        choose.by_leverage(leverage, 5, 1).rows, choose.by_leverage(leverage, 5, 1).rows
    )


def test_the_middle_of_the_losses():
    loss = np.array([9.0, 1.0, 5.0, 4.0, 6.0, 0.0])
    assert choose.by_loss(loss, 3).rows.tolist() == [2, 3, 4]  # of median 4.5


def test_random_is_a_seeded_permutation():
    rows = choose.at_random(100, 10, 3).rows
    assert rows.tolist() == np.random.default_rng(3).permutation(100)[:10].tolist()
    assert len(set(choose.at_random(100, 100, 0).rows.tolist())) == 100


def test_a_store_continues_where_it_stopped(tmp_path):
    features = np.arange(300 * 2, dtype=np.float32).reshape(300, 2)
    calls: list[int] = []

    def number(row: int) -> np.ndarray:
        calls.append(row)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return features[row]

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, 300, 2, {"seed": 1}).fill("numbers", number)
    again = Store(tmp_path, 300, 2, {"seed": 1})
    assert again.done == 128  # two times 64
    again.fill("numbers", number)
    assert calls[150:] == list(range(128, 300))
    assert np.array_equal(np.concatenate([block for _, block in again.blocks()]), features)
    assert Store(tmp_path, 300, 2, {"seed": 2}).done == 0  # of other settings
    (tmp_path / "state.json").write_text("{")
    assert Store(tmp_path, 300, 2, {"seed": 2}).done == 0


def test_the_default_size_of_a_sketch_grows_with_the_pool():
    sizes = [dimensions(rows) for rows in (10, 1000, 2048, 5000, 100_000)]
    assert sizes == [64, 64, 256, 512, 1024]
