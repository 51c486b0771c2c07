"""LoRA: a low-rank update of frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

    y = W x + s B A x        s = alpha / r
                             s = alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)

    W  (o, i)  frozen
    A  (r, i)  uniform at the start
    B  (o, r)  zero at the start, so y starts as W x

A and B keep their dtype (fp32) and are cast to the activations' dtype for the product. On a bf16
base this costs almost nothing. Casting the activations to fp32 instead costs 17 % of a step. The
adapter is saved in PEFT's layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import experts, io, over_quantised, stock, trained_copies
from adapters.delta import Delta, Start, copy_tensors, saved_for_backward
from adapters.linear import features, not_a_view
from adapters.over_quantised import OverQuantised

LOW_RANK = ("lora_A.weight", "lora_B.weight")  # PEFT's keys of A and B
VARIANTS = ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")


class LoRA(Delta):
    """The low-rank update of one linear layer."""

    def __init__(
        self,
        linear: Any,
        rank: int,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
        fused: bool = True,
    ):
        super().__init__()
        i, o = features(linear)
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, i, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(o, rank, device=device, dtype=dtype))
        initialise(self.A, self.B)
        self.scale = scale
        self.dropout = dropout
        self.fused = fused

    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """Return A and B as they are used. Methods that compute them override this."""
        return self.A, self.B

    def linear(self, base: Any, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if (
            self.fused
            and type(base) is nn.Linear
            and not base.weight.requires_grad
            and not (self.dropout and self.training)
        ):
            dtype = (
                torch.get_autocast_dtype(x.device.type)
                if torch.is_autocast_enabled(x.device.type)
                else base.weight.dtype
            )
            with torch.autocast(x.device.type, enabled=False):
                return _Linear.apply(
                    x,
                    base.weight,
                    base.bias,
                    *self.factors(),
                    self.scale,
                    dtype,
                    *saved_for_backward(x),
                )
        if (
            self.fused
            and over_quantised.supports(base)
            and not (self.dropout and self.training)
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return OverQuantised.apply(x, *self.factors(), base, self.scale, *saved_for_backward(x))
        return super().linear(base, x)

    def forward(self, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        # y has the dtype of the frozen product, which autocast may have chosen.
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        A, B = self.factors()
        low: Tensor = F.linear(x, A.to(y.dtype))
        flat = torch.addmm(
            y.reshape(-1, y.shape[-1]),
            low.reshape(-1, low.shape[-1]),
            B.to(y.dtype).t(),
            alpha=self.scale,
        )
        return flat.view(y.shape)

    def weight(self, w: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        A, B = self.factors()
        return w + self.scale * (B.to(w.dtype) @ A.to(w.dtype))


class _Linear(torch.autograd.Function):
    """A frozen linear layer with its update, as one operation.

    Forward    y = x Wᵀ + b + s (x Aᵀ) Bᵀ
    Backward   l = s dy B        dx = dy W + l A        dA = lᵀ x        dB = s dyᵀ (x Aᵀ)
    Shapes     x (*b, i), W (o, i), b (o,), A (r, i), B (o, r)
    Dtypes     products in `dtype`; dA and dB in A's and B's
    Notes      x is saved, or the tensors that recompute it. Sums are computed in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dtype: torch.dtype,
        recompute: Any,
        *sources: Tensor,
    ) -> Tensor:
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        y = F.linear(flat, W.to(dtype), bias.to(dtype) if bias is not None else None)
        low = F.linear(flat, A.to(dtype))
        y.addmm_(low, B.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(W, A, B, low, *(sources if recompute is not None else (flat,)))
        ctx.scale, ctx.dtype, ctx.recompute = scale, dtype, recompute
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        return not_a_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, A, B, low, *sources = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        dx = dA = dB = None
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.to(dtype).reshape(-1, dy.shape[-1])
            dlow = (dy @ B.to(dtype)).mul_(ctx.scale)
            if ctx.needs_input_grad[0]:
                dx = (dy @ W.to(dtype)).addmm_(dlow, A.to(dtype))
                dx = dx.view(ctx.shape).to(ctx.input_dtype)
            if ctx.needs_input_grad[3]:
                flat = (
                    sources[0]
                    if ctx.recompute is None
                    else ctx.recompute(*sources).to(dtype).reshape(-1, ctx.shape[-1])
                )
                dA = (dlow.t() @ flat).to(A.dtype)
            if ctx.needs_input_grad[4]:
                dB = (dy.t() @ low).mul_(ctx.scale).to(B.dtype)
        return dx, None, None, dA, dB, None, None, None, *(None for _ in sources)


def initialise(A: Tensor, B: Tensor, generator: torch.Generator | None = None) -> None:
    """Set A and B to their values at the start, in place."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # as nn.Linear, and as PEFT
    nn.init.zeros_(B)


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """Return s of the module's docstring."""
    return alpha / (math.sqrt(rank) if rslora else rank)


FAST = ".B"


class LoRAAdapter(experts.UpdatesExperts):
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
        fused: bool,
        target_parameters: str | list[str],
        train_modules: Sequence[str],
    ):
        self.fused, self.train_modules = fused, list(train_modules)
        self.target_parameters = target_parameters
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.target_modules, self.exclude_modules = target_modules, list(exclude_modules)
        self.lr_ratio, self.dtype = lr_ratio, getattr(torch, dtype)

    def make(self, linear: nn.Module) -> LoRA:
        scale = scaling(self.rank, self.alpha, self.rslora)
        return LoRA(linear, self.rank, scale, self.dropout, self.dtype, self.fused)

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        model = super().attach(model, start)
        scale = scaling(self.rank, self.alpha, self.rslora)
        experts.attach(model, self.target_parameters, self.rank, scale, self.dtype)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns lr_ratio times as fast as A.
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fast = [p for name, p in trained.items() if name.endswith(FAST)]
        slow = [p for name, p in trained.items() if not name.endswith(FAST)]
        if self.lr_ratio == 1.0:
            return [{"params": list(trained.values()), "lr_scale": 1.0}]
        return [{"params": slow, "lr_scale": 1.0}, {"params": fast, "lr_scale": self.lr_ratio}]

    def stock_faults(self, settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
        if stored.get("peft_type") != "LORA":
            return [f"adapter=lora here, peft_type={stored.get('peft_type')} there"]
        names = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora"}
        # variants that compute something else, and patterns; initialisations do not matter
        others = {"rank_pattern", "alpha_pattern", "lora_bias", *VARIANTS}
        others |= {key for key in stored if key.startswith("use_") and key != "use_rslora"}
        return [
            *stock.differences(settings, stored, names),
            *stock.differences({}, stored, {key: key for key in sorted(others)}),
        ]

    def _stock_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the live tensors under PEFT's keys."""
        tensors, _, _ = io.delta_tensors(
            model,
            lambda delta: dict(zip(LOW_RANK, delta.factors(), strict=True)),
        )
        tensors |= experts.stock_tensors(model, io.PREFIX)[0]
        heads = io.trained_modules(model, rows=False)
        return tensors | io.token_rows(model)[1] | io.module_tensors(model, heads)

    def load_stock_folder(self, model: nn.Module, folder: Path) -> None:
        live = {key: tensor.detach() for key, tensor in self._stock_tensors(model).items()}
        copy_tensors(live, stock.read_tensors(folder, live))

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Return the fields of PEFT's LoraConfig that hold the ranks."""
        return {"r": self.rank}

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        from peft import LoraConfig

        _, names, fan_in_fan_out = io.delta_tensors(model, lambda _: {})
        _, of_experts = experts.stock_tensors(model, io.PREFIX)
        heads = io.trained_modules(model, rows=False)
        tokens, _ = io.token_rows(model)
        config = LoraConfig(
            **self.config_fields(model),
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            use_rslora=self.rslora,
            **io.lora_fields(model, names, self.dropout, of_experts),
            modules_to_save=heads or None,
            trainable_token_indices=tokens or None,
            ensure_weight_tying=trained_copies.ties(model, heads),
            fan_in_fan_out=fan_in_fan_out,
            base_model_name_or_path=base_name,
            task_type=task_type,  # type: ignore[arg-type]
            inference_mode=True,
        )
        io.write(folder, config, self._stock_tensors(model))
