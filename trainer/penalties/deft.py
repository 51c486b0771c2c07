"""density-DEFT: fewer active neurons in the MLPs, by a penalty on a smooth count of them (Runwal et
al., arXiv 2402.01911).

    D_l = mean over tokens t and neurons f of q(a_l[t, f])        L = L_task + weight · Σ_l w_l D_l

a_l (B, T, F) is the input of the down projection of layer l: the activations of a plain MLP, or
gate times up of a gated one. q is 0 at 0 and approaches 1 far from it. Its scale is tau, where
eps = tau²:

    rational   q = a² / (a² + tau²)   as in the authors' code, with eps = 1e-7, and 20 for prompt
                                      tuning
    tanh       q = tanh(|a| / tau)    the smooth step tanh(beta |a|) of earlier work on activation
                                      sparsity, with beta = 1 / tau. It is not verified that this
                                      is the equation in the paper's text; its code does not have it

Layer weights w_l sum to 1. `uniform` is the paper's mean. `adaptive` is this project's: w_l is
proportional to the layer's density, smoothed over steps, so a step follows the gradient of ½ Σ D_l²
(scaled by Σ D_l). The penalty acts on dense layers, and hardly on layers that are already sparse.
It is not ADA-DEFT, whose learned weights are unpublished, and skips no MLP.

Differs from the paper: unlike in the authors' code, padding and virtual tokens are not counted;
every real token of a micro-batch counts the same, however rows are packed; encoder and decoder
share one mean; the gate's branch alone is never measured. `eps: auto` sets tau to the layer's
median |a| at the start, since 1e-7 is too small for a SiLU, whose activations are hardly ever that
near 0.

With `start`, `end` and `ramp` the weight is that of a phase of the run (trainer.penalties.phase).

The class is called DensityDEFT because PEFT's DeftConfig is another method.
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

from adapters.delta import ends_with
from trainer.models.base import BaseError
from trainer.penalties.forms import FORMS
from trainer.penalties.phase import Phase

# Endings of the names of down projections in transformers.
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
_CHUNK = 1 << 22  # activations that are converted to fp32 at one time
# The tokens of a batch that count, True in (B, T): those of its sequences, or of an encoder and of
# its decoder.
Real = tuple[Tensor, ...]
_SAMPLES = 1 << 16  # activations per layer and micro-batch in a median
_MEMORY = 0.9  # decay per step of a layer's smoothed density


class PenaltyError(BaseError):
    """The penalty does not fit the model. The message says why, and how to fix it."""


def seen_by(layer: str, real: Real) -> Bool[Tensor, "B T"]:
    """Return the mask of the real tokens among those that the layer of this name sees."""
    return real[-1 if "decoder" in layer.split(".") else 0]


def mlp_inputs(model: nn.Module, modules: str | list[str] = "auto") -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the down projections, whose input is measured. For an adapted layer
    it is the module that wraps the layer.

    `modules` is auto, or a list of name endings.

    Raises:
        PenaltyError: there is none, an entry matches none, or the MLPs are experts, which see only
        some of the tokens.
    """
    named = dict(model.named_modules())
    linears = [(name, module) for name, module in named.items() if _is_linear(module)]
    if modules == "auto":
        if any(name.rpartition(".")[2] == "experts" for name in named):
            raise PenaltyError(
                "penalty=deft: this model is a mixture of experts, each of which sees only some of"
                " the tokens, and their density is not measured. Set penalty=none, or name the"
                " down projections that see all tokens: penalty.modules=[...]"
            )
        projections = [
            (name, module)
            for name, module in linears
            if _DOWN.fullmatch(name) or _bert_like(name, named)
        ]
    else:
        for ending in modules:
            if not any(ends_with(name, ending) for name, _ in linears):
                raise PenaltyError(
                    f"penalty.modules has {ending!r}, which matches no linear layer."
                    f" {_choices(linears)}"
                )
        projections = [layer for layer in linears if ends_with(layer[0], *modules)]
    if not projections:
        raise PenaltyError(
            "penalty=deft finds no MLP in this model: none of its linear layers has the name of a"
            f" down projection. Name them, as in penalty.modules=[down_proj]. {_choices(linears)}"
        )
    return projections


def _bert_like(name: str, named: dict[str, nn.Module]) -> bool:
    """Return whether it is BERT's `layer.0.output.dense`, and not `layer.0.attention.output.dense`.
    Only the former's parent also has an `intermediate`."""
    layer, separator, rest = name.rpartition("output.dense")
    return separator != "" and rest == "" and f"{layer}intermediate" in named


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or an adapter around one."""
    inner: Any = module
    while isinstance(inner, nn.Module) and not isinstance(inner, nn.Linear | Conv1D):
        # our name of the frozen layer, or PEFT's
        inner = getattr(inner, "base", None) or getattr(inner, "base_layer", None)
    return inner is not None


def _choices(linears: list[tuple[str, nn.Module]]) -> str:
    names = dict.fromkeys(re.sub(r"^.*?\.\d+\.|^.*\.(?=\w+$)", "", name) for name, _ in linears)
    return "The model's linear layers: " + ", ".join(itertools.islice(names, 40))


class _Density(torch.autograd.Function):
    """Σ_t weight_t mean_f q(a[t, f]).

    Forward    chunk by chunk in fp32 (float64 stays)
    Backward   weight_t q'(a[t, f]) / F, computed from a
    Shapes     a (N, F), weights (N,); returns a scalar in fp32 or float64
    Notes      saves a and the weights, and nothing else of a's size. No second derivative.
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
    """Return the mean of q over the real tokens and all neurons, or 0 if no token is real."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    weights = real.to(dtype) / real.sum().clamp(min=1)
    return _Density.apply(a.reshape(-1, a.shape[-1]), weights.reshape(-1), form, tau)


def batch_tokens(a: Tensor, real: Bool[Tensor, "B T"]) -> Float[Tensor, "B T F"]:
    """Return the activations of a batch's tokens as (B, T, F), without virtual tokens. Some models
    (OPT) merge the rows of a batch; these are separated.

    Raises:
        PenaltyError: the layer did not receive all tokens of the batch.
    """
    rows, length = real.shape
    if a.ndim == 2 and len(a) % rows == 0:
        a = a.reshape(rows, -1, a.shape[-1])
    if a.ndim != 3 or a.shape[0] != rows or a.shape[1] < length:
        raise PenaltyError(
            f"penalty=deft: a down projection received activations of shape {tuple(a.shape)} for a"
            f" batch of {tuple(real.shape)} tokens, so they cannot be assigned to tokens. Set"
            " penalty=none, or leave the layer out of penalty.modules"
        )
    return a[:, -length:]


class DensityDEFT:
    """The penalty of one run, as the module's docstring describes it.

    Call `open(real)` before the forward pass of a micro-batch, `term()` after it, and `close()`
    after the backward pass. The hooks stay during the backward pass: with checkpointed activations
    the layers run again, and must save the same tensors again.
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
        start: float = 0.0,
        end: float = 1.0,
        ramp: float = 0.0,
    ):
        self.phase = Phase(start, end, ramp)
        self.strength = 1.0  # of the current step: the phase's share of the weight
        self.layers = mlp_inputs(model, modules)
        self.weight, self.form = weight, form
        self.layer_weights, self.calibration_batches = layer_weights, calibration_batches
        self.tau: list[float] | None = (
            None if isinstance(eps, str) else [eps**0.5] * len(self.layers)
        )
        # density of each layer over the last steps; 0 before the first
        self.smoothed = [0.0] * len(self.layers)
        self.hooks: list[Any] = []
        self.tokens: list[Tensor] = []  # how many of the current micro-batch count, by layer
        # the current micro-batch's densities by layer; None if they are not recorded
        self.densities: dict[int, list[Tensor]] | None = None

    def shares(self) -> list[float]:
        """Return w_l of each layer."""
        total = sum(self.smoothed)
        if self.layer_weights == "uniform" or total == 0:
            return [1 / len(self.layers)] * len(self.layers)
        return [smoothed / total for smoothed in self.smoothed]

    def open(self, real: Real) -> None:
        """Start to measure. `real` is True for the tokens that count."""
        self.close()
        assert self.tau is not None, "calibrate or load_state comes first"
        self.densities = {}
        counts = tuple(side.sum() for side in real)
        self.tokens = [seen_by(name, counts) for name, _ in self.layers]
        for index, ((name, module), tau) in enumerate(zip(self.layers, self.tau, strict=True)):
            here = seen_by(name, real)

            def measure(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                index: int = index,
                tau: float = tau,
                here: Tensor = here,
            ) -> None:
                if torch.is_grad_enabled():
                    value = density(batch_tokens(inputs[0], here), here, self.form, tau)
                    if self.densities is not None:
                        self.densities.setdefault(index, []).append(value)

            self.hooks.append(module.register_forward_pre_hook(measure))

    def term(self) -> tuple[Float[Tensor, ""], Float[Tensor, " L"], Float[Tensor, " L"]]:
        """Return (the term to add to the loss, each layer's density, the number of tokens that it
        was measured on, 0 if it was not called). The last two have no gradient.

        Raises:
            PenaltyError: no layer was called.
        """
        calls, self.densities = self.densities, None
        if not calls:
            raise PenaltyError(
                "penalty=deft: none of the down projections was called by the model's forward"
                f" pass, such as {self.layers[0][0]}: its activations cannot be read. Set"
                " penalty=none, or other penalty.modules"
            )
        shares = self.shares()
        # A projection that layers share (ALBERT) was called several times.
        densities = {index: torch.stack(values).mean() for index, values in calls.items()}
        first = next(iter(densities.values()))
        each, measured = torch.zeros(2, len(self.layers), dtype=first.dtype, device=first.device)
        for index, value in densities.items():
            each[index] = value.detach().to(first.device)
            measured[index] = self.tokens[index].to(first.device)
        total = sum(shares[index] for index in densities) or 1.0
        parts = [
            value.to(first.device) * (shares[index] / total) for index, value in densities.items()
        ]
        return self.strength * self.weight * torch.stack(parts).sum(), each, measured

    def close(self) -> None:
        """Stop measuring."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.densities = [], None

    def update(self, densities: list[float]) -> None:
        """Update the smoothed densities from a step's, which are NaN for a layer that was not
        measured."""
        for index, current in enumerate(densities):
            if current == current:  # not NaN
                last = self.smoothed[index]
                self.smoothed[index] = _MEMORY * last + (1 - _MEMORY) * current if last else current

    @torch.no_grad()
    def calibrate(self, forward: Callable[[Any], Any], batches: Iterable[tuple[Any, Real]]) -> None:
        """Set tau to each layer's median |a| over the first `calibration_batches` of (batch, its
        real tokens), unless eps is a number. Activations that are exactly 0 are ignored: otherwise
        tau would be 0 if a ReLU sets more than half of them to 0.

        Raises:
            PenaltyError: a layer has no activation but 0 or NaN.
        """
        if self.tau is None:
            batches = itertools.islice(batches, self.calibration_batches)
            self.tau = [median for _, median in medians(self.layers, forward, batches)]

    def state(self) -> dict[str, Any]:
        """Return the penalty's part of a checkpoint."""
        return {
            "layers": [name for name, _ in self.layers],
            "tau": self.tau,
            "smoothed": list(self.smoothed),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load a `state`.

        Raises:
            PenaltyError: its layers are not this model's.
        """
        if state["layers"] != [name for name, _ in self.layers]:
            raise PenaltyError(
                f"the checkpoint's penalty is on other layers ({state['layers'][:3]} ...) than this"
                " model's: set penalty.modules as in the run that wrote it"
            )
        self.tau, self.smoothed = state["tau"], list(state["smoothed"])


@torch.no_grad()
def medians(
    layers: list[tuple[str, nn.Module]],
    forward: Callable[[Any], Any],
    batches: Iterable[tuple[Any, Real]],
) -> list[tuple[str, float]]:
    """Return (name, median of |a| where a is not 0) of each layer's input, over evenly spaced
    activations of the real tokens.

    Raises:
        PenaltyError: a layer has no activation but 0 or NaN.
    """
    samples: list[list[Tensor]] = [[] for _ in layers]
    real: Real = ()  # of the current batch; the hooks read it

    def sampler(index: int) -> Callable[..., None]:
        def sample(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            here = seen_by(layers[index][0], real)
            values = batch_tokens(inputs[0], here)[here].reshape(-1)
            samples[index].append(values[:: max(1, len(values) // _SAMPLES)].abs().float().cpu())

        return sample

    hooks = [
        module.register_forward_pre_hook(sampler(index)) for index, (_, module) in enumerate(layers)
    ]
    try:
        for batch, real in batches:  # noqa: B007 - the hooks read `real`
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for (name, _), parts in zip(layers, samples, strict=True):
        values = torch.cat(parts) if parts else torch.zeros(0)
        values = values[values > 0]
        if not len(values):
            raise PenaltyError(
                f"penalty.eps=auto: the activations of {name} are all 0 or NaN. Set penalty.eps to"
                " a number, as 1e-7"
            )
        result.append((name, float(values.median())))
    return result
