"""Ways to draw tokens from a distribution: temperature, top-k and top-p, and a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# From logits to probabilities.
ToProbabilities = Callable[[Float[Tensor, "n V"]], Float[Tensor, "n V"]]


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Temperature 0 is greedy decoding, for which the others have no
    effect."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all tokens
    seed: int | None = None  # None uses torch's global generator

    def to_probabilities(self) -> ToProbabilities | None:
        """Return the processors that transformers' sampling uses, in fp32 as there; None if
        greedy."""
        if self.temperature == 0:
            return None
        processors = LogitsProcessorList()
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))

        def to_probabilities(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
            return processors(None, logits.float()).softmax(-1)  # type: ignore[arg-type]

        return to_probabilities

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return a new generator on a device, started from the seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)
