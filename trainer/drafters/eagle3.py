"""EAGLE-3's head: features of three depths of the target, and a loss on tokens only (Li et al.
2025, arXiv 2503.01840).

    g_t = fc [s_low ; s_mid ; s_high]_t
    a_t = g_t + Attention([input_layernorm(emb(x_{t+1})) ; hidden_norm(g_t)])
    a_t += MLP(post_attention_layernorm(a_t))
    logits = lm_head(norm(a_t)) predict x_{t+2}; then a_t replaces g_t for the next token

    L = Σ_k β^(k-1) Σ_t CE(p_{t+k}, q_k[t])        β = 0.8, k = 1 .. K = 7

s (B, T, d) are the states entering the target's layers 2, L/2 and L - 3; fc (d, 3d); q, k and v of
the attention are (.., 2d), and its heads, norms and rotary embeddings are those of the layer's
family (trainer.drafters.families). lm_head (v, d) is of the draft vocabulary, the v tokens that are
trained most often, and starts as the target's rows of these tokens. All linear layers are without
biases, since engines read EAGLE-3 heads as Llama's layers. p is the target's distribution over the
draft vocabulary, renormalised; a position whose best token is not in it does not count.

The K passes of a row are computed as in trainer.drafters.unrolled, with gradients through all of
them. `fc_norm` and `norm_output` are EAGLE-3.1's (norms of s_low, s_mid and s_high before fc;
norm(a_t) instead of a_t for the next token).

Besides the weights, `state` holds the draft vocabulary: d2t (v,) int64, target id - draft id, and
t2d (V,) bool.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from adapters.linear import features, float_weight
from trainer.drafters import DrafterError, Target, draft_vocabulary
from trainer.drafters.families import family_of
from trainer.drafters.layers import (
    autocast_like,
    check_states,
    final_norm,
    layers_of,
    projection,
    requested_layers,
)
from trainer.drafters.starts import pass_last
from trainer.drafters.unrolled import Unrolled, masked_layer
from trainer.models.heads import Head


class Eagle3(Unrolled):
    """EAGLE-3's head; conf/drafter/eagle3.yaml documents the settings.

    Raises:
        DrafterError: there is not one weight for each offset, a setting is out of its range, or the
        model's decoder layers cannot be built.
    """

    keeps_biases = False
    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        model: Any,
        offsets: int,
        depth: int | None,
        aux_layers: list[int] | None,
        draft_vocab_size: int | None,
        coverage: float,
        train_head: bool,
        norm_output: bool,
        fc_norm: bool,
        layer: str,
        init: str,
        weights: list[float] | None,
        beta: float,
        weight: float,
        loss: str,
        eta: float,
        confidence: float | None,
        lr_scale: float,
    ):
        super().__init__(
            offsets, depth, weights, [beta**k for k in range(offsets)], weight, lr_scale, loss, eta
        )
        config = model.config.get_text_config()
        size, output = config.hidden_size, model.get_output_embeddings()
        _, vocabulary = features(output)
        self.family = family_of(model, layer, init, self.keeps_biases)
        source = self.family or model
        self.midlayer = wide_layer(source, init)
        self.layers = read_layers(len(layers_of(model)), aux_layers)
        check_states(model, self.layers)
        self.coverage, self.norm_output = coverage, norm_output
        self.fc = projection(model, len(self.layers) * size, size)
        self.fc_norm = (
            nn.ModuleList(final_norm(source, "random") for _ in self.layers) if fc_norm else None
        )
        self.norm = final_norm(source, init)
        drafted = vocabulary if draft_vocab_size is None else min(draft_vocab_size, vocabulary)
        self.lm_head = projection(model, size, drafted).requires_grad_(train_head)
        draft_vocabulary.register(self, drafted, vocabulary, self.lm_head.weight.device)
        self._rows: Callable[[], Tensor] = lambda: float_weight(output)
        self._start_head()
        if init == "last_layer":
            pass_last(self.fc)
        self.predict_acceptance(model, confidence, 1)

    @property
    def vocabulary(self) -> Int[Tensor, " v"] | None:
        if len(self.d2t) == len(self.t2d):
            return None
        return draft_vocabulary.token_ids(self)

    def calibrate(self, counts: Callable[[], Int[Tensor, " V"]]) -> None:
        if self.vocabulary is None:
            return
        draft_vocabulary.choose_most_frequent(self, counts(), self.coverage)
        self._start_head()

    def first_input(self, hidden: Tensor, features: Tensor | None) -> Tensor:
        assert features is not None, "the states of `layers` are missing"
        if self.fc_norm is not None:
            parts = features.chunk(len(self.layers), dim=-1)
            features = torch.cat(
                [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1
            )
        return self.fc(features)

    def step(self, embedded: Tensor, hidden: Tensor, inputs: Any) -> Tensor:
        layer = self.midlayer
        hidden = hidden.to(embedded)
        both = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], dim=-1)
        hidden = hidden + layer.self_attn(hidden_states=both, **inputs)[0]
        out = layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden + (out[0] if isinstance(out, tuple) else out)

    def head_input(self, out: Tensor) -> Tensor:
        return self.norm(out)

    def next_input(self, out: Tensor) -> Tensor:
        return self.norm(out) if self.norm_output else out

    def draft_heads(self, target: Target) -> tuple[Head, ...]:
        def head(hidden: Tensor) -> Tensor:
            with autocast_like(hidden):
                return self.lm_head(hidden.to(self.lm_head.weight.dtype))

        return (head,)

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.lm_head.parameters() if p.requires_grad)

    def state(self) -> dict[str, Tensor]:
        """Return the weights, including a head that is not trained, and d2t and t2d if the draft
        vocabulary is not the target's."""
        state = super().state() | {"lm_head.weight": self.lm_head.weight.detach()}
        return state if self.vocabulary is None else state | {"d2t": self.d2t, "t2d": self.t2d}

    def load_state(self, state: dict[str, Tensor]) -> None:
        draft_vocabulary.check_stored(state)
        super().load_state(state)

    @torch.no_grad()
    def _start_head(self) -> None:
        """Copy the target's rows of the draft vocabulary."""
        if self.lm_head.weight.device.type != "meta":
            rows = self._rows().to(self.lm_head.weight)
            self.lm_head.weight.copy_(rows if self.vocabulary is None else rows[self.vocabulary])


def read_layers(depth: int, requested: list[int] | None) -> tuple[int, ...]:
    """Return the states of the target that are read, as transformers counts hidden_states (0 is the
    embeddings, i the output of layer i - 1).

    These are the `requested` ones, or for None 2, L/2 and L - 3 of L = `depth` layers. If these are
    not three different ones, nearby ones are used.

    Raises:
        DrafterError: the target has no such states, or they are not ascending.
    """
    if requested is None:
        if depth >= 7:
            return 2, depth // 2, depth - 3
        return (
            (1, depth // 2, depth - 1) if depth >= 4 else tuple(range(max(0, depth - 2), depth + 1))
        )
    return requested_layers(depth, requested)


def wide_layer(model: Any, init: str, back: int = 1) -> Any:
    """Return a layer of the target's family, without biases, whose attention reads an embedding and
    a feature side by side. With `init` last_layer the part for the feature is the target's
    `back`-th layer from the end, and the part for the embedding is 0.

    Raises:
        DrafterError: its parts are not where transformers' layers have them.
    """
    layer = masked_layer(model, init, back)
    attention, size = layer.self_attn, model.config.get_text_config().hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        narrow = getattr(attention, name, None)
        if not isinstance(narrow, nn.Linear):
            raise DrafterError(
                f"{type(attention).__name__} has no linear {name}, so EAGLE-3's head cannot be"
                " built from it: set drafter=mtp_medusa, whose heads do not need it, or"
                " drafter=none"
            )
        wide = projection(model, 2 * size, narrow.out_features)
        if init == "last_layer":
            with torch.no_grad():
                wide.weight.copy_(
                    torch.cat([torch.zeros_like(narrow.weight), narrow.weight], dim=1)
                )
        setattr(attention, name, wide)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    layer.hidden_norm = copy.deepcopy(layer.input_layernorm)
    return layer
