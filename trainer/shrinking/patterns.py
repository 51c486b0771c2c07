"""The entries of a weight that stay: n of every m neighbouring inputs, or a share of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Entries that stay: `stays` of each `group` neighbouring inputs of a row, or where `group` is
    None, the share `density` of each row."""

    name: str
    density: float
    stays: int = 0
    group: int | None = None

    @classmethod
    def of(cls, name: str, density: float | None = None) -> Pattern:
        """Return the pattern of the options pattern= and density=, such as 2:4."""
        if name == "unstructured":
            return cls(name, 0.5 if density is None else density)
        stays, group = map(int, name.split(":"))
        return cls(name, stays / group, stays, group)

    def fault(self, inputs: int) -> str | None:
        """Return why a weight with so many inputs cannot have this pattern; None if it can."""
        if self.group is not None and inputs % self.group:
            return f"{inputs} inputs are no multiple of {self.group}"
        if self.group is None and not 0 < self.count(inputs) < inputs:
            return f"density={self.density:g} of {inputs} inputs keeps {self.count(inputs)}"
        return None

    def count(self, inputs: int) -> int:
        """Return how many entries of a row stay."""
        if self.group is not None:
            return inputs // self.group * self.stays
        return round(self.density * inputs)

    def keep(self, scores: Float[Tensor, "o i"]) -> Bool[Tensor, "o i"]:
        """Return which entries stay: those of the largest scores."""
        parts, stays = scores, self.count(scores.shape[1])
        if self.group is not None:
            parts, stays = scores.unflatten(1, (-1, self.group)), self.stays
        places = parts.topk(stays, dim=-1).indices
        mask = torch.zeros_like(parts, dtype=torch.bool).scatter_(-1, places, True)
        return mask.view(scores.shape)

    def follows(self, weight: Float[Tensor, "o i"]) -> bool:
        """Return whether no group, or no row, of a weight has more entries than may stay."""
        if self.fault(weight.shape[1]) is not None:
            return False
        parts = weight if self.group is None else weight.unflatten(1, (-1, self.group))
        stays = self.count(weight.shape[1]) if self.group is None else self.stays
        return bool((parts.count_nonzero(-1) <= stays).all())
