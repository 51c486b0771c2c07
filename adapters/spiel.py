"""SpIEL: sparse fine-tuning whose support moves to the entries with large gradients (Ansell et al.
2024, arXiv 2401.16405).

    y = (W + S) x        S  k values at entries that are dropped and grown repeatedly

    Every reselection_steps steps, with p the share of k that is replaced:
      drop   the p k entries of smallest |value|
      grow   as many entries of largest score that are not in S, with value 0

    p      linear  1 the first time, since the first support is random,
                   then initial_rate (1 - step / steps)
           cosine  initial_rate (1 + cos(π step / steps)) / 2, always

    AG  score: |Σ g| over the previous accumulation_steps steps. It is only summed for candidates:
        the k entries whose gradient is largest in the first micro-batch of these steps. Adam's
        moments of a grown entry are set so that their bias correction gives the mean of g and of
        g². Each entry has its own age. Gradients of the window are not clipped, and the first
        support, which is random, has small ones. So the moments are multiplied by the factor (for
        g², its square) that clips the first step with the grown entries
    MA  score: r_i c_j of SM3's accumulators (Anil et al. 2019, arXiv 1901.11150), which take o + i
        numbers for each layer: ν = min(r_i, c_j) + g²,  r_i = max(r_i, ν),  c_j = max(c_j, ν)

An entry that is dropped and grown in the same step does not change. Weight decay is decoupled and
pulls S to zero, so W + S to the base.

Differs from the paper: an accumulation window is exactly accumulation_steps steps, from each
multiple of reselection_steps; the reference code opens it one micro-batch earlier. Σ g and Σ g² are
over whole steps, before clipping, summed over micro-batches and averaged over processes; the
reference code sums the micro-batches of one process. With several processes rank 0 chooses the
candidates, and the step that chooses them is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters import mask, shards
from adapters.delta import AdapterError, Start
from adapters.sparse import layers, sparse_values, supports
from adapters.sparse_adapter import SparseAdapter
from adapters.spiel_optimizers import SM3, SpielAdamW


class Candidates:
    """Sums of one layer's gradient over the steps of one window, at the entries that may grow."""

    def __init__(self, k: int, name: str, allowed: Callable[[], Tensor | None] = lambda: None):
        self.k, self.name = k, name
        self.allowed = allowed  # which entries may grow, (o·i,) bool; None: all
        self.flat: Tensor | None = None  # (k,) int32, sorted
        self.step_sum: Tensor | None = None  # of the current step
        self.g: Tensor | None = None  # Σ over steps
        self.g2: Tensor | None = None
        self.steps = 0
        self.agreed = False  # whether all ranks have the same candidates

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add one micro-batch. A gradient that is not finite is ignored."""
        gradient = (dy.t() @ x).float().view(-1)
        if not torch.isfinite(gradient).all():  # the product can overflow fp16 by itself
            return
        if self.flat is None:
            self.flat = mask.top(mask.among(gradient.abs(), self.allowed()), self.k, self.name)
            self.g = torch.zeros_like(gradient[: self.k])
            self.g2 = torch.zeros_like(self.g)
        at_candidates = gradient.index_select(0, self.flat)
        self.step_sum = at_candidates if self.step_sum is None else self.step_sum + at_candidates

    def end_step(self, loss_scale: float, device: torch.device) -> None:
        """Add the current step to the sums, with the scale that the optimiser sees."""
        ranks = mask.processes()
        if ranks > 1 and not self.agreed:
            self._agree(device)
            return
        if ranks > 1:
            if self.step_sum is None:
                self.step_sum = torch.zeros(self.k, device=device)
            torch.distributed.all_reduce(self.step_sum)
        if self.step_sum is None:
            return
        step = self.step_sum / (loss_scale * ranks)
        self.g += step  # type: ignore[assignment, operator]
        self.g2 += step.square()  # type: ignore[assignment, operator]
        self.steps += 1
        self.step_sum = None

    def _agree(self, device: torch.device) -> None:
        """Take the candidates of rank 0, if it has some."""
        no_candidates = torch.full((self.k,), -1, dtype=torch.int32, device=device)
        flat = no_candidates if self.flat is None else self.flat
        torch.distributed.broadcast(flat, 0)
        self.agreed = bool((flat >= 0).all())
        self.flat = flat if self.agreed else None
        self.g = torch.zeros(self.k, device=device)
        self.g2 = torch.zeros(self.k, device=device)
        self.step_sum = None

    def state(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint between two steps of a window."""
        return {key: getattr(self, key) for key in ("flat", "g", "g2", "steps", "agreed")}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a `state`."""
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, Tensor) else value)


class SpIEL(SparseAdapter):
    """SpIEL-AG and SpIEL-MA, and their quantised forms, on the linear layers of a model."""

    reads_micro_batches = True

    def __init__(
        self,
        variant: str,
        density: float,
        density_pattern: dict[str, float],
        weight_decay: float,
        reselection_steps: int,
        accumulation_steps: int,
        initial_rate: float,
        policy: str,
        momentum: float,
        support_seed: int,
        clip_moments: bool,
        target_modules: str | list[str],
        exclude_modules: list[str],
        gradient: str,
        sparse_dtype: str,
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
        self.train_modules = list(train_modules)
        if accumulation_steps >= reselection_steps:
            raise AdapterError(
                f"adapter.accumulation_steps={accumulation_steps} must be less than"
                f" adapter.reselection_steps={reselection_steps}"
            )
        if momentum and variant == "AG":
            raise AdapterError(
                f"adapter.momentum={momentum:g} is of variant=MA; AG has optimizer.betas"
            )
        self.selects_by_rank = variant == "AG"
        self.variant, self.weight_decay, self.momentum = variant, weight_decay, momentum
        self.every, self.window = reselection_steps, accumulation_steps
        self.initial_rate, self.policy, self.support_seed = initial_rate, policy, support_seed
        self.clip_moments = clip_moments
        # (k,) bool by layer: the grown entries, whose moments wait for the next step's clipping
        self.unclipped: dict[str, Tensor] = {}
        self.allowed: Tensor | None = None  # entries of the layer at hand that may grow; None: all
        self.step, self.steps = 0, 1
        self.first: dict[str, Tensor] = {}  # the supports after the first replacement, to report
        self.candidates: dict[str, Candidates] = {}
        self.live_optimizer: Any = None

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        self.steps = start.steps
        return super().attach(model, start)

    def begin(self, model: nn.Module, start: Start) -> None:
        draw = torch.Generator().manual_seed(self.support_seed)
        for _, layer in layers(model):
            delta: Any = layer.delta
            size = (delta.o, delta.i, len(delta.indices))
            support = mask.random(*size, draw, delta.surviving(layer.base))
            delta.set_support(support.to(delta.indices.device), layer.base)
        self._watch(model)

    def attach_continued(self, model: nn.Module, start: Start, state: dict[str, Any]) -> nn.Module:
        model = super().attach_continued(model, start, state)
        self._unwatch(model)
        self.step, self.first, self.unclipped = 0, {}, {}
        self._watch(model)
        return model

    def rate(self, step: int) -> float:
        """Return the share of the support that is replaced after `step` steps."""
        if self.policy == "cosine":
            return self.initial_rate * (1 + math.cos(math.pi * step / self.steps)) / 2
        return 1.0 if step == self.window else self.initial_rate * (1 - step / self.steps)

    def _watch(self, model: nn.Module) -> None:
        if self.variant != "AG" or self.step % self.every >= self.window:
            return
        for name, layer in layers(model):
            allowed = partial(layer.delta.surviving, layer.base)
            layer.delta.watch = self.candidates.setdefault(
                name, Candidates(len(layer.delta.indices), name, allowed)
            )

    def _unwatch(self, model: nn.Module) -> None:
        self.candidates.clear()
        for _, layer in layers(model):
            layer.delta.watch = None

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        # The values are those that the optimiser gets: FSDP2 has replaced the first ones by shards.
        self.owners: dict[Any, Any] = {
            layer.delta.values: layer.delta for _, layer in layers(model)
        }
        sparse = sparse_values(model)
        sparse_ids = {id(p) for p in sparse}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in sparse_ids]
        groups: list[dict[str, Any]] = [
            {"params": sparse, "lr_scale": 1.0, "weight_decay": self.weight_decay}
        ]
        return groups + ([{"params": others, "lr_scale": 1.0}] if others else [])

    def optimizer(self, groups: list[dict[str, Any]], make: Any) -> torch.optim.Optimizer:
        if getattr(make, "func", None) is not torch.optim.AdamW:
            name = getattr(getattr(make, "func", make), "__name__", make)
            raise AdapterError(
                f"adapter=spiel keeps an age for each entry, which {name} does not: set"
                " optimizer=adamw"
            )
        settings = {key: make.keywords[key] for key in ("lr", "eps", "weight_decay")}
        if self.variant == "AG":
            self.live_optimizer = SpielAdamW(
                groups, **settings, betas=tuple(make.keywords["betas"])
            )
        else:
            self.live_optimizer = SM3(
                groups, **settings, momentum=self.momentum, supports=self.owners
            )
        return self.live_optimizer

    def before_step(self, model: nn.Module, loss_scale: float) -> None:
        if self.candidates and self.window < 2 and mask.processes() > 1:
            raise AdapterError(
                "with several processes the first step of a window finds candidates: set"
                " adapter.accumulation_steps=2"
            )
        for candidates in self.candidates.values():
            candidates.end_step(loss_scale, next(model.parameters()).device)

    @torch.no_grad()
    def after_clipping(self, model: nn.Module, factor: Tensor) -> None:
        for name, layer in layers(model):
            if name not in self.unclipped:
                continue
            grown, state = self.unclipped.pop(name), self._moments(layer.delta)
            for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                moment, (start, end) = shards.local(state[key]), shards.bounds(state[key])
                clipped = moment * factor.to(moment) ** power
                moment.copy_(torch.where(grown[start:end], clipped, moment))

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        super().after_step(model, step)
        self.step = step
        metrics = None
        if step % self.every == self.window:
            metrics = self._reselect(model) if step < self.steps else None
            self._unwatch(model)
        self._watch(model)
        return metrics

    @torch.no_grad()
    def _reselect(self, model: nn.Module) -> dict[str, float]:
        rate, replaced, total, stayed = self.rate(self.step), 0, 0, 0
        for name, layer in layers(model):
            delta: Any = layer.delta
            state = self._moments(delta)
            # All ranks choose from all values, and get the same.
            moments = {key: shards.whole(tensor) for key, tensor in state.items()}
            values = shards.whole(delta.values)
            self.allowed = delta.surviving(layer.base)
            grown = self._grown(delta, values, self.candidates.get(name), rate, moments)
            delta.take_out(layer.base)
            changed = ~torch.isin(delta.indices, grown["flat"])
            for key in ("values", *state):
                tensor = delta.values if key == "values" else state[key]
                tensor.copy_(shards.shard_like(tensor, grown[key].to(tensor.dtype)))
            delta.set_support(grown["flat"], layer.base)
            if self.clip_moments and "exp_avg" in state:
                self.unclipped[name] = grown["new"]
            replaced, total = replaced + int(changed.sum()), total + len(changed)
            first = self.first.setdefault(name, delta.indices.clone())
            stayed += int(torch.isin(delta.indices, first).sum())
        mask.refuse_divergence(supports(model))
        return {
            "replaced": replaced,
            "replaced_share": replaced / total,
            "rate": rate,
            "still_of_first": stayed / total,
        }

    def _moments(self, delta: Any) -> dict[str, Tensor]:
        """Return the optimiser's vectors that move together with the values."""
        state = self.live_optimizer.state[delta.values]
        return {
            key: state[key] for key in ("exp_avg", "exp_avg_sq", "age", "momentum") if key in state
        }

    def _grown(
        self,
        delta: Any,
        values: Tensor,
        candidates: Candidates | None,
        rate: float,
        state: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the support after dropping and growing, sorted, with its values and moments."""
        n = int(len(delta.indices) * rate)
        order = torch.argsort(values.abs(), stable=True)  # smallest first
        dropped = torch.zeros_like(delta.indices, dtype=torch.bool)
        dropped[order[:n]] = True
        scored, scores = self._scores(delta, candidates, delta.indices[~dropped])
        best = torch.topk(scores, min(n, len(scored)), sorted=False).indices
        grown = scored[best]
        # entries that were dropped and grown do not change
        new = ~torch.isin(grown, delta.indices)
        dropped &= ~torch.isin(delta.indices, grown)
        keep = torch.ones_like(dropped)
        # drop only as many entries as can grow
        keep[order[dropped[order]][: int(new.sum())]] = False
        flat = torch.cat([delta.indices[keep], grown[new]])
        ascending = torch.argsort(flat)
        result = {"flat": flat[ascending]}
        fresh = self._fresh(candidates, grown[new], state)
        is_new = [torch.zeros_like(delta.indices[keep]), torch.ones_like(grown[new])]
        result["new"] = torch.cat(is_new).bool()[ascending]
        for key, tensor in {"values": values, **state}.items():
            result[key] = torch.cat([tensor[keep].to(fresh[key].dtype), fresh[key]])[ascending]
        return result

    def _scores(
        self, delta: Any, candidates: Candidates | None, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the entries that may grow, and their scores."""
        if self.variant == "AG":
            if candidates is None or candidates.flat is None or not candidates.steps:
                # no gradient was finite: nothing grows
                return delta.indices[:0], torch.zeros(0, device=delta.indices.device)
            free = ~torch.isin(candidates.flat, active)
            return candidates.flat[free], candidates.g[free].abs()  # type: ignore[index]
        state = self.live_optimizer.accumulators(delta.values)
        scores = torch.outer(state["rows"], state["columns"]).view(-1)
        scores = mask.among(scores, self.allowed)
        scores[active.long()] = -1.0
        best = torch.topk(
            scores, min(len(delta.indices), int((scores > 0).sum())), sorted=False
        ).indices
        return best.int(), scores[best]

    def _fresh(
        self, candidates: Candidates | None, grown: Tensor, state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return values and moments of grown entries. The bias correction of these moments gives
        the window's mean."""
        zeros = torch.zeros(len(grown), device=grown.device)
        fresh = {"values": zeros, **dict.fromkeys(state, zeros)}
        seeded = self.variant == "AG" and state and candidates is not None and candidates.steps
        if seeded and candidates is not None and candidates.flat is not None:
            at = torch.searchsorted(candidates.flat, grown)
            beta1, beta2 = self.live_optimizer.param_groups[0]["betas"]
            sums: Any = candidates
            g, g2, steps = sums.g[at], sums.g2[at], sums.steps
            fresh["exp_avg"] = g / steps * (1 - beta1**steps)
            fresh["exp_avg_sq"] = g2 / steps * (1 - beta2**steps)
            fresh["age"] = torch.full_like(zeros, float(steps))
        return fresh

    def state(self, model: nn.Module) -> dict[str, Any]:
        state = super().state(model)
        state["extra"] |= {
            "step": self.step,
            "steps": self.steps,
            "candidates": {name: sums.state() for name, sums in self.candidates.items()},
            "first": self.first,
            "unclipped": self.unclipped,
        }
        return state

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        super().load_state(model, state)
        extra, device = state["extra"], next(model.parameters()).device
        # A run that is extended keeps its planned schedule of replacements.
        self.step, self.steps = extra["step"], extra["steps"]
        self.first = {name: tensor.to(device) for name, tensor in extra["first"].items()}
        unclipped = extra.get("unclipped", {})
        self.unclipped = {name: tensor.to(device) for name, tensor in unclipped.items()}
        self._unwatch(model)
        self._watch(model)
        for name, saved in extra["candidates"].items():
            self.candidates[name].load_state(saved, device)
