"""The part of a long text that a small model reads, to draft in less time (the lossless half of
RAPID, arXiv 2502.20330). What a draft was read from never changes the text.

    last:N    the last N tokens
    bm25:N    the last N/2 tokens, and before them the chunks that share most with these:

    score(c) = Σ_w idf(w) f (k1 + 1) / (f + k1 (1 - b + b |c| / mean))        f = count of w in c
    idf(w)   = log(1 + (n - n_w + 0.5) / (n_w + 0.5))             n chunks, n_w of them with w

w are the different tokens of the last N/2, k1 = 1.2 and b = 0.75 (Robertson and Zaragoza 2009). The
chosen chunks have N/2 tokens together and keep their order.

Differs from the paper: there a model of embeddings ranks the chunks, and the target's own
distribution is moved towards the draft's, which changes the text.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from jaxtyping import Int
from torch import Tensor

from trainer.config.decoding_options import context_of

K1, B = 1.2, 0.75
CHUNKS = 8  # of the half that is chosen


class Context:
    """A setting such as `last:512`; `all` never shortens a text."""

    def __init__(self, setting: str = "all"):
        self.kind, self.size = context_of(setting)

    def of(self, text: Int[Tensor, " t"]) -> Int[Tensor, " n"]:
        """Return the tokens to read of a text, at most `size`."""
        if self.kind == "all" or len(text) <= self.size:
            return text
        if self.kind == "last":
            return text[-self.size :]
        tail = self.size // 2
        ids = text.tolist()
        spans = chosen(ids[:-tail], ids[-tail:], self.size - tail)
        return torch.cat([*(text[start:end] for start, end in spans), text[-tail:]])


def chosen(before: list[int], question: list[int], size: int) -> list[tuple[int, int]]:
    """Return the chunks [start, end) of the tokens `before` that share most with a question, in the
    text's order. They have at most `size` tokens together."""
    length = max(1, size // CHUNKS)
    starts = range(0, len(before), length)
    counts = [Counter(before[start : start + length]) for start in starts]
    scores = bm25(counts, set(question))
    best = sorted(range(len(counts)), key=lambda place: (-scores[place], -place))
    places = sorted(best[: size // length])
    return [(place * length, min(len(before), (place + 1) * length)) for place in places]


def bm25(counts: list[Counter[int]], words: set[int]) -> list[float]:
    """Return the score of each chunk, given its counts of tokens."""
    mean = sum(count.total() for count in counts) / max(1, len(counts))
    scores = [0.0] * len(counts)
    for word in words:
        holders = [place for place, count in enumerate(counts) if word in count]
        idf = math.log(1 + (len(counts) - len(holders) + 0.5) / (len(holders) + 0.5))
        for place in holders:
            often = counts[place][word]
            norm = K1 * (1 - B + B * counts[place].total() / mean)
            scores[place] += idf * often * (K1 + 1) / (often + norm)
    return scores
