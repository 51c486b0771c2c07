"""The scores that choose RoSA's mask: sums over micro-batches of each entry's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapters import mask
from adapters.delta import AdapterError
from adapters.sparse import SparseDelta

CANDIDATES = 4  # scores=candidates sums this many times the support's entries
CHUNK = 1 << 22  # scores that are copied to the CPU at one time


class Scores:
    """Sums over micro-batches of G² or G of one layer, in fp32.

    `kind` is one of:
        exact       sums for all (o, i) entries, in the CPU's memory
        candidates  sums for the 4 k entries that are largest in the first micro-batch
        first       no sums: the k entries that are largest in the first micro-batch
    """

    def __init__(
        self,
        delta: SparseDelta,
        kind: str,
        squared: bool,
        name: str,
        allowed: Callable[[], Tensor | None] = lambda: None,
    ):
        self.shape, self.k = (delta.o, delta.i), len(delta.indices)
        self.allowed = allowed  # which entries may be chosen, (o·i,) bool; None: all
        self.kind, self.squared, self.name = kind, squared, name
        self.sums: Tensor | None = None
        # of the current step, whose loss scale is known only when it ends
        self.step_sums: Tensor | None = None
        self.flat: Tensor | None = None  # the candidates
        self.count = self.step_count = 0

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add one micro-batch. A gradient that is not finite is ignored, as its step is."""
        if self.kind == "first" and self.count + self.step_count:
            return
        wide = torch.promote_types(x.dtype, torch.float32)
        gradient = dy.to(wide).t() @ x.to(wide)
        if not torch.isfinite(gradient).all():
            return
        o, i = self.shape
        self.step_count += 1
        if self.kind == "exact":
            if self.step_sums is None:
                self.step_sums = torch.zeros(o, i)
            rows = max(1, CHUNK // i)
            for start in range(0, o, rows):
                chunk = slice(start, start + rows)
                self.step_sums[chunk] += self._score(gradient[chunk]).cpu()
            return
        scores = self._score(gradient).view(-1)
        if self.flat is None:
            count = self.k if self.kind == "first" else min(CANDIDATES * self.k, o * i)
            self.flat = mask.top(mask.among(scores.abs(), self.allowed()), count, self.name)
        at_candidates = scores.index_select(0, self.flat)
        self.step_sums = at_candidates if self.step_sums is None else self.step_sums + at_candidates

    def end_step(self, loss_scale: float, device: torch.device) -> None:
        """Add the current step to the sums.

        The sums are over all processes, since only rank 0 writes checkpoints. The loss scale of
        16-mixed, which changes from step to step, is divided out.
        """
        if mask.processes() > 1:
            total = (
                torch.zeros(self.shape, device=device)
                if self.step_sums is None
                else self.step_sums.to(device)
            )
            count = torch.tensor(self.step_count, device=device)
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
            self.step_sums, self.step_count = total.cpu(), int(count)
        if self.step_sums is not None:
            self.step_sums /= loss_scale**2 if self.squared else loss_scale
            self.sums = self.step_sums if self.sums is None else self.sums.add_(self.step_sums)
            self.step_sums = None
            self.count, self.step_count = self.count + self.step_count, 0

    def _score(self, gradient: Tensor) -> Tensor:
        return gradient.float().square() if self.squared else gradient.float()

    def support(self, device: torch.device) -> Tensor:
        """Return the k entries of largest score.

        Raises:
            AdapterError: no micro-batch had a finite gradient, or the scores are not finite.
        """
        if self.step_sums is not None:
            self.end_step(1.0, device)
        if self.sums is None or not self.count:
            raise AdapterError(
                f"no micro-batch of the mask's steps had a finite gradient at {self.name}: lower"
                " optimizer.lr, raise the warm-up, or look at the rows"
            )
        scores, allowed = self.sums.abs().to(device), self.allowed()
        if allowed is not None and self.flat is not None:
            allowed = allowed[self.flat.long()]
        chosen = mask.top(mask.among(scores, allowed), self.k, self.name)
        return chosen if self.flat is None else self.flat.to(device).index_select(0, chosen)

    def state(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint between two of the mask's steps."""
        return {"sums": self.sums, "flat": self.flat, "count": self.count}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a `state`."""
        sums, flat = state["sums"], state["flat"]
        if self.kind != "exact":  # exact sums stay on the CPU
            sums = sums.to(device) if sums is not None else None
            flat = flat.to(device) if flat is not None else None
        self.sums, self.flat, self.count = sums, flat, state["count"]
