"""RoSA: a low-rank and a sparse update, trained together (Nikdan et al. 2024, arXiv 2401.04679).

    y = (W + S) x + s B A x

    schedule   wl         warmup_steps with B A alone; mask_steps in which B A trains on and gradients are collected;
                          then both train. The paper's wl64 is warmup_steps=64
               spa_only   mask_steps in which nothing trains, then S alone
               lora_only  B A alone
    mask       the int(density · o i) entries of each layer with the largest mean of G² (score=squared, an empirical
               Fisher) or |mean of G|, G = dyᵀ x the gradient of the full weight in one micro-batch

What is squared is the gradient of a micro-batch, so the mask depends on their size: the paper's
recipe has one row in each, which batch_size=1 accumulate=32 gives.

The paper trains in two runs: one of wl64 that ends with its mask, and one from the pretrained
weights with that mask and a fresh low-rank part. restart_after_mask does the same in one: after the
mask, B A and its moments start anew, and so does the schedule of rates. As two runs: max_steps=65
for the first, which leaves masks.safetensors, and adapter.mask=FILE for the second.

The reference code trains nothing but adapters, cuts every layer with one density whatever the
pattern says, sums scores in bf16, and lets every process make its own mask; here classification
heads train on, patterns hold, sums are fp32, and scores are added over the processes before
anything is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import lora, mask
from adapters.delta import AdapterError, Start, float_weight
from adapters.sparse import SparseAdapter, SparseDelta, layers, sparse_values, supports

CANDIDATES = 4  # times the support: entries whose sums are kept with scores=candidates
ROWS = 1 << 22  # numbers that go to the CPU's sums at one time


class RoSA(SparseDelta):
    """The sparse and low-rank update of one linear layer."""

    def __init__(
        self,
        linear: Any,
        k: int,
        rank: int,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
        sparse_dtype: torch.dtype,
    ):
        super().__init__(linear, k, sparse_dtype)
        device = linear.weight.device
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(rank, self.i, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(self.o, rank, device=device, dtype=dtype))
        lora.start(self.A, self.B)


class Scores:
    """Sums over micro-batches of G² or G of one layer, in fp32.

    `kind` is exact, which keeps (o, i) of them in the CPU's memory; candidates, which keeps those
    of the 4 k entries that are largest in the first micro-batch; or first, which takes the k
    largest of the first micro-batch and no other.
    """

    def __init__(self, delta: SparseDelta, kind: str, squared: bool, name: str):
        self.shape, self.k, self.kind, self.squared, self.name = (
            (delta.o, delta.i),
            len(delta.indices),
            kind,
            squared,
            name,
        )
        self.sums: Tensor | None = None
        # of the step at hand, whose loss scale is known when it ends
        self.step_sums: Tensor | None = None
        self.flat: Tensor | None = None  # the candidates
        self.count = self.step_count = 0

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Take in one micro-batch; one whose gradient is not finite counts for nothing, as its step
        does."""
        if self.kind == "first" and self.count + self.step_count:
            return
        wide = torch.promote_types(x.dtype, torch.float32)
        gradient = dy.to(wide).t() @ x.to(wide)
        if not torch.isfinite(gradient).all():
            return
        o, i = self.shape
        self.step_count += 1
        if self.kind == "exact":
            if self.step_sums is None:
                self.step_sums = torch.zeros(o, i)
            rows = max(1, ROWS // i)
            for start in range(0, o, rows):
                self.step_sums[start : start + rows] += self._score(
                    gradient[start : start + rows]
                ).cpu()
            return
        scores = self._score(gradient).view(-1)
        if self.flat is None:
            most = self.k if self.kind == "first" else min(CANDIDATES * self.k, o * i)
            self.flat = mask.top(scores.abs(), most, self.name)
        found = scores.index_select(0, self.flat)
        self.step_sums = found if self.step_sums is None else self.step_sums + found

    def end_step(self, loss_scale: float, device: torch.device) -> None:
        """Add the step at hand to the sums, over all processes, since only one of them writes
        checkpoints, and without the loss scale of 16-mixed, which changes from step to step."""
        if mask.processes() > 1:
            total = (
                torch.zeros(self.shape, device=device)
                if self.step_sums is None
                else self.step_sums.to(device)
            )
            count = torch.tensor(self.step_count, device=device)
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
            self.step_sums, self.step_count = total.cpu(), int(count)
        if self.step_sums is not None:
            self.step_sums /= loss_scale**2 if self.squared else loss_scale
            self.sums = self.step_sums if self.sums is None else self.sums.add_(self.step_sums)
            self.step_sums = None
            self.count, self.step_count = self.count + self.step_count, 0

    def _score(self, gradient: Tensor) -> Tensor:
        return gradient.float().square() if self.squared else gradient.float()

    def support(self, device: torch.device) -> Tensor:
        """The k entries of largest score.

        Raises:
            AdapterError: no micro-batch had a finite gradient, or the scores are not finite.
        """
        if self.step_sums is not None:
            self.end_step(1.0, device)
        if self.sums is None or not self.count:
            raise AdapterError(
                f"no micro-batch of the mask's steps had a finite gradient at {self.name}: lower"
                " optimizer.lr, raise the warm-up, or look at the rows"
            )
        chosen = mask.top(self.sums.abs().to(device), self.k, self.name)
        return chosen if self.flat is None else self.flat.to(device).index_select(0, chosen)

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two of the mask's steps."""
        return {"sums": self.sums, "flat": self.flat, "count": self.count}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a `state`."""
        moved = {key: state[key] for key in ("sums", "flat")}
        if self.kind != "exact":
            moved = {
                key: tensor.to(device) if tensor is not None else None
                for key, tensor in moved.items()
            }
        self.sums, self.flat, self.count = moved["sums"], moved["flat"], state["count"]


class RoSAAdapter(SparseAdapter):
    """RoSA and QRoSA on the linear layers of a model."""

    def __init__(
        self,
        rank: int,
        alpha: float,
        rslora: bool,
        dropout: float,
        density: float,
        density_pattern: dict[str, float],
        schedule: str,
        warmup_steps: int,
        mask_steps: int,
        restart_after_mask: bool,
        mask: str,
        score: str,
        scores: str,
        mask_seed: int,
        sparse_lr_ratio: float,
        sparse_weight_decay: float,
        target_modules: str | list[str],
        exclude_modules: list[str],
        gradient: str,
        dtype: str,
        sparse_dtype: str,
    ):
        super().__init__(
            density, density_pattern, target_modules, exclude_modules, gradient, sparse_dtype
        )
        self.rank = None if schedule == "spa_only" else rank
        self.alpha, self.rslora, self.dropout, self.dtype = (
            alpha,
            rslora,
            dropout,
            getattr(torch, dtype),
        )
        self.schedule, self.source, self.score, self.scores_kind, self.mask_seed = (
            schedule,
            mask,
            score,
            scores,
            mask_seed,
        )
        self.sparse_lr_ratio, self.sparse_weight_decay = sparse_lr_ratio, sparse_weight_decay
        collects = schedule != "lora_only" and mask == "gradient"
        self.warmup_steps = warmup_steps if collects and schedule == "wl" else 0
        # steps that are done when the mask is made
        self.mask_step = self.warmup_steps + mask_steps if collects else 0
        self.restart = self.mask_step if restart_after_mask and schedule == "wl" else 0
        self.step = 0
        self.folder: Path | None = None
        self.scores: dict[str, Scores] = {}
        # statistics of a mask that is there from the start, until they are logged
        self.found: dict[str, float] | None = None
        self.live_optimizer: torch.optim.Optimizer | None = None

    def new_delta(self, linear: Any, k: int) -> SparseDelta:
        if self.rank is None:
            return super().new_delta(linear, k)
        scale = lora.scaling(self.rank, self.alpha, self.rslora)
        return RoSA(linear, k, self.rank, scale, self.dropout, self.dtype, self.sparse_dtype)

    def _sizes(self, found: list[tuple[str, nn.Module]]) -> dict[str, int]:
        return (
            {name: 0 for name, _ in found}
            if self.schedule == "lora_only"
            else super()._sizes(found)
        )

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        if self.mask_step > start.steps and start.saved is None:
            raise AdapterError(
                f"RoSA's mask is made after {self.mask_step} steps (adapter.warmup_steps +"
                f" adapter.mask_steps), and the run has {start.steps}: lower adapter.warmup_steps,"
                " or train for longer"
            )
        self.folder = start.folder
        model = super().attach(model, start)
        if next(model.parameters()).device.type == "meta" and self.schedule != "lora_only":
            self._chosen(model)  # a mask file that does not fit is found before weights are loaded
        return model

    def begin(self, model: nn.Module, start: Start) -> None:
        if self.schedule == "lora_only":
            return
        if self.mask_step:
            self._watch(model)
        else:
            self.found = self._settle(model, self._chosen(model))

    def _chosen(self, model: nn.Module) -> dict[str, Tensor]:
        """The supports that need no gradients."""
        deltas: dict[str, Any] = {
            name: layer.delta for name, layer in layers(model) if layer.delta.values is not None
        }
        if self.source not in ("gradient", "magnitude", "random"):
            return mask.load(
                Path(self.source), {n: ((d.o, d.i), len(d.indices)) for n, d in deltas.items()}
            )
        if next(model.parameters()).device.type == "meta":
            return {}
        if self.source == "random":
            draw = torch.Generator().manual_seed(self.mask_seed)
            return {n: mask.random(d.o, d.i, len(d.indices), draw) for n, d in deltas.items()}
        bases = {name: layer.base for name, layer in layers(model)}
        return {
            n: mask.top(float_weight(bases[n]).abs(), len(d.indices), n) for n, d in deltas.items()
        }

    def _watch(self, model: nn.Module) -> None:
        """Collect gradients in the steps before the mask."""
        if not self.warmup_steps <= self.step < self.mask_step:
            return
        for name, layer in layers(model):
            self.scores[name] = layer.delta.watch = Scores(
                layer.delta, self.scores_kind, self.score == "squared", name
            )

    def _settle(self, model: nn.Module, chosen: dict[str, Tensor]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for name, layer in layers(model):
            support = chosen[name].to(layer.base.weight.device)
            for key, value in mask.statistics(support, float_weight(layer.base)).items():
                found.setdefault(f"mask_{key}", []).append(value)
            layer.delta.settle(support, layer.base)
        if self.folder is not None:
            shapes = {name: (layer.delta.o, layer.delta.i) for name, layer in layers(model)}
            mask.save(self.folder / "masks.safetensors", supports(model), shapes)  # type: ignore[arg-type]
        return {key: sum(values) / len(values) for key, values in found.items()}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        sparse = sparse_values(model)
        apart = {id(p) for p in sparse}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        groups: list[dict[str, Any]] = [{"params": others, "lr_scale": 1.0}] if others else []
        if sparse:
            groups.append(
                {
                    "params": sparse,
                    "lr_scale": self.sparse_lr_ratio,
                    "weight_decay": self.sparse_weight_decay,
                }
            )
        return groups

    def optimizer(self, groups: list[dict[str, Any]], make: Any) -> torch.optim.Optimizer:
        self.live_optimizer = super().optimizer(groups, make)
        return self.live_optimizer

    def before_step(self, model: nn.Module, loss_scale: float) -> None:
        if self.scores_kind != "exact" and self.step < self.mask_step and mask.processes() > 1:
            raise AdapterError(
                f"adapter.scores={self.scores_kind} is for one process: several have other"
                " candidates. Set scores=exact"
            )
        for scores in self.scores.values():
            scores.end_step(loss_scale, next(model.parameters()).device)
        # DDP makes zeros where there was no gradient. Without one, an optimiser's count of steps
        # begins when S does.
        if self.step < self.mask_step:
            for values in sparse_values(model):
                values.grad = None

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        super().after_step(model, step)
        self.step = step
        if not self.mask_step:
            news, self.found = self.found, None
            return news
        if step > self.mask_step:
            return None
        if step < self.mask_step:
            if step == self.warmup_steps:
                self._watch(model)
            return None
        device = next(model.parameters()).device
        chosen = {}
        for name, layer in layers(model):
            layer.delta.watch = None
            chosen[name] = self.scores.pop(name).support(device)
        news = self._settle(model, chosen)
        mask.refuse_divergence(supports(model))
        if self.restart:
            self._start_low_rank_anew(model)
        return news

    def _start_low_rank_anew(self, model: nn.Module) -> None:
        draw = torch.Generator().manual_seed(self.mask_seed)  # the same in all processes
        for _, layer in layers(model):
            delta: Any = layer.delta
            fresh = (
                torch.empty(delta.A.shape, dtype=delta.A.dtype),
                torch.empty(delta.B.shape, dtype=delta.B.dtype),
            )
            lora.start(*fresh, generator=draw)
            with torch.no_grad():
                delta.A.copy_(fresh[0])
                delta.B.copy_(fresh[1])
            if self.live_optimizer is not None:
                for parameter in (delta.A, delta.B):
                    self.live_optimizer.state.pop(parameter, None)

    def state(self, model: nn.Module) -> dict[str, Any]:
        state = super().state(model)
        state["extra"] |= {
            "step": self.step,
            "scores": {name: scores.state() for name, scores in self.scores.items()},
        }
        return state

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        super().load_state(model, state)
        self.step = state["extra"]["step"]
        self.scores.clear()
        for _, layer in layers(model):
            layer.delta.watch = None
        self._watch(model)
        for name, layer in layers(model):
            if name in self.scores:
                self.scores[name].load_state(
                    state["extra"]["scores"][name], layer.base.weight.device
                )
