"""Narrower states by one rotation of the whole model: SliceGPT (arXiv 2401.15024) with a stock
config.

An RMSNorm commutes with a rotation Q of the states, so these leave the logits as they are:

    g into W_in, 1 instead of g      the norm's weight moves into the linears behind it
    E Q, W_in Q, Qᵀ W_out, H Q       embedding; q, k, v, gate, up; o, down; head

Then only the first k of the d numbers of a state stay, those with the largest variance:

    Q      eigenvectors of Σ ĥ ĥᵀ, descending;  ĥ = h / rms(h), over the inputs h of all norms
    norms  weight √(d / k), eps d / k           since a norm now takes the mean over k numbers

W_in (·, d), W_out (d, ·), E and H (v, d). The states of the result are those of the model whose
states are projected by Q_k Q_kᵀ before each norm.

Differs from the paper: one Q for all layers. The paper has one for each block, with a matrix in
each residual that no class of transformers holds. Up to a tenth of the width both cost the same on
SmolLM2-135M. The states are divided by their rms first: late ones, far larger, would decide alone.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.models.base import BaseError
from trainer.shrinking.walk import Method

# RMSNorm before attention and MLP, and a plain sum of both; head_dim is a key of their config
FAMILIES = ("llama", "ministral", "mistral", "qwen2", "qwen3")
BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
READ = {
    BEFORE_ATTENTION: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    BEFORE_MLP: ("mlp.gate_proj", "mlp.up_proj"),
}
WRITE = ("self_attn.o_proj", "mlp.down_proj")


def check(family: str) -> None:
    """Check that the norms and residuals of a family commute with a rotation.

    Raises:
        BaseError: they do not.
    """
    if family not in FAMILIES:
        raise BaseError(
            f"method=slice rotates the states of families whose norms are plain RMSNorms in front"
            f" of attention and MLP: {', '.join(FAMILIES)}, and this is {family!r}. Use"
            " method=drop_layers or narrow"
        )


def heads(config: Any) -> int:
    """Return what a family's config wants hidden_size to be a multiple of: the number of attention
    heads, or 1. Llama's checks it, although head_dim is a key of its own."""
    trial = copy.deepcopy(config)
    trial.hidden_size = trial.num_attention_heads + 1
    try:
        trial.validate()
    except Exception:  # of huggingface_hub's, with a ValueError as its cause
        return int(config.num_attention_heads)
    return 1


def width(share: float, states: int, multiple: int, of_heads: int = 1) -> int:
    """Return how many of a state's numbers stay: the share of them, to the nearest multiple of
    `multiple` and of `heads`.

    Raises:
        BaseError: none or all would stay.
    """

    def nearest(m: int) -> int:
        step = math.lcm(m, of_heads)
        return round(share * states / step) * step

    left = nearest(multiple)
    if not 0 < left < states:
        fits = [m for m in (32, 16, 8, 4, 2, 1) if m < multiple and 0 < nearest(m) < states]
        raise BaseError(
            f"width={share:g} of {states}, in multiples of {math.lcm(multiple, of_heads)}, is"
            f" {left}, which leaves {'none' if not left else 'all'}. Use another width="
            + (f", or multiple={fits[0]}" if fits else "")
        )
    return left


class Sliced(Method):
    """Keeps `states` numbers of each state. Sums ĥ ĥᵀ in float64 over the inputs of all norms."""

    changes = False

    def __init__(self, states: int, size: int):
        self.states = states
        self.sum = torch.zeros(size, size, dtype=torch.float64)
        self._first = True

    def watch(self, layer: nn.Module) -> list[Any]:
        """Hook the norm in front of the MLP; `see` has the inputs of the others."""

        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._add(inputs[0])

        return [layer.get_submodule(BEFORE_MLP).register_forward_pre_hook(read)]

    def see(self, before: Float[Tensor, "1 t d"], after: Float[Tensor, "1 t d"]) -> None:
        """Add what the next norm reads, and in the first layer what its own reads."""
        if self._first:
            self._add(before)
        self._add(after)

    def _add(self, states: Tensor) -> None:
        h = states.detach().flatten(0, -2).double()
        h = h / h.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        self.sum += (h.t() @ h).to(self.sum.device)

    def change(self, layer: nn.Module) -> dict[str, Any]:
        """Return no figure: the states of all layers are summed."""
        self._first = False
        return {}

    def rotation(self) -> tuple[Float[Tensor, "d k"], float]:
        """Return the columns of Q that stay, and the share of the variance that they have."""
        values, vectors = torch.linalg.eigh(self.sum)  # ascending
        share = float(values[-self.states :].sum() / values.sum())
        return vectors.flip(-1)[:, : self.states], share


@torch.no_grad()
def apply(model: Any, layers: nn.ModuleList, Q: Float[Tensor, "d k"]) -> None:
    """Fold the norms, rotate and slice a model in place, and its config. The head gets a weight of
    its own."""
    d, k = Q.shape
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    final = model.base_model.norm
    _put(head, head.weight.double() * final.weight.double() @ Q)  # first: it may be the embedding
    _put(embedding, embedding.weight.double() @ Q)
    embedding.embedding_dim = k
    norms = [final]
    for layer in layers:
        for name, readers in READ.items():
            norm: Any = layer.get_submodule(name)
            norms.append(norm)
            for reader in readers:
                linear: Any = layer.get_submodule(reader)
                _put(linear, linear.weight.double() * norm.weight.double() @ Q)
        for name in WRITE:
            linear = layer.get_submodule(name)
            _put(linear, Q.t() @ linear.weight.double())
            if linear.bias is not None:
                bias = (linear.bias.double() @ Q).to(linear.bias.dtype)
                linear.bias = nn.Parameter(bias, requires_grad=False)
    for norm in norms:
        norm.weight = nn.Parameter(norm.weight.new_full((k,), math.sqrt(d / k)))
    config = model.config
    first: Any = layers[0]
    config.head_dim = first.self_attn.head_dim
    config.hidden_size, config.tie_word_embeddings = k, False
    config.rms_norm_eps = config.rms_norm_eps * d / k
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = config.rms_norm_eps


def _put(module: Any, weight: Tensor) -> None:
    """Give a layer a weight of its own, in the dtype that it had."""
    trains = module.weight.requires_grad
    module.weight = nn.Parameter(weight.to(module.weight.dtype).contiguous(), trains)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
