"""Best-fit packing of rows into sequences."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Rows in as few sequences of `capacity` tokens as best-fit decreasing finds; equal lengths in
    seeded order."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    open_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set while some pack has exactly s tokens of space
    for row in order.tolist():
        length = int(lengths[row])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            index = open_by_space[space].pop()
            if not open_by_space[space]:
                spaces &= ~(1 << space)
            packs[index].append(row)
        else:
            space, index = capacity, len(packs)
            packs.append([row])
        left = space - length
        open_by_space.setdefault(left, []).append(index)
        spaces |= 1 << left
    return packs
