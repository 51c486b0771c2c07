"""The divergence of a smaller model from the whole one, and the search for the smallest
(search=evolution).

    KL(p ‖ q) ≥ Σ_top p (log p - log q) + p_rest (log p_rest - log q_rest)       mean over tokens

p are the whole model's next-token distributions and q those of the smaller one. Only the TOP most
likely tokens of p are kept, and what is left of p as one more token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.models.heads import after_output
from trainer.shrinking.evolution import Candidate, Search
from trainer.shrinking.walk import entry, run
from trainer.storage import atomic, door
from trainer.storage.progress import Progress

TOP = 64  # tokens of a distribution that are kept
CHUNK = 256  # positions whose logits exist at one time


# The layers that run for a candidate, in order. Each is as the candidate has it while it runs.
Layers = Callable[[Candidate], Iterator[int]]


class Divergence:
    """Judges candidates by rows that are drawn for each judgement."""

    def __init__(
        self,
        model: Any,
        layers: nn.ModuleList,
        rows: list[Int[Tensor, " t"]],
        device: torch.device,
        layers_of: Layers,
    ):
        self.model, self.layers, self.device, self.layers_of = model, layers, device, layers_of
        self.finish = after_output(model.config.get_text_config())
        self.states, self.arguments = entry(model, layers, rows)
        model.to(device)
        everything = iter(range(len(layers)))
        rows_of = list(range(len(rows)))
        self.teacher = [self._distribution(hidden) for hidden in self._after(rows_of, everything)]

    def __call__(
        self, candidates: list[Candidate], tokens: int, draw: random.Random
    ) -> list[float]:
        """Return the divergence of each candidate, over rows of at least so many tokens, or all."""
        order = draw.sample(range(len(self.states)), len(self.states))
        chosen, count = [], 0
        for place in order:
            if count >= tokens:
                break
            chosen.append(place)
            count += self.states[place].shape[1]
        return [self.of(candidate, chosen) for candidate in candidates]

    @torch.no_grad()
    def of(self, candidate: Candidate, rows: list[int]) -> float:
        """Return the mean divergence over the tokens of some rows."""
        total = count = 0.0
        results = self._after(rows, self.layers_of(candidate))
        for row, hidden in zip(rows, results, strict=True):
            places, log_p = self.teacher[row]
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                log_q = _with_rest(self._logits(hidden[part]), places[part].to(self.device))
                p = log_p[part].to(self.device)
                total += float((p.exp() * (p - log_q)).sum())
            count += len(hidden)
        return total / max(1.0, count)

    @torch.no_grad()
    def _after(self, rows: list[int], layers: Iterator[int]) -> Iterator[Float[Tensor, "t d"]]:
        """Yield the states of each row after some layers and the final norm."""
        states = [self.states[row] for row in rows]
        for index in layers:
            states = [
                run(self.layers[index], state, self.arguments[state.shape[1]][index], self.device)
                for state in states
            ]
        for state in states:
            yield self._norm()(state.to(self.device))[0]

    def _norm(self) -> Any:
        body = self.model.base_model
        names = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
        places = [body, getattr(body, "decoder", body)]
        norms = (getattr(place, name, None) for place in places for name in names)
        return next((norm for norm in norms if norm is not None), nn.Identity())

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.finish(self.model.get_output_embeddings()(hidden))
        return logits.float()

    @torch.no_grad()
    def _distribution(self, hidden: Float[Tensor, "t d"]) -> tuple[Tensor, Tensor]:
        """Return (places of the TOP tokens, log p of them and of the rest) of each position."""
        places, values = [], []
        for start in range(0, len(hidden), CHUNK):
            logits = self._logits(hidden[start : start + CHUNK])
            top = logits.topk(min(TOP, logits.shape[-1] - 1), dim=-1).indices
            places.append(top.cpu())
            values.append(_with_rest(logits, top).cpu())
        return torch.cat(places), torch.cat(values)


def _with_rest(logits: Float[Tensor, "n v"], places: Int[Tensor, "n k"]) -> Float[Tensor, "n k1"]:
    """Return the logarithms of the probabilities at some places, and of all others together."""
    log_p = logits.log_softmax(-1)
    rest = log_p.scatter(-1, places, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, places), rest.clamp(min=-80.0)], -1)


def search(judge: Divergence, job: Search, start: Candidate, file: Path) -> dict[str, Any]:
    """Run a search to its end, or on from the generation in `file`. Return the number of
    generations, the best candidate, and the divergence of it and of `start` over all rows."""
    try:
        done = job.load(door.json_file(file, dict))
    except (OSError, ValueError):
        done = False
    total = job.settings.generations
    with Progress("search", total, "generations", done=job.generation if done else 0) as progress:
        if not done:
            job.start([start])
        while job.generation < total:
            job.step()
            atomic.write_text(file, json.dumps(job.state()))
            progress.advance(1)
    rows = list(range(len(judge.states)))
    assert job.parent is not None
    return {
        "generations": total,
        "best": job.parent,
        "divergence": judge.of(job.parent, rows),
        "divergence_start": judge.of(start, rows),
    }
