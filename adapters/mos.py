"""MoS, a mixture of shards: low-rank updates whose rows are put together from pools that all layers
of a kind share (Wang et al. 2024, arXiv 2410.00938).

    y = W x + s B A x        s = alpha / r        A (r, i), B (o, r)

    A_j  = [P_A[a_j1], ..., P_A[a_jl]]            row j of A in one layer
    B_:j = [P_B[b_j1], ..., P_B[b_jl]]            column j of B

    L    layers of a kind: those whose names have the same end (q_proj, ...), and one shape
    e    pool_rank: a kind trains L e (i + o) parameters, as LoRA of rank e does
    r    rank: of each layer's update
    p    private_rank: of those, how many use shards that no other layer has
    l    shards: into how many pieces each row is cut
    P_A  (L e l, i / l)  uniform at the start, as LoRA's A of rank r
    P_B  (L e l, o / l)  zero at the start, so y starts as W x

Which shards a layer uses is drawn once and stays. The (r - p) l shared ones are drawn without
replacement from the first L (e - p) l, for A and for B independently. Layer n's private ones are
those from L (e - p) l + n p l on. With r = e = p it is LoRA of rank r.

The saved adapter is an ordinary LoRA of rank r, exactly the same update: as large as LoRA's, and
read by whatever reads LoRA. The checkpoint has the pools.

Differs from the paper: its code names each kind by hand; here it is the end of the name and the
shape, so every architecture works. Dropout is 0 by default, where its scripts have 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adapters.delta import Adapter, AdapterError, Delta, Pool, Start
from adapters.linear import features
from adapters.lora import LoRA, LoRAAdapter, scaling
from adapters.targets import NamedLayers, targets

POOLS = "graft_pools"  # the model's module with the pools of all kinds


class Shards(nn.Module):
    """The pools of the layers of one kind."""

    def __init__(self, linear: Any, rows: int, shards: int, dtype: torch.dtype):
        super().__init__()
        i, o = features(linear)
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rows, i // shards, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rows, o // shards, device=device, dtype=dtype))
        nn.init.uniform_(self.A, -(i**-0.5), i**-0.5)  # LoRA's bound, of a row with i entries


class MoS(LoRA):
    """The low-rank update of one linear layer, put together from shards."""

    a: Int[Tensor, " rl"]  # rows of the pool of A; row j's piece t is number j l + t
    b: Int[Tensor, " rl"]

    def __init__(
        self, pool: Shards, rank: int, scale: float, dropout: float, fused: bool, a: Any, b: Any
    ):
        Delta.__init__(self)
        self.shared = (pool,)  # a tuple, so that the pool is not a module of each layer
        self.rank, self.scale, self.dropout, self.fused = rank, scale, dropout, fused
        self.register_buffer("a", a.to(pool.A.device))
        self.register_buffer("b", b.to(pool.A.device))

    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        (pool,) = self.shared
        A = pool.A.index_select(0, self.a).view(self.rank, -1)
        return A, pool.B.index_select(0, self.b).view(self.rank, -1).t()


class MoSAdapter(LoRAAdapter):
    """A mixture of shards on the linear layers of a model."""

    def __init__(
        self,
        rank: int,
        pool_rank: int,
        private_rank: int,
        shards: int,
        shard_seed: int,
        alpha: float,
        dropout: float,
        target_modules: str | list[str],
        exclude_modules: list[str],
        lr_ratio: float,
        dtype: str,
        fused: bool,
        train_modules: Sequence[str],
    ):
        super().__init__(
            rank, alpha, False, dropout, target_modules, exclude_modules, lr_ratio, dtype, fused,
            [], train_modules,
        )  # fmt: skip
        self.pool_rank, self.private_rank = pool_rank, private_rank
        self.shards, self.shard_seed = shards, shard_seed
        self.deltas: dict[int, MoS] = {}

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        pools = Pool()
        draw = torch.Generator().manual_seed(self.shard_seed)
        linears = targets(model, self.target_modules, self.exclude_modules, start.new_modules)
        self._check_widths(linears)
        for kind, layers in kinds(linears).items():
            self._check_rows(kind, len(layers))
            rows = len(layers) * self.pool_rank * self.shards
            pools[kind] = pool = Shards(layers[0][1], rows, self.shards, self.dtype)
            for position, (_, linear) in enumerate(layers):
                a, b = (self._rows(len(layers), position, draw) for _ in "ab")
                scale = scaling(self.rank, self.alpha, False)
                delta = MoS(pool, self.rank, scale, self.dropout, self.fused, a, b)
                self.deltas[id(linear)] = delta
        model = super().attach(model, start)
        self.deltas.clear()
        setattr(model, POOLS, pools)
        return model

    def make(self, linear: nn.Module) -> LoRA:
        return self.deltas[id(linear)]

    def _rows(self, layers: int, position: int, draw: torch.Generator) -> Int[Tensor, " rl"]:
        """Draw the rows of a pool that the layer number `position` of a kind uses."""
        shared = layers * (self.pool_rank - self.private_rank) * self.shards
        count, own = (self.rank - self.private_rank) * self.shards, self.private_rank * self.shards
        chosen = torch.randperm(shared, generator=draw)[:count]
        return torch.cat([chosen, shared + position * own + torch.arange(own)]).int()

    def _check_widths(self, linears: NamedLayers) -> None:
        """Check that the rows of each layer can be cut into equal shards.

        Raises:
            AdapterError: those of a layer cannot.
        """
        common = math.gcd(*(width for _, linear in linears for width in features(linear)))
        for name, linear in linears:
            i, o = features(linear)
            if i % self.shards or o % self.shards:
                fits = max(n for n in range(1, self.shards) if common % n == 0)
                raise AdapterError(
                    f"adapter.shards={self.shards}: rows of {i} and {o} entries, those of {name},"
                    f" cannot be cut into so many equal pieces: set adapter.shards={fits}"
                )

    def _check_rows(self, kind: str, layers: int) -> None:
        """Check that the pools of a kind have enough shards for its number of layers.

        Raises:
            AdapterError: they do not; the message has the largest rank.
        """
        e, r, p = self.pool_rank, self.rank, self.private_rank
        if p > min(e, r):
            raise AdapterError(
                f"adapter.private_rank={p}: expected at most adapter.pool_rank={e} and adapter.rank"
                f"={r}, of which it is a part: lower it"
            )
        largest = p + layers * (e - p)
        if r > largest:
            raise AdapterError(
                f"adapter.rank={r}: the {layers} layers {kind} share {layers * (e - p)} rows and"
                f" have {p} each of their own (adapter.pool_rank={e}, adapter.private_rank={p}):"
                f" set adapter.rank={largest} or less, or raise adapter.pool_rank"
            )

    def merge(self, model: nn.Module) -> nn.Module:
        model = super().merge(model)
        delattr(model, POOLS)
        return model

    def stock_faults(self, settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
        return Adapter.stock_faults(self, settings, stored)

    def load_stock_folder(self, model: nn.Module, folder: Path) -> None:
        Adapter.load_stock_folder(self, model, folder)


def kinds(linears: NamedLayers) -> dict[str, NamedLayers]:
    """Return the layers by the end of their name; if layers of one end have several shapes, the
    shape follows it."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for name, linear in linears:
        shapes.setdefault(name.rpartition(".")[2], set()).add(features(linear))
    layers: dict[str, NamedLayers] = {}
    for name, linear in linears:
        kind, (i, o) = name.rpartition(".")[2], features(linear)
        key = kind if len(shapes[kind]) == 1 else f"{kind}_{o}x{i}"
        layers.setdefault(key, []).append((name, linear))
    return layers
