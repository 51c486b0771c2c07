"""SpIEL's optimisers: AdamW with an age for each entry, and SM3."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adapters import shards
from adapters.sparse import SparseDelta


class Fp32State(torch.optim.Optimizer):
    """Keeps a loaded state in fp32. torch would cast it to the parameters' dtype, and in bf16 an
    age would stop at 256."""

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
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with an age for each entry, which
    corrects the bias of its moments.

    With equal ages it is torch.optim.AdamW. The moments and ages are fp32, since in bf16 an age
    would stop at 256.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
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
                m, v, age = (shards.local(state[key]) for key in ("exp_avg", "exp_avg_sq", "age"))
                own, grad = shards.local(p), shards.local(p.grad).float()
                age += 1
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (v / (1 - beta2**age)).sqrt_().add_(group["eps"])
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.sub_((group["lr"] * m / (1 - beta1**age) / denominator).to(p.dtype))
        return loss


class SM3(Fp32State):
    """SM3-II (Anil et al. 2019, arXiv 1901.11150): second moments by row and column, which only
    grow.

    `supports` maps the values of a sparse delta to the delta, which has their rows and columns.
    Other matrices use their own rows and columns, and other vectors have one number for each entry.
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
        """Return the state of a parameter, created on first use."""
        state = self.state[p]
        if not state:
            delta = self.supports.get(p)
            o, i = (delta.o, delta.i) if delta is not None else (p.shape[0], p[0].numel())
            state["rows"] = torch.zeros(o, dtype=torch.float32, device=p.device)
            state["columns"] = torch.zeros(i, dtype=torch.float32, device=p.device)
            if self.defaults["momentum"]:
                state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            # A sum over rows can have as many entries as a support, and look like one of its
            # moments, of which each rank holds a share.
            state |= {key: shards.whole(state[key]) for key in ("rows", "columns") if key in state}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.accumulators(p), shards.local(p.grad).float().flatten()
                r, c = state["rows"], state["columns"]
                delta = self.supports.get(p)
                start, end = shards.bounds(p)
                flat = (
                    delta.indices[start:end].long()
                    if delta is not None
                    else torch.arange(start, end, device=p.device)
                )
                row, column = flat // len(c), flat % len(c)
                least = (
                    r[row] if p.ndim == 1 and delta is None else torch.minimum(r[row], c[column])
                )
                nu = least + grad.square()
                r.scatter_reduce_(0, row, nu, "amax")
                c.scatter_reduce_(0, column, nu, "amax")
                if isinstance(p, DTensor):  # rows and columns are those of all ranks' shards
                    for accumulator in (r, c):
                        torch.distributed.all_reduce(accumulator, torch.distributed.ReduceOp.MAX)
                update = grad / (nu + group["eps"]).sqrt()
                if group["momentum"]:
                    momentum = shards.local(state["momentum"]).view(-1)
                    update = momentum.lerp_(update, 1 - group["momentum"])
                own = shards.local(p)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.sub_((group["lr"] * update).view(own.shape).to(p.dtype))
        return loss
