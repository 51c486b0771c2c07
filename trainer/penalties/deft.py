"""density-DEFT: fewer active neurons in the MLPs, by a penalty on a smooth count of them (Runwal et
al., arXiv 2402.01911).

    D_l = mean over tokens t and neurons f of q(a_l[t, f])        L = L_task + weight · Σ_l w_l D_l

a_l (B, T, F) is what the down projection of layer l is given: the activations of a plain MLP, and
gate times up of a gated one. q
goes from 0 at 0 to 1 far from it. Its scale is tau, where eps = tau²:

    rational   q = a² / (a² + tau²)      as the authors' code has it, where eps is 1e-7, and 20 for prompt tuning
    tanh       q = tanh(|a| / tau)       the smooth step tanh(beta |a|) of earlier work on activation sparsity, with beta = 1 / tau.
                                         That this is the equation in the paper's text is
                                         unverified; its code does not have it

Layer weights w_l sum to 1. `uniform` is the paper's mean. `adaptive` is this project's: w_l is
proportional to the layer's density, smoothed over steps, so a step goes down the slope of ½ Σ D_l²
(scaled by Σ D_l): dense layers are pushed, and those that are sparse already are left to the task.
It is not ADA-DEFT, whose learned weights are unpublished, and skips no MLP.

Other than in the authors' code: padding and virtual tokens are not counted; every real token of a
micro-batch counts the same, however rows are packed; encoder and decoder share one mean; the gate's
branch alone is never measured. `eps: auto` sets tau to the layer's median |a| at the start, since
1e-7 sees nothing of a SiLU, whose activations are hardly ever that near 0.

The name says density since PEFT's DeftConfig is another method.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.models.base import BaseError

# Ends of names of down projections, as transformers has them.
_DOWN = re.compile(
    r"(.*\.)?("
    # Llama, Mistral, Qwen, Gemma, Phi-3, Granite, OLMo, Cohere, StableLM, Nemotron, MPT
    r"down_proj"
    # GPT-2, GPT-Neo, StarCoder; Phi; GPT-J, CodeGen; NeoX, Falcon, Bloom; ModernBERT
    r"|mlp\.(c_proj|fc2|fc_out|dense_4h_to_h|w[o2]|Wo)"
    r"|(feed_forward|ffn)\.(w2|lin2)|ffns\.\d+\.lin2"  # LFM2, InternLM; DistilBERT, XLM
    r"|layers\.\d+\.fc2"  # OPT, BART, XGLM
    r"|DenseReluDense\.wo"  # T5
    r"|ffn_output"  # ALBERT
    r")"
)
_CHUNK = 1 << 22  # activations that are looked at in fp32 at one time
_SAMPLES = 1 << 16  # activations of a layer and micro-batch that a median is taken of
_MEMORY = 0.9  # of a layer's smoothed density, per step


class PenaltyError(BaseError):
    """The penalty does not fit the model. The message says why, and how to mend it."""


def mlp_inputs(model: nn.Module, modules: str | list[str] = "auto") -> list[tuple[str, nn.Module]]:
    """(name, module) of the down projections, whose input is measured; with an adapter on one, the
    module that wraps it.

    `modules` is auto, or a list of names' ends.

    Raises:
        PenaltyError: there is none, or an entry matches none, or the MLPs are experts, which see
        some of the tokens only.
    """
    named = dict(model.named_modules())
    linears = [(name, module) for name, module in named.items() if _is_linear(module)]
    if modules == "auto":
        if any(name.rpartition(".")[2] == "experts" for name in named):
            raise PenaltyError(
                "penalty=deft: this model is a mixture of experts, each of which sees some of the"
                " tokens only, and their density is not measured. Set penalty=none, or name the"
                " down projections that see all tokens: penalty.modules=[...]"
            )
        found = [
            (name, module)
            for name, module in linears
            if _DOWN.fullmatch(name) or _bert_like(name, named)
        ]
    else:
        for end in modules:
            if not any(_ends(name, end) for name, _ in linears):
                raise PenaltyError(
                    f"penalty.modules has {end!r}, which matches no linear layer."
                    f" {_choices(linears)}"
                )
        found = [
            (name, module) for name, module in linears if any(_ends(name, end) for end in modules)
        ]
    if not found:
        raise PenaltyError(
            "penalty=deft finds no MLP in this model: none of its linear layers has the name of a"
            f" down projection. Name them, as in penalty.modules=[down_proj]. {_choices(linears)}"
        )
    return found


def _bert_like(name: str, named: dict[str, nn.Module]) -> bool:
    """BERT's `layer.0.output.dense`, not `layer.0.attention.output.dense`: its layer has an
    `intermediate` too."""
    layer, dot, end = name.rpartition("output.dense")
    return dot != "" and end == "" and f"{layer}intermediate" in named


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or an adapter around one."""
    inner: Any = module
    while isinstance(inner, nn.Module) and not isinstance(inner, nn.Linear | Conv1D):
        # ours, or PEFT's
        inner = getattr(inner, "base", None) or getattr(inner, "base_layer", None)
    return inner is not None


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _choices(linears: list[tuple[str, nn.Module]]) -> str:
    names = dict.fromkeys(re.sub(r"^.*?\.\d+\.|^.*\.(?=\w+$)", "", name) for name, _ in linears)
    return "The model's linear layers: " + ", ".join(itertools.islice(names, 40))


def rational(a: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(q, dq/da) of q = a² / (a² + tau²)."""
    x = a / tau
    below = 1 / (1 + x * x)
    return x * x * below, x * below * below * (2 / tau)


def tanh(a: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(q, dq/da) of q = tanh(|a| / tau); the slope at 0 is taken as 0."""
    q = torch.tanh(a.abs() / tau)
    return q, a.sign() * (1 - q * q) / tau


FORMS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "rational": rational,
    "tanh": tanh,
}


class _Density(torch.autograd.Function):
    """Σ_t weight_t mean_f q(a[t, f]).

    Forward: chunk by chunk in fp32 (float64 stays). Backward: weight_t q'(a[t, f]) / F, computed
    anew from a.
    Shapes: a (N, F), weights (N,); returns a scalar in fp32 or float64.
    Notes: saves a and the weights, nothing of a's size besides. No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, weights: Tensor, form: str, tau: float) -> Tensor:
        ctx.save_for_backward(a, weights)
        ctx.form, ctx.tau = form, tau
        total = weights.new_zeros(())
        for rows in _chunks(a):
            q, _ = FORMS[form](a[rows].to(weights.dtype), tau)
            total += torch.dot(q.mean(-1), weights[rows])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, weights = ctx.saved_tensors
        grad_a = torch.empty_like(a)
        for rows in _chunks(a):
            _, slope = FORMS[ctx.form](a[rows].to(weights.dtype), ctx.tau)
            grad_a[rows] = slope * (weights[rows] * (grad / a.shape[1])).unsqueeze(1)
        return grad_a, None, None, None


def _chunks(a: Tensor) -> list[slice]:
    step = max(1, _CHUNK // a.shape[1])
    return [slice(start, start + step) for start in range(0, len(a), step)]


def density(
    a: Float[Tensor, "B T F"], real: Bool[Tensor, "B T"], form: str, tau: float
) -> Float[Tensor, ""]:
    """Mean of q over the real tokens and all neurons; 0 where no token is real."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    weights = real.to(dtype) / real.sum().clamp(min=1)
    return _Density.apply(a.reshape(-1, a.shape[-1]), weights.reshape(-1), form, tau)


def own_tokens(a: Tensor, real: Bool[Tensor, "B T"]) -> Float[Tensor, "B T F"]:
    """The activations of a batch's own tokens: rows apart where the model has merged them (OPT),
    virtual tokens left out.

    Raises:
        PenaltyError: the layer was not given all tokens of the batch.
    """
    rows, length = real.shape
    if a.ndim == 2 and len(a) % rows == 0:
        a = a.reshape(rows, -1, a.shape[-1])
    if a.ndim != 3 or a.shape[0] != rows or a.shape[1] < length:
        raise PenaltyError(
            f"penalty=deft: a down projection was given activations of shape {tuple(a.shape)} for a"
            f" batch of {tuple(real.shape)} tokens, so that it cannot be said which token each"
            " belongs to. Set penalty=none, or leave the layer out of penalty.modules"
        )
    return a[:, -length:]


class DensityDEFT:
    """The penalty of one run; see the module's text.

    `open(real)` before the forward pass of a micro-batch, `term()` after it, `close()` after the
    backward pass, during which the hooks stay: where activations are checkpointed the layers run
    again, and have to save the same tensors again.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        form: str,
        eps: float | str,
        layer_weights: str,
        modules: str | list[str],
        calibration_batches: int,
    ):
        self.layers = mlp_inputs(model, modules)
        self.weight, self.form, self.layer_weights, self.calibration_batches = (
            weight,
            form,
            layer_weights,
            calibration_batches,
        )
        self.tau: list[float] | None = (
            None if isinstance(eps, str) else [eps**0.5] * len(self.layers)
        )
        # density of each layer over the last steps; 0 before the first
        self.smoothed = [0.0] * len(self.layers)
        self.hooks: list[Any] = []
        # densities by layer; None where they are not recorded
        self.found: dict[int, list[Tensor]] | None = None

    def shares(self) -> list[float]:
        """w_l of each layer."""
        total = sum(self.smoothed)
        if self.layer_weights == "uniform" or total == 0:
            return [1 / len(self.layers)] * len(self.layers)
        return [smoothed / total for smoothed in self.smoothed]

    def open(self, real: Bool[Tensor, "B T"]) -> None:
        """Measure from here on. `real` are the tokens that count."""
        self.close()
        assert self.tau is not None, "calibrate or load_state comes first"
        self.found = {}
        for index, ((_, module), tau) in enumerate(zip(self.layers, self.tau, strict=True)):

            def measure(
                _: nn.Module, inputs: tuple[Tensor, ...], index: int = index, tau: float = tau
            ) -> None:
                if torch.is_grad_enabled():
                    found = density(own_tokens(inputs[0], real), real, self.form, tau)
                    if self.found is not None:
                        self.found.setdefault(index, []).append(found)

            self.hooks.append(module.register_forward_pre_hook(measure))

    def term(self) -> tuple[Float[Tensor, ""], Float[Tensor, " L"], Float[Tensor, " L"]]:
        """(what to add to the loss, each layer's density, which layers were measured), the last two
        without a gradient.

        Raises:
            PenaltyError: no layer was called.
        """
        found, self.found = self.found, None
        if not found:
            raise PenaltyError(
                "penalty=deft: none of the down projections was called by the model's forward"
                f" pass, such as {self.layers[0][0]}: its activations cannot be read. Set"
                " penalty=none, or other penalty.modules"
            )
        shares = self.shares()
        # One that is shared between layers (ALBERT) was called several times.
        densities = {index: torch.stack(parts).mean() for index, parts in found.items()}
        some = next(iter(densities.values()))
        each, measured = torch.zeros(2, len(self.layers), dtype=some.dtype, device=some.device)
        for index, value in densities.items():
            each[index], measured[index] = value.detach().to(some.device), 1.0
        total = sum(shares[index] for index in densities) or 1.0
        parts = [
            value.to(some.device) * (shares[index] / total) for index, value in densities.items()
        ]
        return self.weight * torch.stack(parts).sum(), each, measured

    def close(self) -> None:
        """Measure no longer."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.found = [], None

    def update(self, densities: list[float]) -> None:
        """Take note of a step's densities, NaN for a layer that was not measured."""
        for index, now in enumerate(densities):
            if now == now:
                before = self.smoothed[index]
                self.smoothed[index] = _MEMORY * before + (1 - _MEMORY) * now if before else now

    @torch.no_grad()
    def calibrate(
        self, forward: Callable[[Any], Any], batches: Iterable[tuple[Any, Bool[Tensor, "B T"]]]
    ) -> None:
        """Set tau to each layer's median |a| over the first `calibration_batches` of (batch, its
        real tokens). Activations that are exactly 0 are left out, else tau would be 0 where a ReLU
        leaves less than half. Does nothing where eps is a number.

        Raises:
            PenaltyError: a layer has no activation but 0 or NaN.
        """
        if self.tau is None:
            batches = itertools.islice(batches, self.calibration_batches)
            self.tau = [median for _, median in medians(self.layers, forward, batches)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "layers": [name for name, _ in self.layers],
            "tau": self.tau,
            "smoothed": list(self.smoothed),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put a `state` back.

        Raises:
            PenaltyError: it is of other layers.
        """
        if state["layers"] != [name for name, _ in self.layers]:
            raise PenaltyError(
                f"the checkpoint's penalty is on other layers ({state['layers'][:3]} ...) than this"
                " model's"
            )
        self.tau, self.smoothed = state["tau"], list(state["smoothed"])


@torch.no_grad()
def medians(
    layers: list[tuple[str, nn.Module]],
    forward: Callable[[Any], Any],
    batches: Iterable[tuple[Any, Bool[Tensor, "B T"]]],
) -> list[tuple[str, float]]:
    """(name, median of |a| where a is not 0) of each layer's input, over evenly spaced activations
    of the real tokens.

    Raises:
        PenaltyError: a layer has no activation but 0 or NaN.
    """
    kept: list[list[Tensor]] = [[] for _ in layers]
    now: dict[str, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def sample(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = own_tokens(inputs[0], now["real"])[now["real"]].reshape(-1)
            kept[index].append(values[:: max(1, len(values) // _SAMPLES)].abs().float().cpu())

        return sample

    hooks = [
        module.register_forward_pre_hook(keep(index)) for index, (_, module) in enumerate(layers)
    ]
    try:
        for batch, real in batches:
            now["real"] = real
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for (name, _), parts in zip(layers, kept, strict=True):
        values = torch.cat(parts) if parts else torch.zeros(0)
        values = values[values > 0]
        if not len(values):
            raise PenaltyError(
                f"penalty.eps=auto: the activations of {name} are all 0 or NaN. Set penalty.eps to"
                " a number, as 1e-7"
            )
        result.append((name, float(values.median())))
    return result
