"""RoSA: a low-rank and a sparse update, trained together (Nikdan et al. 2024, arXiv 2401.04679).

    y = (W + S) x + s B A x

    schedule   wl         warmup_steps with B A alone; mask_steps in which B A still trains and
                          gradients are collected; then both train. The paper's wl64 is
                          warmup_steps=64
               spa_only   mask_steps in which nothing trains, then S alone
               lora_only  B A alone
    mask       the int(density · o i) entries of each layer with the largest mean of G²
               (score=squared, an empirical Fisher) or |mean of G| (score=mean).
               G = dyᵀ x is the gradient of the full weight in one micro-batch

The gradient of a micro-batch is squared, so the mask depends on the size of the micro-batches. The
paper's recipe has one row in each: batch_size=1 accumulate=32.

The paper trains in two runs: one of wl64 that ends with its mask, and one from the pretrained
weights with that mask and a fresh low-rank part. restart_after_mask does the same in one run: after
the mask, B A, its moments and the learning rate schedule start again. To train in two runs, set
max_steps=65 for the first, which writes masks.safetensors, and adapter.mask=FILE for the second.

Differs from the paper: the reference code trains only the adapters, uses one density for all
layers whatever the pattern says, sums scores in bf16, and every process chooses its own mask. Here
classification heads are trained too, patterns are respected, sums are fp32, and scores are summed
over the processes before the mask is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import lora, mask
from adapters.delta import AdapterError, Start
from adapters.linear import float_weight
from adapters.sparse import SparseDelta, layers, sparse_values, supports
from adapters.sparse_adapter import SparseAdapter

CANDIDATES = 4  # scores=candidates sums this many times the support's entries
CHUNK = 1 << 22  # scores that are copied to the CPU at one time


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
        lora.initialise(self.A, self.B)


class Scores:
    """Sums over micro-batches of G² or G of one layer, in fp32.

    `kind` is one of:
        exact       sums for all (o, i) entries, in the CPU's memory
        candidates  sums for the 4 k entries that are largest in the first micro-batch
        first       no sums: the k entries that are largest in the first micro-batch
    """

    def __init__(self, delta: SparseDelta, kind: str, squared: bool, name: str):
        self.shape, self.k = (delta.o, delta.i), len(delta.indices)
        self.kind, self.squared, self.name = kind, squared, name
        self.sums: Tensor | None = None
        # of the current step, whose loss scale is known only when it ends
        self.step_sums: Tensor | None = None
        self.flat: Tensor | None = None  # the candidates
        self.count = self.step_count = 0

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add one micro-batch. A gradient that is not finite is ignored, as its step is."""
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
            rows = max(1, CHUNK // i)
            for start in range(0, o, rows):
                chunk = slice(start, start + rows)
                self.step_sums[chunk] += self._score(gradient[chunk]).cpu()
            return
        scores = self._score(gradient).view(-1)
        if self.flat is None:
            count = self.k if self.kind == "first" else min(CANDIDATES * self.k, o * i)
            self.flat = mask.top(scores.abs(), count, self.name)
        at_candidates = scores.index_select(0, self.flat)
        self.step_sums = at_candidates if self.step_sums is None else self.step_sums + at_candidates

    def end_step(self, loss_scale: float, device: torch.device) -> None:
        """Add the current step to the sums.

        The sums are over all processes, since only rank 0 writes checkpoints. The loss scale of
        16-mixed, which changes from step to step, is divided out.
        """
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
        """Return the k entries of largest score.

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
        """Return the sums, for a checkpoint between two of the mask's steps."""
        return {"sums": self.sums, "flat": self.flat, "count": self.count}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a `state`."""
        sums, flat = state["sums"], state["flat"]
        if self.kind != "exact":  # exact sums stay on the CPU
            sums = sums.to(device) if sums is not None else None
            flat = flat.to(device) if flat is not None else None
        self.sums, self.flat, self.count = sums, flat, state["count"]


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
        train_modules: Sequence[str],
    ):
        super().__init__(
            density, density_pattern, target_modules, exclude_modules, gradient, sparse_dtype
        )
        self.train_modules = list(train_modules)
        self.rank = None if schedule == "spa_only" else rank
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.dtype = getattr(torch, dtype)
        self.schedule, self.source, self.mask_seed = schedule, mask, mask_seed
        self.score, self.scores_kind = score, scores
        self.sparse_lr_ratio, self.sparse_weight_decay = sparse_lr_ratio, sparse_weight_decay
        collects = schedule != "lora_only" and mask == "gradient"
        self.warmup_steps = warmup_steps if collects and schedule == "wl" else 0
        # the number of steps before the mask is chosen
        self.mask_step = self.warmup_steps + mask_steps if collects else 0
        self.restart = self.mask_step if restart_after_mask and schedule == "wl" else 0
        self.reads_micro_batches = self.mask_step > 0
        self.step = 0
        self.folder: Path | None = None
        self.scores: dict[str, Scores] = {}
        # statistics of a mask that exists from the start, until they are logged
        self.first_mask_statistics: dict[str, float] | None = None
        self.live_optimizer: torch.optim.Optimizer | None = None

    def new_delta(self, linear: Any, k: int) -> SparseDelta:
        if self.rank is None:
            return super().new_delta(linear, k)
        scale = lora.scaling(self.rank, self.alpha, self.rslora)
        return RoSA(linear, k, self.rank, scale, self.dropout, self.dtype, self.sparse_dtype)

    def _sizes(self, linears: list[tuple[str, nn.Module]]) -> dict[str, int]:
        if self.schedule == "lora_only":
            return {name: 0 for name, _ in linears}
        return super()._sizes(linears)

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
            self._chosen(model)  # report a mask file that does not fit before weights are loaded
        return model

    def begin(self, model: nn.Module, start: Start) -> None:
        if self.schedule == "lora_only":
            return
        if self.mask_step:
            self._watch(model)
        else:
            self.first_mask_statistics = self._set_supports(model, self._chosen(model))

    def _chosen(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the supports that need no gradients."""
        deltas: dict[str, Any] = {
            name: layer.delta for name, layer in layers(model) if layer.delta.values is not None
        }
        if self.source not in ("gradient", "magnitude", "random"):
            sizes = {name: ((d.o, d.i), len(d.indices)) for name, d in deltas.items()}
            return mask.load(Path(self.source), sizes)
        if next(model.parameters()).device.type == "meta":
            return {}
        if self.source == "random":
            draw = torch.Generator().manual_seed(self.mask_seed)
            return {n: mask.random(d.o, d.i, len(d.indices), draw) for n, d in deltas.items()}
        bases = {name: layer.base for name, layer in layers(model)}
        return {
            name: mask.top(float_weight(bases[name]).abs(), len(delta.indices), name)
            for name, delta in deltas.items()
        }

    def _watch(self, model: nn.Module) -> None:
        """Collect gradients during the steps before the mask."""
        if not self.warmup_steps <= self.step < self.mask_step:
            return
        for name, layer in layers(model):
            self.scores[name] = layer.delta.watch = Scores(
                layer.delta, self.scores_kind, self.score == "squared", name
            )

    def _set_supports(self, model: nn.Module, chosen: dict[str, Tensor]) -> dict[str, float]:
        """Give all layers their supports, write the mask file, and return the masks' mean
        statistics."""
        statistics: dict[str, list[float]] = {}
        for name, layer in layers(model):
            support = chosen[name].to(layer.base.weight.device)
            for key, value in mask.statistics(support, float_weight(layer.base)).items():
                statistics.setdefault(f"mask_{key}", []).append(value)
            layer.delta.set_support(support, layer.base)
        if self.folder is not None:
            shapes = {name: (layer.delta.o, layer.delta.i) for name, layer in layers(model)}
            file = self.folder / "masks.safetensors"
            mask.save(file, supports(model), shapes)  # type: ignore[arg-type]
        return {key: sum(values) / len(values) for key, values in statistics.items()}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        sparse = sparse_values(model)
        sparse_ids = {id(p) for p in sparse}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in sparse_ids]
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
        # DDP creates zero gradients where there are none. Remove them, so that the optimiser counts
        # S's steps from the mask on.
        if self.step < self.mask_step:
            for values in sparse_values(model):
                values.grad = None

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        super().after_step(model, step)
        self.step = step
        if not self.mask_step:
            metrics, self.first_mask_statistics = self.first_mask_statistics, None
            return metrics
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
        metrics = self._set_supports(model, chosen)
        mask.refuse_divergence(supports(model))
        if self.restart:
            self._restart_low_rank(model)
        return metrics

    def _restart_low_rank(self, model: nn.Module) -> None:
        """Initialise A and B again, and drop their moments."""
        draw = torch.Generator().manual_seed(self.mask_seed)  # the same in all processes
        for _, layer in layers(model):
            delta: Any = layer.delta
            A = torch.empty(delta.A.shape, dtype=delta.A.dtype)
            B = torch.empty(delta.B.shape, dtype=delta.B.dtype)
            lora.initialise(A, B, generator=draw)
            with torch.no_grad():
                delta.A.copy_(A)
                delta.B.copy_(B)
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

    def refuse_continuing(self) -> None:
        if self.mask_step:
            raise AdapterError(
                "adapter.from brings its own mask, and adapter.mask=gradient would choose another"
                " one: set adapter.mask to the masks.safetensors of that run"
            )

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
