"""Best-fit packing of rows into sequences."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Pack rows of some `lengths` into sequences of at most `capacity` tokens, by best-fit
    decreasing. Rows of equal length come in seeded order. Returns the rows of each sequence."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    open_by_space: dict[int, list[int]] = {}
    # Bit s is set while some pack has exactly s tokens of space. One shift finds the smallest space
    # that fits a row.
    spaces = 0
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
