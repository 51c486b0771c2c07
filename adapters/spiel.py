"""SpIEL: sparse fine-tuning whose support moves to where the gradient is (Ansell et al. 2024, arXiv
2401.16405).

    y = (W + S) x        S  k values at entries that are dropped and grown again and again

    every reselection_steps steps, p the share of k that is replaced:
      drop   the p k entries of smallest |value|
      grow   as many of largest score among those that are not in S, with value 0

    p      linear  1 the first time, since the first support is random, then initial_rate (1 - step / steps)
           cosine  initial_rate (1 + cos(π step / steps)) / 2, always

    AG  score: |Σ g| over the accumulation_steps steps before, kept for candidates only: the k
    entries whose gradient is
        largest in the first micro-batch of them. Adam's moments of a grown entry are what its bias
        correction turns into the mean of g and of g², and every entry has an age of its own.
    MA  score: r_i c_j of SM3's accumulators (Anil et al. 2019, arXiv 1901.11150), which take o + i
    numbers for each layer:
        ν = min(r_i, c_j) + g²,  r_i = max(r_i, ν),  c_j = max(c_j, ν)

An entry that is dropped and grown at once stays as it was. Weight decay is decoupled and pulls S,
so W + S, back to the base.

A window of accumulation is exactly accumulation_steps steps, from each multiple of
reselection_steps; the reference code opens it one micro-batch earlier. Σ g and Σ g² are over whole
steps, before clipping, summed over micro-batches and averaged over processes; the reference sums
micro-batches of one process. With several processes the candidates are the first one's, and the
step that finds them is not counted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adapters import mask
from adapters.delta import AdapterError, Start
from adapters.sparse import SparseAdapter, SparseDelta, layers, sparse_values, supports


class Candidates:
    """Sums of one layer's gradient at the entries that may grow, over the steps of one window."""

    def __init__(self, k: int, name: str):
        self.k, self.name = k, name
        self.flat: Tensor | None = None  # (k,) int32, sorted
        self.step_sum: Tensor | None = None  # of the step at hand
        self.g: Tensor | None = None  # Σ over steps
        self.g2: Tensor | None = None
        self.steps = 0
        self.agreed = False  # whether all processes have the same candidates

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Take in one micro-batch; one that is not finite counts for nothing."""
        gradient = (dy.t() @ x).float().view(-1)
        if not torch.isfinite(gradient).all():  # also where only the product is too large for fp16
            return
        if self.flat is None:
            self.flat = mask.top(gradient.abs(), self.k, self.name)
            self.g, self.g2 = (
                torch.zeros_like(gradient[: self.k]),
                torch.zeros_like(gradient[: self.k]),
            )
        found = gradient.index_select(0, self.flat)
        self.step_sum = found if self.step_sum is None else self.step_sum + found

    def end_step(self, loss_scale: float, device: torch.device) -> None:
        """Add the step at hand to the sums, as the optimiser sees it."""
        ranks = mask.processes()
        if ranks > 1 and not self.agreed:
            self._agree(device)
            return
        if ranks > 1:
            self.step_sum = (
                torch.zeros(self.k, device=device) if self.step_sum is None else self.step_sum
            )
            torch.distributed.all_reduce(self.step_sum)
        if self.step_sum is None:
            return
        step = self.step_sum / (loss_scale * ranks)
        self.g += step  # type: ignore[assignment, operator]
        self.g2 += step.square()  # type: ignore[assignment, operator]
        self.steps += 1
        self.step_sum = None

    def _agree(self, device: torch.device) -> None:
        none = torch.full((self.k,), -1, dtype=torch.int32, device=device)
        flat = none if self.flat is None else self.flat
        torch.distributed.broadcast(flat, 0)
        self.agreed = bool((flat >= 0).all())
        self.flat = flat if self.agreed else None
        self.g, self.g2, self.step_sum = (
            torch.zeros(self.k, device=device),
            torch.zeros(self.k, device=device),
            None,
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two steps of a window."""
        return {key: getattr(self, key) for key in ("flat", "g", "g2", "steps", "agreed")}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a `state`."""
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, Tensor) else value)


class Fp32State(torch.optim.Optimizer):
    """Keeps a loaded state in fp32: torch casts it to the parameters' dtype, in which an age would
    stop at 256."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for p, name in zip(parameters, names, strict=True):
            if name in state_dict["state"]:
                self.state[p] = {
                    key: tensor.to(p.device, copy=True)
                    for key, tensor in state_dict["state"][name].items()
                }


class SpielAdamW(Fp32State):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with an age for each entry, by which its
    moments are corrected.

    With equal ages it is torch.optim.AdamW. The moments and ages are fp32: in bf16 an age would
    stop at 256.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all entries that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {
                        key: torch.zeros_like(p, dtype=torch.float32)
                        for key in ("exp_avg", "exp_avg_sq", "age")
                    }
                grad, m, v, age = (
                    p.grad.float(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["age"],
                )
                age += 1
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                right = (v / (1 - beta2**age)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((group["lr"] * m / (1 - beta1**age) / right).to(p.dtype))
        return loss


class SM3(Fp32State):
    """SM3-II (Anil et al. 2019, arXiv 1901.11150): second moments by row and column, which only
    grow.

    `supports` gives a sparse delta's vector of values its rows and columns; other matrices have
    their own, and other vectors one number for each entry.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        eps: float,
        weight_decay: float,
        supports: dict[nn.Parameter, SparseDelta],
    ):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        )
        self.supports = supports

    def accumulators(self, p: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, made when it is first asked for."""
        state = self.state[p]
        if not state:
            delta = self.supports.get(p)
            o, i = (delta.o, delta.i) if delta is not None else (p.shape[0], p[0].numel())
            state["rows"] = torch.zeros(o, dtype=torch.float32, device=p.device)
            state["columns"] = torch.zeros(i, dtype=torch.float32, device=p.device)
            if self.defaults["momentum"]:
                state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all entries that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.accumulators(p), p.grad.float().flatten()
                r, c = state["rows"], state["columns"]
                delta = self.supports.get(p)
                flat = (
                    delta.indices.long()
                    if delta is not None
                    else torch.arange(p.numel(), device=p.device)
                )
                row, column = flat // len(c), flat % len(c)
                least = (
                    r[row] if p.ndim == 1 and delta is None else torch.minimum(r[row], c[column])
                )
                nu = least + grad.square()
                r.scatter_reduce_(0, row, nu, "amax")
                c.scatter_reduce_(0, column, nu, "amax")
                update = grad / (nu + group["eps"]).sqrt()
                if group["momentum"]:
                    update = state["momentum"].flatten().lerp_(update, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((group["lr"] * update).view(p.shape).to(p.dtype))
        return loss


class SpIEL(SparseAdapter):
    """SpIEL-AG and SpIEL-MA, and their quantised forms, on the linear layers of a model."""

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
        target_modules: str | list[str],
        exclude_modules: list[str],
        gradient: str,
        sparse_dtype: str,
    ):
        super().__init__(
            density, density_pattern, target_modules, exclude_modules, gradient, sparse_dtype
        )
        if accumulation_steps >= reselection_steps:
            raise AdapterError(
                f"adapter.accumulation_steps={accumulation_steps} must be less than"
                f" adapter.reselection_steps={reselection_steps}"
            )
        if momentum and variant == "AG":
            raise AdapterError(
                f"adapter.momentum={momentum:g} is of variant=MA; AG has optimizer.betas"
            )
        self.variant, self.weight_decay, self.momentum = variant, weight_decay, momentum
        self.every, self.window = reselection_steps, accumulation_steps
        self.initial_rate, self.policy, self.support_seed = initial_rate, policy, support_seed
        self.step, self.steps = 0, 1
        # the supports after the first replacement, from which the present ones have moved
        self.first: dict[str, Tensor] = {}
        self.candidates: dict[str, Candidates] = {}
        self.live_optimizer: Any = None

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        self.steps = start.steps
        model = super().attach(model, start)
        self.owners: dict[Any, Any] = {
            layer.delta.values: layer.delta for _, layer in layers(model)
        }
        return model

    def begin(self, model: nn.Module, start: Start) -> None:
        draw = torch.Generator().manual_seed(self.support_seed)
        for _, layer in layers(model):
            delta: Any = layer.delta
            delta.settle(
                mask.random(delta.o, delta.i, len(delta.indices), draw).to(delta.indices.device),
                layer.base,
            )
        self._watch(model)

    def rate(self, step: int) -> float:
        """The share of the support that is replaced after `step` steps."""
        if self.policy == "cosine":
            return self.initial_rate * (1 + math.cos(math.pi * step / self.steps)) / 2
        return 1.0 if step == self.window else self.initial_rate * (1 - step / self.steps)

    def _watch(self, model: nn.Module) -> None:
        if self.variant != "AG" or self.step % self.every >= self.window:
            return
        for name, layer in layers(model):
            found = self.candidates.setdefault(name, Candidates(len(layer.delta.indices), name))
            layer.delta.watch = found

    def _unwatch(self, model: nn.Module) -> None:
        self.candidates.clear()
        for _, layer in layers(model):
            layer.delta.watch = None

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        sparse = sparse_values(model)
        apart = {id(p) for p in sparse}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
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
        for found in self.candidates.values():
            found.end_step(loss_scale, next(model.parameters()).device)

    def after_step(self, model: nn.Module, step: int) -> dict[str, float] | None:
        super().after_step(model, step)
        self.step = step
        news = None
        if step % self.every == self.window:
            news = self._reselect(model) if step < self.steps else None
            self._unwatch(model)
        self._watch(model)
        return news

    @torch.no_grad()
    def _reselect(self, model: nn.Module) -> dict[str, float]:
        rate, replaced, total, stayed = self.rate(self.step), 0, 0, 0
        for name, layer in layers(model):
            delta: Any = layer.delta
            state = self._moments(delta)
            grown = self._grown(delta, self.candidates.get(name), rate, state)
            delta.release(layer.base)
            changed = ~torch.isin(delta.indices, grown["flat"])
            for key in ("values", *state):
                tensor = delta.values if key == "values" else state[key]
                tensor.copy_(grown[key].to(tensor.dtype))
            delta.settle(grown["flat"], layer.base)
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
        """The optimiser's vectors that go along with the values."""
        state = self.live_optimizer.state[delta.values]
        return {
            key: state[key] for key in ("exp_avg", "exp_avg_sq", "age", "momentum") if key in state
        }

    def _grown(
        self, delta: Any, found: Candidates | None, rate: float, state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The support after dropping and growing, sorted, with its values and moments."""
        n = int(len(delta.indices) * rate)
        order = torch.argsort(delta.values.abs(), stable=True)  # smallest first
        dropped = torch.zeros_like(delta.indices, dtype=torch.bool)
        dropped[order[:n]] = True
        scored, scores = self._scores(delta, found, delta.indices[~dropped])
        best = torch.topk(scores, min(n, len(scored)), sorted=False).indices
        grown = scored[best]
        # the others were dropped and grown at once: as they were
        new = ~torch.isin(grown, delta.indices)
        dropped &= ~torch.isin(delta.indices, grown)
        keep = torch.ones_like(dropped)
        # as many leave as enter, also where few can grow
        keep[order[dropped[order]][: int(new.sum())]] = False
        flat = torch.cat([delta.indices[keep], grown[new]])
        by_place = torch.argsort(flat)
        result = {"flat": flat[by_place]}
        fresh = self._fresh(found, grown[new], state)
        for key, tensor in {"values": delta.values.detach(), **state}.items():
            result[key] = torch.cat([tensor[keep].to(fresh[key].dtype), fresh[key]])[by_place]
        return result

    def _scores(
        self, delta: Any, found: Candidates | None, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Entries that may grow, and their scores."""
        if self.variant == "AG":
            if found is None or found.flat is None or found.g is None or not found.steps:
                # no finite gradient was seen: nothing moves
                return delta.indices[:0], delta.values.detach()[:0].float()
            free = ~torch.isin(found.flat, active)
            return found.flat[free], found.g[free].abs()
        state = self.live_optimizer.accumulators(delta.values)
        scores = torch.outer(state["rows"], state["columns"]).view(-1)
        scores[active.long()] = -1.0
        best = torch.topk(
            scores, min(len(delta.indices), int((scores > 0).sum())), sorted=False
        ).indices
        return best.int(), scores[best]

    def _fresh(
        self, found: Candidates | None, grown: Tensor, state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Values and moments of grown entries. Corrected for its bias, a seeded moment is the
        window's mean."""
        zeros = torch.zeros(len(grown), device=grown.device)
        fresh = {"values": zeros, **dict.fromkeys(state, zeros)}
        if (
            self.variant == "AG"
            and state
            and found is not None
            and found.flat is not None
            and found.steps
        ):
            at = torch.searchsorted(found.flat, grown)
            beta1, beta2 = self.live_optimizer.param_groups[0]["betas"]
            steps = found.steps
            fresh["exp_avg"] = found.g[at] / steps * (1 - beta1**steps)  # type: ignore[index]
            fresh["exp_avg_sq"] = found.g2[at] / steps * (1 - beta2**steps)  # type: ignore[index]
            fresh["age"] = torch.full_like(zeros, float(steps))
        return fresh

    def state(self, model: nn.Module) -> dict[str, Any]:
        state = super().state(model)
        found = {name: candidates.state() for name, candidates in self.candidates.items()}
        state["extra"] |= {
            "step": self.step,
            "steps": self.steps,
            "candidates": found,
            "first": self.first,
        }
        return state

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        super().load_state(model, state)
        extra, device = state["extra"], next(model.parameters()).device
        # A run that is made longer keeps to the replacements that it was planned with.
        self.step, self.steps = extra["step"], extra["steps"]
        self.first = {name: tensor.to(device) for name, tensor in extra["first"].items()}
        self._unwatch(model)
        self._watch(model)
        for name, saved in extra["candidates"].items():
            self.candidates[name].load_state(saved, device)
