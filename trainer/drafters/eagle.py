"""EAGLE's head: one decoder layer that continues the target's features instead of tokens (Li et al.
2024, arXiv 2401.15077).

    slot t:  f̂_{t+1} = Block(fc [emb(x_{t+1}) ; f_t])
             logits = head(f̂_{t+1}) predict x_{t+2}

    L = Σ_k w_k Σ_t ( v SmoothL1(f̂_{t+k}, f_{t+k}) + p CE(head(f_{t+k}), head(f̂_{t+k})) )
    v = 1, p = 0.1

f (B, T, d) are the hidden states that the target's output head reads, after its final norm; fc (d,
2d); Block is a decoder layer (trainer.drafters.families) without its input_layernorm, so it reads
fc's output. SmoothL1 is the mean over d. CE is against the target's whole distribution. EAGLE-2
(arXiv 2406.16858) has the same weights and grows its trees by confidence in decoding.

The paper trains k = 1 only, and drafts further tokens by using f̂ in place of f. With K > 1 these
passes are trained too, as in HASS (arXiv 2408.15766): pass k reads the features that pass k - 1
predicted, without a gradient to them. HASS is offsets=3 topk=10. trainer.drafters.unrolled computes
the passes of a row at once.

Differs from the paper:
    Noise on the features is uniform in ±std/2 at every length. The reference multiplies it by 512
    over the row's length, which drowns short rows.
    fc has no bias unless `bias` is true, since engines disagree on one (vLLM drops it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.drafters import DrafterError, Target, TargetOutput
from trainer.drafters.distilled import taught_positions
from trainer.drafters.families import family_of
from trainer.drafters.layers import projection, run_layer
from trainer.drafters.starts import pass_last
from trainer.drafters.unrolled import Unrolled, masked_layer
from trainer.models.on_host import picked, sent


class Eagle(Unrolled):
    """EAGLE-1's head, the same as EAGLE-2's; conf/drafter/eagle.yaml documents the settings.

    Raises:
        DrafterError: there is not one weight for each offset, a setting is out of its range, or the
        model's decoder layers cannot be built.
    """

    keeps_biases = True  # those of the layer's class

    def __init__(
        self,
        model: Any,
        offsets: int,
        depth: int | None,
        layer: str,
        init: str,
        bias: bool,
        noise: float,
        feature_weight: float,
        token_weight: float,
        weights: list[float] | None,
        weight: float,
        loss: str,
        eta: float,
        topk: int | None,
        topk_weight: float,
        confidence: float | None,
        lr_scale: float,
    ):
        super().__init__(offsets, depth, weights, [1.0] * offsets, weight, lr_scale, loss, eta)
        if topk is not None and not token_weight:
            raise DrafterError(
                "drafter.topk is added to the loss between distributions: drafter.token_weight=0"
                " leaves it out. Set a token_weight above 0, or topk=null"
            )
        # `loss` multiplies by token_weight.
        self.topk, self.topk_weight = topk, topk_weight / (token_weight or 1.0)
        self.noise, self.feature_weight, self.token_weight = noise, feature_weight, token_weight
        size = model.config.get_text_config().hidden_size
        self.fc = projection(model, 2 * size, size)
        self.family = family_of(model, layer, init, self.keeps_biases)
        self.midlayer = masked_layer(self.family or model, init)
        self.midlayer.input_layernorm = nn.Identity()
        with torch.no_grad():
            if bias:
                self.fc.bias = nn.Parameter(torch.zeros_like(self.fc.weight[:, 0]))
            if init == "last_layer":
                pass_last(self.fc)
        self.predict_acceptance(model, confidence, 1)

    def first_input(self, hidden: Tensor, features: Tensor | None) -> Tensor:
        if self.training and self.noise:
            # Drawn on the CPU, so that it is the same for every device.
            noise = (torch.rand(hidden.shape) - 0.5) * self.noise
            hidden = hidden + sent(noise, hidden.device).to(hidden.dtype)
        return hidden

    def step(self, embedded: Tensor, hidden: Tensor, inputs: Any) -> Tensor:
        return run_layer(
            self.midlayer, self.fc(torch.cat([embedded, hidden.to(embedded)], dim=-1)), inputs
        )

    def next_input(self, out: Tensor) -> Tensor:
        return out.detach()

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        total, confidence, numbers, drafts = self.distilled(
            output, target, chunk, self.counted_states(output, target)
        )
        taught, counts = taught_positions(output, self.offsets)
        states = picked(output.hidden.detach(), taught).float()
        features = total.new_zeros(())
        for k, weight in enumerate(self.weights, 1):
            error = F.smooth_l1_loss(drafts[k - 1].float(), states, reduction="none").mean(-1)
            features = features + weight * (error * counts[k - 1]).sum()
        return self.feature_weight * features + self.token_weight * total + confidence, numbers
