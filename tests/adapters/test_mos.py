"""A mixture of shards against loops that put each layer's factors together piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adapters.delta import AdaptedLinear, AdapterError, Start
from adapters.io import trained_modules
from adapters.linear import float_weight
from adapters.mos import MoSAdapter, kinds
from tests.toys import adapters as toys

LAYERS, RANK, POOL, PRIVATE, PIECES, ALPHA = 3, 5, 3, 1, 4, 3.5


def make(**changes: Any) -> MoSAdapter:
    settings = {
        "rank": RANK,
        "pool_rank": POOL,
        "private_rank": PRIVATE,
        "shards": PIECES,
        "shard_seed": 0,
        "alpha": ALPHA,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "lr_ratio": 1.0,
        "dtype": "float64",
        "fused": True,
        "train_modules": [],
    }
    return MoSAdapter(**settings | changes)


def attached(**changes: Any) -> Any:
    """A model whose pools are all random, so that nothing is hidden behind a zero."""
    torch.manual_seed(3)
    model = make(**changes).attach(toys.llama(num_hidden_layers=LAYERS), Start())
    for pool in model.graft_pools.values():
        nn.init.normal_(pool.B, std=0.3)
    return model


def layers(model: Any, kind: str) -> list[AdaptedLinear]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and name.endswith(kind)
    ]


def assembled(pool: Any, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer, entry by entry."""
    i, o = layer.base.in_features, layer.base.out_features
    A, B = (torch.zeros(shape, dtype=torch.float64) for shape in ((RANK, i), (o, RANK)))
    for j in range(RANK):
        for piece in range(PIECES):
            a = pool.A[int(layer.delta.a[j * PIECES + piece])]
            b = pool.B[int(layer.delta.b[j * PIECES + piece])]
            for n in range(i // PIECES):
                A[j, piece * (i // PIECES) + n] = a[n]
            for n in range(o // PIECES):
                B[piece * (o // PIECES) + n, j] = b[n]
    return A, B


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["q_proj", "down_proj"])
def test_a_layers_factors_are_put_together_from_its_shards(kind, fused):
    model = attached(fused=fused)
    for layer in layers(model, kind):
        A, B = assembled(model.graft_pools[kind], layer)
        dense = float_weight(layer.base) + ALPHA / RANK * B @ A
        x = torch.randn(2, 6, A.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ dense.T)
        torch.testing.assert_close(layer.delta.weight(float_weight(layer.base)), dense)


def test_a_shards_gradient_is_the_sum_over_the_layers_that_use_it():
    model = attached()
    toys.loss(model).backward()
    pool = model.graft_pools["q_proj"]
    expected_a, expected_b = torch.zeros_like(pool.A), torch.zeros_like(pool.B)
    plain = toys.llama(num_hidden_layers=LAYERS).requires_grad_(False)
    factors = []
    for kind, shared in model.graft_pools.items():
        for number, layer in enumerate(layers(model, kind)):
            name = next(n for n, m in model.named_modules() if m is layer)
            A, B = (f.detach().requires_grad_(True) for f in assembled(shared, layer))
            linear = plain.get_submodule(name)
            update = ALPHA / RANK * B @ A
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, Dense(linear.weight + update))
            if kind == "q_proj":
                factors.append((layer.delta, A, B, number))
    toys.loss(plain).backward()
    for delta, A, B, _ in factors:
        width_a, width_b = A.shape[1] // PIECES, B.shape[0] // PIECES
        for j in range(RANK):
            for piece in range(PIECES):
                a, b = (int(rows[j * PIECES + piece]) for rows in (delta.a, delta.b))
                expected_a[a] += A.grad[j, piece * width_a : (piece + 1) * width_a]
                expected_b[b] += B.grad[piece * width_b : (piece + 1) * width_b, j]
    torch.testing.assert_close(pool.A.grad, expected_a)
    torch.testing.assert_close(pool.B.grad, expected_b)


class Dense(nn.Module):
    """A product with a matrix that has a gradient."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T


def test_a_changed_shard_changes_only_the_layers_that_use_it():
    model = attached()
    pool, users = model.graft_pools["v_proj"], layers(model, "v_proj")
    row = int(users[1].delta.a[0])
    before = [layer.delta.factors()[0].detach().clone() for layer in users]
    with torch.no_grad():
        pool.A[row] += 1.0
    for layer, old in zip(users, before, strict=True):
        new = layer.delta.factors()[0]
        assert torch.equal(new, old) != (row in layer.delta.a.tolist())
    assert any(row not in layer.delta.a.tolist() for layer in users)


def test_shards_are_shared_and_private_as_the_settings_say():
    model = attached()
    shared = LAYERS * (POOL - PRIVATE) * PIECES
    for kind, pool in model.graft_pools.items():
        rows = LAYERS * POOL * PIECES
        assert pool.A.shape[0] == pool.B.shape[0] == rows
        private: list[int] = []
        for layer in layers(model, kind):
            for chosen in (layer.delta.a.tolist(), layer.delta.b.tolist()):
                assert len(set(chosen)) == len(chosen) == RANK * PIECES
                assert sum(row >= shared for row in chosen) == PRIVATE * PIECES
            assert layer.delta.a.tolist() != layer.delta.b.tolist()
            private += [row for row in layer.delta.a.tolist() if row >= shared]
        assert sorted(private) == list(range(shared, rows))
    assert trained_modules(model) == []


def test_it_trains_as_many_parameters_as_lora_of_the_pools_rank():
    model, lora = attached(), toys.lora(rank=POOL).attach(toys.llama(num_hidden_layers=3), Start())
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, lora)]
    assert counts[0] == counts[1]


@torch.no_grad()
def test_with_private_shards_alone_it_is_lora():
    model = attached(rank=2, pool_rank=2, private_rank=2)
    lora = toys.lora(rank=2, alpha=ALPHA, dtype="float64")
    other = lora.attach(toys.llama(num_hidden_layers=LAYERS), Start())
    for kind, pool in model.graft_pools.items():
        for number, layer in enumerate(layers(other, kind)):
            rows = slice(number * 2 * PIECES, (number + 1) * 2 * PIECES)
            layer.delta.A.copy_(pool.A[rows].view(2, -1))
            layer.delta.B.copy_(pool.B[rows].view(2, -1).T)
    torch.testing.assert_close(toys.logits(model), toys.logits(other))


def test_each_seed_draws_its_own_shards_and_always_the_same():
    def rows(seed: int) -> list[int]:
        return [n for layer in layers(attached(shard_seed=seed), "q_proj") for n in layer.delta.a]

    assert rows(0) == rows(0) != rows(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"rank=8: the 3 layers q_proj share 6 rows.* set adapter.rank=7 or less"),
        ({"private_rank": 4}, r"private_rank=4: expected at most adapter.pool_rank=3"),
        ({"shards": 6}, r"shards=6: rows of 64 and 64 entries, those of .*: set adapter.shards=4"),
    ],
)
def test_settings_that_leave_no_pool_are_refused(changes, message):
    with pytest.raises(AdapterError, match=message):
        attached(**changes)


def test_layers_of_one_name_and_two_shapes_are_two_kinds():
    small, large = nn.Linear(4, 8), nn.Linear(8, 8)
    named: Any = [("a.fc", small), ("b.fc", large), ("c.fc", small), ("c.out", small)]
    assert {key: [name for name, _ in layers] for key, layers in kinds(named).items()} == {
        "fc_8x4": ["a.fc", "c.fc"],
        "fc_8x8": ["b.fc"],
        "out": ["c.out"],
    }
