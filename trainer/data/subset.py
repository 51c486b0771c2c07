"""The share of the training rows that an epoch sees: repeated random sampling, RS2.

Each epoch trains on m = round(share · n) of n sequences. By `draw`:

    fresh        successive slices of one permutation; the last slice of it is filled up at random,
                 and the next epoch begins another permutation. ⌈n / m⌉ epochs see every sequence
    independent  a draw for each epoch, whatever the earlier ones have seen
    fixed        the first slice in every epoch: a subset chosen once, to compare with

With `strata` (a class for each sequence) every slice has as many of each class as its share of the
sequences, up to one or two: a class's members are spread evenly over the permutation.

An epoch's rows depend on (seed, epoch) only, so that a resumed run sees the same.

Source: Okanovic et al. 2024 (RS2, arXiv 2305.18424), whose "without replacement" is `fresh` and
whose "with replacement" is `independent`.

Differs from the paper: a slice that the permutation does not fill has other random rows of the same
permutation, so that no epoch sees a row twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STREAM = 0x5253  # keeps these draws apart from those of the order within an epoch


@dataclass(frozen=True)
class Subset:
    """The rows of each epoch, as a function of its number."""

    count: int  # n
    share: float
    seed: int
    draw: str = "fresh"
    strata: np.ndarray | None = None  # (n,), the class of each sequence

    @property
    def size(self) -> int:
        """Sequences of an epoch: at least one, unless there are none."""
        return min(self.count, max(1, round(self.share * self.count)))

    def of(self, epoch: int) -> np.ndarray:
        """Return the sequences of an epoch, (m,) int64, all different, in no particular order."""
        m = self.size
        if self.draw == "fixed":
            return self._permutation(0)[:m]
        if self.draw == "independent":
            return self._permutation(epoch)[:m]
        slices = -(-self.count // m)
        permutation, slot = divmod(epoch, slices)
        order = self._permutation(permutation)
        missing = m - len(order[slot * m : (slot + 1) * m])
        filler = self._rng(permutation, 1).permutation(order[: slot * m])[:missing]
        return np.concatenate([order[slot * m : (slot + 1) * m], filler])

    def _permutation(self, number: int) -> np.ndarray:
        rng = self._rng(number, 0)
        order = rng.permutation(self.count)
        if self.strata is None:
            return order
        places = np.empty(self.count)
        for stratum in np.unique(self.strata):
            members = order[self.strata[order] == stratum]
            places[members] = (np.arange(len(members)) + rng.random()) / len(members)
        return order[np.argsort(places[order], kind="stable")]

    def _rng(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, STREAM, number, purpose])
