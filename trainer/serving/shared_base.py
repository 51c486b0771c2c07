"""One loaded base under several adapters.

Each run has modules of its own, with its adapter attached, and all share the base's tensors. So
switching between runs takes no time. A run costs the memory of its adapter, and on a CPU, if there
is enough, that of the weights into which its adapter is merged (trainer.decoding.merged).

An adapter may write into the base's weights (sparse deltas are folded into them, PiSSA takes its
part out of them, full fine-tuning trains them). Such a run gets copies, and those that turn out to
be unchanged are replaced by the base's own again. Only while it loads is there a second base.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trainer.models.base import Base, BaseError

# Adapters that never write into the base's weights: they need no copies while they are attached.
KEEP_THE_BASE = ("adapters.lora.LoRAAdapter", "adapters.full.Nothing")


class SharedBase:
    """Loads a base once, and gives each run a model that shares its tensors."""

    def __init__(self) -> None:
        self.model: Any = None
        self.key: dict[str, Any] = {}
        self.copies = True  # whether the next run's adapter may write into the base
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(
        self,
        base: Base,
        dtype: torch.dtype,
        labels: list[str] | None,
        device: torch.device | str,
    ) -> nn.Module:
        """Return a model for one run, as Base.load does.

        Raises:
            BaseError: as Base.load, or the runs are of several bases.
        """
        key = key_of(base, dtype)
        if self.model is None:
            self.model, self.key = base.load(dtype, labels, device), key
            self.model.requires_grad_(False)
        for name, value in self.key.items():
            if key[name] != value:
                raise BaseError(
                    f"the runs do not have one base: {name} is {value} for the first and"
                    f" {key[name]} for another. Serve each base by a process of its own, with"
                    " another port="
                )
        tensors = [*self.model.parameters(), *self.model.buffers()]
        memo: Any = {} if self.copies else {id(tensor): tensor for tensor in tensors}
        own = copy.deepcopy(self.model, memo)
        if self.copies:
            pairs = zip(own.parameters(), self.model.parameters(), strict=True)
            self._copied = [(copied, original) for copied, original in pairs]
        return own  # type: ignore[no-any-return]

    def share(self) -> None:
        """Replace the copies that the last run's adapter left as they were by the base's
        tensors."""
        for copied, original in self._copied:
            same = copied.shape == original.shape and copied.dtype == original.dtype
            if same and torch.equal(copied.data, original.data):
                copied.data = original.data
        self._copied = []


def key_of(base: Base, dtype: torch.dtype) -> dict[str, Any]:
    """Return what two runs must have in common to share a base."""
    return {
        "base": f"{base.path} ({base.fingerprint[:12]})",
        "precision": str(dtype).removeprefix("torch."),
        "base.quantization": base.quantization,
        "base.double_quant": base.double_quant,
        "base.add_tokens": [*base.add_tokens],
    }
