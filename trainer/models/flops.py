"""The floating-point operations of a training step by formula, and the part of the machine's peak
that they are.

    forward     2 N + 2 P a token, 2 V d a trained position, 4 L H w a pair of query and key
    backward    2 N + 4 P a token, 2 V d (4 V d if the head is trained), 8 L H w a pair

    N  frozen weights of linear layers that a token passes: of experts, those that it is sent to
    P  trained weights: adapters, and linear layers that are trained
    V, d  the output layer; logits are computed where a token is trained
    L, H, w  layers with attention, their query heads and the width of a head

A frozen weight passes a gradient to its input and gets none: 4 N where full training has 6 N. A
pair is a query with a key that it sees: n (n + 1) / 2 in a causal row of n tokens, fewer with a
window. Norms, activations and what is recomputed do not count, nor linear attention's states. So
this is model FLOP utilisation (Chowdhery et al. 2022, arXiv 2204.02311), for adapters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters.linear import features, is_linear, output_layer
from trainer.models.layer_config import of_layer

# FLOP/s of dense products in bf16 with sums in fp32, by the makers' data sheets; the first name
# that a device's name contains.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
TRIES = 5  # products that are timed, of which the fastest counts
# Rows of such a product: a machine's rate hardly grows with more.
ROWS_ON_CPU, ROWS_ON_GPU = 1024, 8192
SIDE_ON_CPU, SIDE_ON_GPU = 1024, 8192  # of its square weight


@dataclass(frozen=True)
class Counts:
    """The weights that a token meets, and its attention."""

    frozen: float  # N
    trained: float  # P
    head: float  # V d
    head_trained: bool
    # for each layer with attention: (H w, the keys that a query sees at most)
    attention: tuple[tuple[int, int | None], ...]

    def flop(self, tokens: float, trained: float, lengths: Sequence[int]) -> float:
        """Return the operations of a forward and a backward pass over rows of these lengths, which
        have so many tokens, and trained positions."""
        head = (6 if self.head_trained else 4) * self.head * trained
        seen = {window: _pairs_of(lengths, window) for window in {w for _, w in self.attention}}
        attention = sum(12.0 * width * seen[window] for width, window in self.attention)
        return (4 * self.frozen + 6 * self.trained) * tokens + head + attention


def pairs(n: int, window: int | None = None) -> int:
    """Return how many pairs of query and key a causal row of n tokens has."""
    beyond = max(0, n - window) if window else 0
    return n * (n + 1) // 2 - beyond * (beyond + 1) // 2


def _pairs_of(lengths: Sequence[int], window: int | None) -> int:
    """Return the pairs of many rows, of which few lengths differ."""
    each, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    return sum(
        pairs(n, window) * times for n, times in zip(each.tolist(), counts.tolist(), strict=True)
    )


def count(model: Any) -> Counts:
    """Count the weights of a model with what is attached to it."""
    output = output_layer(model)
    of_head = set(output.modules()) if output is not None else set()
    config = model.config.get_text_config()
    sizes = {True: 0.0, False: 0.0}  # by whether they are trained
    for module in model.modules():
        if module in of_head or isinstance(module, nn.Embedding):
            continue
        if is_linear(module):
            i, o = features(module)
            sizes[module.weight.requires_grad] += i * o
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:
                sizes[weight.requires_grad] += weight.numel() * _active(config)
            elif weight.ndim == 2 and weight.requires_grad:
                sizes[True] += weight.numel()
    heads = [m for m in of_head if is_linear(m)]
    return Counts(
        sizes[False],
        sizes[True],
        float(max((features(m)[0] * features(m)[1] for m in heads), default=0)),
        any(m.weight.requires_grad for m in heads),  # type: ignore[union-attr]
        _attention(config),
    )


def _active(config: Any) -> float:
    """Return the share of experts that a token is sent to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / total if isinstance(chosen, int) and total else 1.0


def _attention(config: Any) -> tuple[tuple[int, int | None], ...]:
    """Return (H w, window) of each layer with attention."""
    layers = getattr(config, "num_hidden_layers", None) or 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    attending: list[tuple[int, int | None]] = []
    for index, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            continue
        layer = of_layer(config, index)
        heads = getattr(layer, "num_attention_heads", None)
        if not isinstance(heads, int):
            continue
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        window = None if kind == "full_attention" else getattr(layer, "sliding_window", None)
        attending.append((heads * width, window))
    return tuple(attending)


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s that products reach at most on a device, and where the number is from: a
    data sheet, else the fastest of TRIES large products."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, rate in PEAKS.items():
            if known in name:
                return rate, f"data sheet of {known}"
    cuda = device.type == "cuda"
    rows, side = (ROWS_ON_GPU, SIDE_ON_GPU) if cuda else (ROWS_ON_CPU, SIDE_ON_CPU)
    x = torch.ones(rows, side, dtype=dtype, device=device)
    weight = torch.ones(side, side, dtype=dtype, device=device)
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(TRIES):
        started = clock()
        x @ weight.t()
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
    return 2.0 * rows * side * side / best, "measured"


@dataclass(frozen=True)
class Work:
    """The operations of a run's training, by token, and the peak of its machines."""

    counts: Counts
    mean_attention: float  # operations of attention a token, by the mean of the training rows
    peak: float  # FLOP/s of a device

    @classmethod
    def of(cls, model: Any, lengths: Sequence[int], peak: float) -> Work:
        """Return the work of a model on training rows of these lengths."""
        counts, tokens = count(model), max(1, int(np.sum(lengths)))
        return cls(counts, counts.flop(0, 0, lengths) / tokens, peak)

    def rate(self, tokens: float, trained: float) -> float:
        """Return the FLOP/s of so many tokens and trained positions a second."""
        return self.counts.flop(tokens, trained, ()) + self.mean_attention * tokens
