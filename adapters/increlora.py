"""IncreLoRA: low-rank updates that start at one piece and grow where it matters (Zhang et al. 2023,
arXiv 2308.12043).

    y = W x + (α / n) Σ_j E_j b_j a_j x

    n    live pieces of a layer, `start_rank` at first
    a_j  row j of A (R, i), b_j column j of B (o, R), E (R,)      R = max_rank
    α    alpha

The next `grow_by` pieces are a layer's reserve: their a and b train ahead, at E = 1e-5, which does
not. Every step gives each layer a score, of the update D and the loss's gradient G = dyᵀ x:

    I = Σ |D ⊙ G| / √(o i)      m <- 0.85 m + 0.15 I      u <- 0.85 u + 0.15 |I - m|      m u

After warmup_steps, every `interval` steps, the `top` layers of largest score make their reserve
live and get a new one, until the layers have target_rank live pieces on average. Then the reserves
are dropped. Tensors have their largest size from the start, so that a checkpoint always fits; rows
that are not in use have no gradient. The saved adapter is a LoRA with a rank for each layer.

Differs from the paper: its code scales by α / (n + 1e-5) and leaves E, so that an update shrinks
each time that it grows; here E grows with n, and the outputs stay. A new b starts at zero, so that
the model starts as the base. Its orthogonality term compares each piece with itself alone; here it
compares all pieces of a layer. Its score is that of the last micro-batch of one process; here all
count. Layers of equal score are taken in the model's order. Steps are those of the run where the
paper has thousands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapters import io, mask
from adapters.delta import AdapterError, Delta, Start
from adapters.linear import features, not_a_view
from adapters.lora import LoRA, LoRAAdapter

AHEAD = 1e-5  # E of the reserve
DECAY = 0.85  # of both means
STD = 0.02
LAST = 0.7  # of the run: by then `top: auto` has all pieces live


class IncreLoRA(LoRA):
    """The growing update of one linear layer."""

    def __init__(
        self, linear: Any, sizes: tuple[int, int, int], alpha: float, dropout: float, dtype: Any
    ):
        Delta.__init__(self)
        i, o = features(linear)
        self.limit, self.pieces, self.step_size = sizes
        self.reserve = min(self.step_size, self.limit - self.pieces)
        where = {"device": linear.weight.device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(self.limit, i, **where))
        self.B = nn.Parameter(torch.zeros(o, self.limit, **where))
        self.E = nn.Parameter(torch.zeros(self.limit, **where))
        nn.init.normal_(self.A, std=STD)
        with torch.no_grad():
            nn.init.normal_(self.B[:, : self.pieces], std=STD)
            self.E[self.pieces : self.used] = AHEAD
        self.alpha, self.dropout, self.fused = alpha, dropout, True
        self.watched = True  # whether each backward pass adds to `importance`
        self.importance: Tensor | None = None  # Σ |D ⊙ G| since the last step

    @property
    def reads_gradients(self) -> bool:
        return self.watched

    @property
    def used(self) -> int:
        """The number of pieces that compute: the live ones and the reserve."""
        return self.pieces + self.reserve

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.alpha / self.used

    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        E = torch.cat([self.E[: self.pieces], self.E[self.pieces : self.used].detach()])
        E = E * (self.used / self.pieces)  # α / n, with the scale
        return E[:, None] * self.A[: self.used], self.B[:, : self.used]

    def linear(self, base: Any, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        y = super().linear(base, x)
        if self.watched and self.training and torch.is_grad_enabled() and y.requires_grad:
            y = Watch.apply(y, x.detach(), self)
        return y

    @torch.no_grad()
    def grow(self) -> None:
        """Make the reserve live, and start a new one. The outputs stay."""
        before, self.pieces = self.pieces, self.used
        self.E[: self.pieces] *= self.pieces / before
        self.reserve = min(self.step_size, self.limit - self.pieces)
        self.E[self.pieces : self.used] = AHEAD
        self.watched = self.reserve > 0


class Watch(torch.autograd.Function):
    """The output of a layer, whose gradient adds to the layer's importance."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: IncreLoRA) -> Tensor:
        ctx.save_for_backward(x)
        ctx.delta = delta
        return not_a_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,), delta = ctx.saved_tensors, ctx.delta
        A, B = (factor.detach() for factor in delta.factors())
        rows = x.reshape(-1, x.shape[-1]).to(dy.dtype)
        gradient = dy.reshape(-1, dy.shape[-1]).t() @ rows
        importance = (delta.scale * (B @ A) * gradient).abs().sum()
        delta.importance = importance if delta.importance is None else delta.importance + importance
        return dy, None, None


class IncreLoRAAdapter(LoRAAdapter):
    """IncreLoRA on the linear layers of a model."""

    compiles = False
    reads_micro_batches = True

    def __init__(
        self,
        start_rank: int,
        target_rank: int,
        max_rank: int,
        grow_by: int,
        warmup_steps: float,
        interval: float,
        top: int | str,
        orthogonality: float,
        alpha: float,
        dropout: float,
        target_modules: str | list[str],
        exclude_modules: list[str],
        dtype: str,
        train_modules: Sequence[str],
    ):
        super().__init__(
            start_rank, alpha, False, dropout, target_modules, exclude_modules, 1.0, dtype, True,
            [], train_modules,
        )  # fmt: skip
        if not start_rank <= target_rank <= max_rank:
            raise AdapterError(
                f"adapter.start_rank={start_rank}, adapter.target_rank={target_rank},"
                f" adapter.max_rank={max_rank}: expected to rise. Raise adapter.max_rank"
            )
        self.target_rank, self.sizes = target_rank, (max_rank, start_rank, grow_by)
        self.asked = (warmup_steps, interval, top)
        self.orthogonality = orthogonality
        self.warmup = self.interval = self.top = 0
        self.means: dict[str, tuple[float, float]] = {}  # m and u by layer
        self.waiting: dict[str, float] = {}  # I of the step that is being taken

    def make(self, linear: nn.Module) -> LoRA:
        return IncreLoRA(linear, self.sizes, self.alpha, self.dropout, self.dtype)

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        model = super().attach(model, start)
        layers = io.deltas(model)
        self._settle(start.steps, len(layers))
        self.means = {name: (0.0, 0.0) for name, _ in layers}
        self._end(model)
        return model

    def _settle(self, steps: int, layers: int) -> None:
        """Convert the settings to steps.

        Raises:
            AdapterError: the run is too short for all pieces to become live.
        """
        warmup, interval, top = self.asked
        _, first, each = self.sizes
        self.warmup = round(warmup * steps) if 0 < warmup < 1 else int(warmup)
        self.interval = max(1, round(interval * steps) if interval < 1 else int(interval))
        pieces = (self.target_rank - first) * layers
        times = max(1, int(LAST * steps - self.warmup) // self.interval)
        self.top = math.ceil(pieces / (each * times)) if isinstance(top, str) else top
        growths = math.ceil(pieces / (each * max(1, self.top)))
        last = self.warmup + growths * self.interval
        if last > steps > 1:  # one step: a model that is only loaded
            raise AdapterError(
                f"adapter=increlora grows {growths} times, until step {last}, and the run has"
                f" {steps}: set adapter.top=auto, lower adapter.warmup_steps={self.warmup} or"
                f" adapter.interval={self.interval}, or train for longer"
            )

    def _left(self, model: nn.Module) -> int:
        """Return how many pieces are still to become live."""
        deltas = io.deltas(model)
        return self.target_rank * len(deltas) - sum(delta.pieces for _, delta in deltas)

    def _end(self, model: nn.Module) -> None:
        """Drop the reserves if no layer can grow any more."""
        deltas = [delta for _, delta in io.deltas(model)]
        left = self._left(model)
        if not any(0 < delta.reserve <= left for delta in deltas):
            for delta in deltas:
                delta.reserve, delta.watched, delta.importance = 0, False, None

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.orthogonality:
            return None
        terms = []
        for _, delta in io.deltas(model):
            for rows in (delta.A[: delta.used], delta.B[:, : delta.used].t()):
                one = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
                terms.append(torch.linalg.matrix_norm(rows @ rows.t() - one))
        return self.orthogonality * torch.stack(terms).mean()

    def before_step(self, model: nn.Module, loss_scale: float) -> None:
        watched = [(n, d) for n, d in io.deltas(model) if d.importance is not None]
        if not watched:
            return
        sums = torch.stack([delta.importance for _, delta in watched]).double() / loss_scale
        if mask.processes() > 1:
            torch.distributed.all_reduce(sums)
            sums /= mask.processes()
        for (name, delta), total in zip(watched, sums.tolist(), strict=True):
            self.waiting[name] = total / math.sqrt(delta.A.shape[1] * delta.B.shape[0])
            delta.importance = None

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        for name, importance in self.waiting.items():
            m, u = self.means[name]
            m = DECAY * m + (1 - DECAY) * importance
            self.means[name] = m, DECAY * u + (1 - DECAY) * abs(importance - m)
        self.waiting = {}
        since = step - self.warmup
        if since <= 0 or since % self.interval or self._left(model) <= 0:
            return None
        scores = {name: m * u for name, (m, u) in self.means.items()}
        able = [(name, delta) for name, delta in io.deltas(model) if delta.reserve]
        if not able:
            return None
        able.sort(key=lambda layer: -scores[layer[0]])  # stable: equal ones in the model's order
        for _, delta in able[: self.top]:
            if delta.reserve <= self._left(model):
                delta.grow()
        self._end(model)
        return {"live_pieces": float(sum(delta.pieces for _, delta in io.deltas(model)))}

    def state(self, model: nn.Module) -> dict[str, Any]:
        state = super().state(model)
        deltas = io.deltas(model)
        state["extra"] = {
            "pieces": {name: [delta.pieces, delta.reserve] for name, delta in deltas},
            "means": {name: list(means) for name, means in self.means.items()},
        }
        return state

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        super().load_state(model, state)
        for name, delta in io.deltas(model):
            delta.pieces, delta.reserve = state["extra"]["pieces"][name]
            delta.watched, delta.importance = bool(delta.reserve), None
        self.means = {name: (m, u) for name, (m, u) in state["extra"]["means"].items()}
        self._end(model)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        ranks = {name: delta.used for name, delta in io.deltas(model)}
        return {"r": max(ranks.values()), "rank_pattern": ranks}
