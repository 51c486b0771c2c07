"""One text while it is decoded: the tokens of each pass of the target, and what it gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.decoding import positions
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Continuation, Decoder, Strategy
from trainer.drafters import Drafter, Target
from trainer.models import losses


@dataclass(frozen=True)
class Token:
    """A new token. Log-probabilities are those of the target's own distribution, before
    temperature and top-p, in nats."""

    id: int
    drafted: bool  # whether the drafter had proposed it
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, the best one first


@dataclass(frozen=True)
class Pass:
    """One pass of the target."""

    tokens: list[Token]
    drafted: int  # tokens that were drafted for it, accepted or not


class Streaming(Decoder):
    """Decodes one text and hands each pass to `report`, which may raise an exception to stop.

    `top` is the number of likeliest tokens whose log-probabilities are reported; None reports no
    log-probability at all. The tokens are those of `speculative.generate`. `report_prompt` gets the
    prompt's own tokens first; the first of them has no log-probability.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        max_new_tokens: int,
        stops: Iterable[int],
        sampling: Sampling,
        strategy: Strategy,
        report: Callable[[Pass], None],
        top: int | None = None,
        report_prompt: Callable[[list[Token]], None] | None = None,
    ):
        super().__init__(target, drafter, max_new_tokens, stops, sampling, strategy)
        self.report, self.top, self.report_prompt = report, top, report_prompt

    @torch.no_grad()
    def read(self, prompt: Int[Tensor, " n"]) -> None:
        """Read the prompt, for `report_prompt`."""
        positions.reset_tables(self.target.model)
        self.prefill([prompt])

    def prefill(self, prompts: Sequence[Int[Tensor, " n"]]) -> list[Continuation]:
        rows = super().prefill(prompts)
        (row,) = rows
        if self.report_prompt is not None:
            self.report_prompt(self._of_prompt(prompts[0], row.update.hidden))
        self.report(Pass(self._tokens(row.tokens, 0, row, [0]), 0))
        return rows

    def _append(
        self, row: Continuation, parents: Sequence[int], path: Sequence[int], text: list[int]
    ) -> None:
        before = len(row.tokens)
        super()._append(row, parents, path, text)
        # each token was drawn from the logits after the one before it
        places = [0, *(node + 1 for node in path)]
        tokens = self._tokens(row.tokens[before:], len(path), row, places)
        self.report(Pass(tokens, len(parents)))

    def _tokens(
        self, ids: list[int], accepted: int, row: Continuation, places: list[int]
    ) -> list[Token]:
        """Return tokens, of which the first `accepted` were drafted. `places` are the rows of the
        pass's logits that they were drawn from."""
        drafted = [number < accepted for number in range(len(ids))]
        if self.top is None:
            return [Token(*pair) for pair in zip(ids, drafted, strict=True)]
        assert row.update.tried is not None
        return self._scored(ids, drafted, row.update.tried[1][places[: len(ids)]])

    def _of_prompt(self, prompt: Int[Tensor, " n"], hidden: Float[Tensor, "n d"]) -> list[Token]:
        """Return the prompt's tokens. Logits are computed for a few positions at a time."""
        ids = prompt.tolist()
        if self.top is None:
            return [Token(id_, False) for id_ in ids]
        tokens = [Token(ids[0], False)]
        count = losses.positions(self.vocabulary_size, hidden.device.type)
        for start in range(0, len(ids) - 1, count):
            rows = hidden[start : min(start + count, len(ids) - 1)]
            some = ids[start + 1 : start + 1 + len(rows)]
            tokens += self._scored(some, [False] * len(some), self.target.head(rows))
        return tokens

    def _scored(
        self, ids: list[int], drafted: list[bool], logits: Float[Tensor, "n V"]
    ) -> list[Token]:
        """Return tokens with their log-probabilities by the logits that each was drawn from."""
        assert self.top is not None
        rows = log_probabilities(logits)
        own = rows.gather(1, torch.tensor(ids, device=rows.device).unsqueeze(1))[:, 0].tolist()
        values, indices = rows.topk(self.top, dim=-1)
        tops = [
            tuple(zip(*pair, strict=True))
            for pair in zip(indices.tolist(), values.tolist(), strict=True)
        ]
        return [Token(*parts) for parts in zip(ids, drafted, own, tops, strict=True)]


def log_probabilities(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """Return log-probabilities in fp32."""
    return logits.float().log_softmax(-1)
