"""RoSA: a low-rank and a sparse update, trained together (Nikdan et al. 2024, arXiv 2401.04679).

    y = (W + S) x + s B A x

    schedule   wl         warmup_steps with B A alone; mask_steps in which B A still trains and
                          gradients are collected; then both train. The paper's wl64 is
                          warmup_steps=64. A number below 1 is a fraction of the run's steps
               spa_only   mask_steps in which nothing trains, then S alone
               lora_only  B A alone
    mask       the int(density · o i) entries of each layer with the largest mean of G²
               (score=squared, an empirical Fisher) or |mean of G| (score=mean).
               G = dyᵀ x is the gradient of the full weight in one micro-batch
               mask=decompose needs no gradients: the entries that a matrix of rank r fits worst,
               as DSEE has it (Chen et al. 2021, arXiv 2111.00160; adapters/mask.py)

The gradient of a micro-batch is squared, so the mask depends on the size of the micro-batches. The
paper's recipe has one row in each: batch_size=1 accumulate=32.

The paper trains in two runs: one of wl64 that ends with its mask, and one from the pretrained
weights with that mask and a fresh low-rank part. restart_after_mask does the same in one run: after
the mask, B A, its moments and the learning rate schedule start again. The steps before that are no
part of max_steps, max_epochs and max_tokens, so the paper's second run is whole; those of spa_only,
which train nothing, are not either. count_mask_steps=true counts them all. To train in two runs,
set count_mask_steps=true max_steps=68 mask_steps=4 for the first, which writes masks.safetensors,
and adapter.mask=FILE for the second.

Experts of a mixture (target_parameters) get the low-rank part alone, which PEFT's LoRA can hold.

Differs from DSEE: S is not scaled by alpha / r, and has adapter.density of each weight, where its
scripts have 16 entries of each. Its decomposition raises the rank in steps of 5 and thresholds at
0.01; here both sizes are fixed. Its pruning of the weights afterwards is `graft shrink`.

Differs from the paper: the reference code trains only the adapters, uses one density for all
layers whatever the pattern says, sums scores in bf16, and every process chooses its own mask. Here
classification heads are trained too, patterns are respected, sums are fp32, and scores are summed
over the processes before the mask is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import experts, lora, mask, shards
from adapters.delta import AdapterError, Start
from adapters.linear import float_weight
from adapters.rosa_scores import Scores
from adapters.sparse import SparseDelta, layers, sparse_values, supports
from adapters.sparse_adapter import SparseAdapter

# A mask of one micro-batch of 4 rows shares 36 % of its entries with one of eight (SmolLM2-135M).
MASK_ROWS = 32  # as the paper's: one step of 32 rows
LONG = 0.25  # a larger share of the run for its mask is worth a warning


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
        warmup_steps: float,
        mask_steps: float | str,
        restart_after_mask: bool,
        count_mask_steps: bool,
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
        target_parameters: str | list[str],
        train_modules: Sequence[str],
        within: str,
    ):
        super().__init__(
            density,
            density_pattern,
            target_modules,
            exclude_modules,
            gradient,
            sparse_dtype,
            within,
        )
        self.train_modules, self.target_parameters = list(train_modules), target_parameters
        self.rank = None if schedule == "spa_only" else rank
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.dtype = getattr(torch, dtype)
        self.fitted_rank = rank  # of the low-rank part of W in mask=decompose
        self.schedule, self.source, self.mask_seed = schedule, mask, mask_seed
        self.score, self.scores_kind = score, scores
        self.sparse_lr_ratio, self.sparse_weight_decay = sparse_lr_ratio, sparse_weight_decay
        self.reads_micro_batches = schedule != "lora_only" and mask == "gradient"
        self.asked = (warmup_steps if schedule == "wl" else 0, mask_steps)
        self.wl = schedule == "wl"
        self.restarts = restart_after_mask and schedule == "wl"
        # whether the steps before the mask are no part of the result, and come before the run's
        self.leads = not count_mask_steps and (self.restarts or schedule == "spa_only")
        self._settle(1, MASK_ROWS)  # until `plan` has the run's numbers
        self.step = 0
        self.folder: Path | None = None
        self.scores: dict[str, Scores] = {}
        # statistics of a mask that exists from the start, until they are logged
        self.first_mask_statistics: dict[str, float] | None = None
        self.live_optimizer: torch.optim.Optimizer | None = None

    def _settle(self, steps: int, rows: int) -> None:
        """Convert the settings to steps, for a result that trains `steps` steps of `rows` rows."""
        warmup, masked = self.asked
        if masked == "auto":
            masked = -(-MASK_ROWS // max(1, rows))
        elif isinstance(masked, float) and masked < 1:
            masked = max(1, round(masked * steps))
        warmup = round(warmup * steps) if 0 < warmup < 1 else int(warmup)
        self.planned = {"warmup_steps": warmup, "mask_steps": int(masked)}
        self.warmup_steps = warmup if self.reads_micro_batches else 0
        # the number of steps before the mask is chosen
        self.mask_step = warmup + int(masked) if self.reads_micro_batches else 0
        self.restart = self.mask_step if self.restarts or self.leads else 0

    def plan(self, steps: int, rows: int) -> int:
        self._settle(steps, rows)
        return self.mask_step if self.leads else 0

    def planned_settings(self) -> dict[str, Any]:
        collects = self.reads_micro_batches
        return {
            key: n for key, n in self.planned.items() if collects and (self.wl or "mask" in key)
        }

    def plan_text(self, steps: int) -> str | None:
        if not self.mask_step:
            return None
        rest = steps - self.mask_step
        if not rest:
            return f"all {steps} steps choose the mask, and none train with it"
        before = "" if self.restart else f"; the first {self.mask_step} of B A alone train it too"
        return f"{self.mask_step} steps choose the mask, {rest} train the result{before}"

    def plan_warnings(self, steps: int, rows: int) -> list[str]:
        warnings = []
        if self.restart and LONG * steps < self.mask_step < steps:
            warnings.append(
                f"{self.mask_step} of {steps} steps ({self.mask_step / steps:.0%}) choose the mask,"
                " more than a quarter: lower adapter.warmup_steps, of which the paper has 64, or"
                " train for longer"
            )
        seen = (self.mask_step - self.warmup_steps) * rows
        if self.mask_step and seen < MASK_ROWS:
            warnings.append(
                f"the mask is chosen from the gradients of {seen} rows (adapter.mask_steps="
                f"{self.mask_step - self.warmup_steps}), and fewer than {MASK_ROWS} choose other"
                " entries each time: set adapter.mask_steps=auto"
            )
        return warnings

    @property
    def only_prepares(self) -> bool:
        return 0 < self.step == self.mask_step

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
        if self.source not in ("gradient", "magnitude", "random", "decompose"):
            sizes = {name: ((d.o, d.i), len(d.indices)) for name, d in deltas.items()}
            masks = mask.load(Path(self.source), sizes)
            if next(model.parameters()).device.type != "meta":
                for name, layer in layers(model):
                    mask.refuse_outside(masks[name], layer.delta.surviving(layer.base), name)
            return masks
        if next(model.parameters()).device.type == "meta":
            return {}
        bases = {name: layer.base for name, layer in layers(model)}
        if self.source == "random":
            draw = torch.Generator().manual_seed(self.mask_seed)
            return {
                name: mask.random(d.o, d.i, len(d.indices), draw, d.surviving(bases[name]))
                for name, d in deltas.items()
            }
        if self.source == "decompose":
            return {
                name: mask.decompose(
                    float_weight(bases[name]),
                    len(d.indices),
                    self.fitted_rank,
                    name,
                    d.surviving(bases[name]),
                )
                for name, d in deltas.items()
            }
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
                layer.delta,
                self.scores_kind,
                self.score == "squared",
                name,
                partial(layer.delta.surviving, layer.base),
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
        groups: list[dict[str, Any]] = []
        if others:
            groups.append({"params": others, "lr_scale": 1.0, "part": "low_rank"})
        if sparse:
            groups.append(
                {
                    "params": sparse,
                    "lr_scale": self.sparse_lr_ratio,
                    "weight_decay": self.sparse_weight_decay,
                    "part": "sparse",
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
        low_rank: list[Any] = [
            layer.delta for _, layer in layers(model) if layer.delta.A is not None
        ]
        low_rank += [delta for _, layer in experts.layers(model) for delta in layer.deltas.values()]
        for delta in low_rank:
            A = torch.empty(delta.A.shape, dtype=delta.A.dtype)
            B = torch.empty(delta.B.shape, dtype=delta.B.dtype)
            lora.initialise(A, B, generator=draw)
            with torch.no_grad():
                delta.A.copy_(shards.shard_like(delta.A, A))
                delta.B.copy_(shards.shard_like(delta.B, B))
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
