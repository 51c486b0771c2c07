"""LoRA: a low-rank update of frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

    y = W x + s B A x        s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)

    W  (o, i)  frozen        A  (r, i)  uniform at the start        B  (o, r)  zero at the start, so y starts as W x

A and B keep their own dtype (fp32) and are cast to the activations' for the product: on a bf16 base this costs next to
nothing, where casting the activations to fp32 instead costs 17 % of a step. Saved in PEFT's own layout.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import io
from adapters.delta import Adapter, Delta, features


class LoRA(Delta):
    """The low-rank update of one linear layer."""

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float, dtype: torch.dtype):
        super().__init__()
        i, o = features(linear)
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, i, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(o, rank, device=device, dtype=dtype))
        start(self.A, self.B)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        # Under autocast the products are cast by it; y has the dtype in which the frozen product was computed.
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        low: Tensor = F.linear(x, self.A.to(y.dtype))
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), self.B.to(y.dtype).t(), alpha=self.scale)
        return flat.view(y.shape)

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return w + self.scale * (self.B.to(w.dtype) @ self.A.to(w.dtype))


def start(A: Tensor, B: Tensor, generator: torch.Generator | None = None) -> None:
    """Put A and B where they start, in place."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # as nn.Linear, and as PEFT
    nn.init.zeros_(B)


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """s of the module's text."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRAAdapter(Adapter):
    """LoRA, rsLoRA and LoRA+ on the linear layers of a model."""

    def __init__(
        self,
        rank: int,
        alpha: float,
        rslora: bool,
        dropout: float,
        target_modules: str | list[str],
        exclude_modules: list[str],
        lr_ratio: float,
        dtype: str,
    ):
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.target_modules, self.exclude_modules, self.lr_ratio = target_modules, list(exclude_modules), lr_ratio
        self.dtype = getattr(torch, dtype)

    def make(self, linear: nn.Module) -> LoRA:
        return LoRA(linear, self.rank, scaling(self.rank, self.alpha, self.rslora), self.dropout, self.dtype)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns lr_ratio times as fast as A.
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fast = [p for name, p in trained.items() if name.endswith(".delta.B")]
        slow = [p for name, p in trained.items() if not name.endswith(".delta.B")]
        if self.lr_ratio == 1.0:
            return [{"params": list(trained.values()), "lr_scale": 1.0}]
        return [{"params": slow, "lr_scale": 1.0}, {"params": fast, "lr_scale": self.lr_ratio}]

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        from peft import LoraConfig

        tensors, names, fan_in_fan_out = io.delta_tensors(
            model, lambda delta: {"lora_A.weight": delta.A, "lora_B.weight": delta.B}
        )
        heads = io.trained_modules(model)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules=names,
            modules_to_save=heads or None,
            fan_in_fan_out=fan_in_fan_out,
            base_model_name_or_path=base_name,
            task_type=task_type,  # type: ignore[arg-type]
            inference_mode=True,
        )
        io.write(folder, config, tensors | io.module_tensors(model, heads))
