"""MoLA: a mixture of low-rank experts on each linear layer, chosen token by token, more of them in
some layers than in others (Gao et al. 2024, arXiv 2402.08562).

    y = W x + s Σ_{e in top} g_e B_e A_e x        s = alpha / r
    g = softmax(R x), of which the `top` largest are kept and divided by their sum

    R    (N, i)  the router of this linear layer; N is that of its decoder layer
    A_e  (r, i)  uniform at the start
    B_e  (o, r)  zero at the start, so y starts as W x

`experts` has the numbers N of equal parts of the depth, from the first layers to the last. All
experts are computed at once, and the gates of those that are not chosen are zero.

The correction depends on the input. So no weight holds it, and no format of PEFT or of an engine
does: a run is evaluated, continued, decoded and served from its folder.

Differs from the paper: its code has a balance loss, off by default, which is not here. Its preprint
finds that higher layers need more experts, and its published version the middle ones, so the
numbers are a list. Dropout is 0 by default, where its scripts have 0.05.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.delta import Adapter, AdapterError, Delta, Start
from adapters.linear import features
from adapters.targets import NamedLayers, targets

_NUMBER = re.compile(r"^(.*?)\.(\d+)\.")  # of a decoder layer, in the name of a layer inside it


class MoLA(Delta):
    """The experts of one linear layer, and their router."""

    has_weight = False

    def __init__(
        self, linear: Any, experts: int, rank: int, top: int, scale: float, dropout: float,
        dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        i, o = features(linear)
        where = {"device": linear.weight.device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(experts * rank, i, **where))
        self.B = nn.Parameter(torch.zeros(o, experts * rank, **where))
        self.R = nn.Parameter(torch.empty(experts, i, **where))
        for matrix in (self.A, self.R):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.rank, self.top = rank, min(top, experts)
        self.scale, self.dropout = scale, dropout

    def gates(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b n"]:
        """Return each expert's share of each token, zero for those that are not chosen."""
        shares = F.linear(x, self.R.to(x.dtype)).to(self.R.dtype).softmax(-1)
        chosen, experts = shares.topk(self.top, dim=-1)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, experts, chosen)

    def forward(self, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        x = x.to(y.dtype)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(y.dtype))
        low = low * self.gates(x).to(y.dtype).repeat_interleave(self.rank, dim=-1)
        return y + self.scale * F.linear(low, self.B.to(y.dtype))

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        raise AdapterError("a mixture of experts has no weight: which one answers depends on x")


class MoLAAdapter(Adapter):
    """A mixture of low-rank experts on the linear layers of a model."""

    mergeable = False
    exportable = False

    def __init__(
        self,
        experts: list[Any],
        top: int,
        rank: int,
        alpha: float,
        dropout: float,
        target_modules: str | list[str],
        exclude_modules: list[str],
        dtype: str,
        train_modules: Sequence[str],
    ):
        if not experts or any(not isinstance(n, int) or n < 1 for n in experts):
            raise AdapterError(
                f"adapter.experts={list(experts)}: expected whole numbers of at least 1, one for"
                " each equal part of the layers, as [2,4,6,8]"
            )
        self.experts, self.top, self.rank = list(experts), top, rank
        self.alpha, self.dropout, self.dtype = alpha, dropout, getattr(torch, dtype)
        self.target_modules, self.exclude_modules = target_modules, list(exclude_modules)
        self.train_modules = list(train_modules)
        self.numbers: dict[int, int] = {}  # of experts, by the id of the layer

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        linears = targets(model, self.target_modules, self.exclude_modules, start.new_modules)
        numbers = numbers_of_experts(linears, self.experts)
        self.numbers = {id(linear): numbers[name] for name, linear in linears}
        return super().attach(model, start)

    def make(self, linear: nn.Module) -> Delta:
        scale = self.alpha / self.rank
        return MoLA(
            linear, self.numbers[id(linear)], self.rank, self.top, scale, self.dropout, self.dtype
        )

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        raise AdapterError(
            "adapter=mola routes each token, which no format of PEFT or of an engine holds, so it"
            " can be exported neither as an adapter nor merged: use the run's folder, with graft"
            " evaluate, graft generate and graft serve"
        )


def numbers_of_experts(linears: NamedLayers, experts: list[int]) -> dict[str, int]:
    """Return the number of experts of each linear layer, by the number of its decoder layer among
    those of its stack; outside of all stacks it is the last one of `experts`."""
    matches = {name: _NUMBER.match(name) for name, _ in linears}
    depth: dict[str, int] = {}
    for match in matches.values():
        if match is not None:
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    return {
        name: experts[-1]
        if match is None
        else experts[int(match[2]) * len(experts) // depth[match[1]]]
        for name, match in matches.items()
    }
