"""Features in whose space all directions vary equally.

    μ, Σ = mean and covariance of the rows of all stores, Σ + λ I = C Cᵀ (Cholesky)
    z = C⁻¹ (x - μ)

λ is 1e-5 of the mean eigenvalue, and a tenth of it if there are fewer than ten rows for each
dimension: whitening a noisy covariance would inflate its noise.

Leverage of row i: z_i · z_i / n is the diagonal of X (XᵀX)⁻¹ Xᵀ of the centred rows, at λ = 0.

Source: TAROT (Feng et al. 2025, arXiv 2412.00420) whitens gradients; leverage scores are the l2
sensitivities of Munteanu et al.'s setting (arXiv 2306.00732).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from trainer.selection.store import Store

FEW = 10  # rows for each dimension, below which the ridge is large
RIDGE, LARGE_RIDGE = 1e-5, 0.1  # of the mean eigenvalue


class Whitening:
    """The transformation, computed in two passes over the stores' blocks."""

    def __init__(self, *stores: Store):
        n, d = sum(store.n for store in stores), stores[0].d
        total = np.zeros(d)
        for store in stores:
            for _, block in store.blocks():
                total += block.sum(0)
        self.mean = total / n
        covariance = np.zeros((d, d))
        for store in stores:
            for _, block in store.blocks():
                centred = block - self.mean
                covariance += centred.T @ centred
        covariance /= n
        scale = np.trace(covariance) / d
        self.ridge = (RIDGE if n >= FEW * d else LARGE_RIDGE) * scale
        if scale == 0 or not np.isfinite(scale):
            raise ValueError("the rows' features do not differ")
        self.factor = torch.from_numpy(np.linalg.cholesky(covariance + self.ridge * np.eye(d)))

    def blocks(self, store: Store) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, whitened features (b, d)) of a store."""
        for first, block in store.blocks():
            centred = torch.from_numpy(block - self.mean)
            # z Cᵀ = x - μ
            solved = torch.linalg.solve_triangular(self.factor.t(), centred, upper=True, left=False)
            yield first, solved.numpy()

    def directions(self, store: Store) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, whitened features of length 1 (b, d))."""
        for first, block in self.blocks(store):
            lengths = np.linalg.norm(block, axis=1, keepdims=True)
            yield first, block / np.maximum(lengths, 1e-30)

    def leverage(self, store: Store) -> np.ndarray:
        """Return the leverage of each row, (n,)."""
        parts = [np.square(block).sum(1) for _, block in self.blocks(store)]
        return np.concatenate(parts) / store.n
