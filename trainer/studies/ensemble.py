"""A mixture of the adapters of several runs of one base, weighed token by token.

    p(x_t | x_<t) = Σ_j π_j(t) p_j(x_t | x_<t)        π_j(t) ∝ w_j p_j(x_1 ... x_{t-1})

p_j is the base with the adapter of run j, w_j its prior weight. The tokens read so far, those of
the prompt included, say which run knows this text: the mixture's π is their posterior. A route
takes one run for a whole answer: that of the least perplexity on the prompt.

The loss of the mixture on a text is at most log J above that of its best run, over all tokens.

Source: HDEE (arXiv 2502.19385), branch-train-merge (arXiv 2208.03306). There the experts are whole
models; here they are adapters of one base, which are run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adapters.errors import AdapterError
from tasks.reading import DataError
from trainer.assembly.rows import load_held_out
from trainer.assembly.trained import load_trained
from trainer.storage import run_folder
from trainer.storage.progress import Progress

CHUNK = 128  # positions whose logits are in memory at once
WAYS = ("uniform", "mixture", "route")


@dataclass
class HeldRows:
    """Rows that one of the runs holds out."""

    run: str
    ids: list[list[int]]
    trained: list[Tensor]  # (T - 1,) bool: whether token t + 1 is trained
    logs: list[list[Tensor]]  # by expert, by row: (T - 1,) log p_j of token t + 1


def measure(runs: list[str], rows: int, top: int | None) -> list[dict[str, Any]]:
    """Return for the first `rows` held-out rows of each run their loss per trained token under each
    run, under the mixtures and under the route, and the share of rows routed to their own run.

    Raises:
        AdapterError: the runs have different bases, or one has no adapter of a language model.
        DataError: a run holds out no rows.
    """
    check(runs)
    sets: list[HeldRows] = []
    for run in runs:
        loaded = load_trained(run)
        data = load_held_out(loaded.config | {"packing": False}, loaded.base, loaded.task)
        assert data.held_out is not None
        table = data.held_out.sequences.rows
        chosen = [table[row] for row in range(min(rows, len(table)))]
        masks = [torch.tensor(row.trained[1:]) for row in chosen]
        sets.append(HeldRows(run, [row.ids for row in chosen], masks, []))
    if not all(mask.any() for part in sets for mask in part.trained):
        raise DataError("a held-out row has no trained token, so it has no loss: leave it out")
    for run in runs:
        _ask(run, sets)
    return [_numbers(part, position, top) for position, part in enumerate(sets)]


def check(runs: list[str]) -> None:
    """Check that the adapters of these runs can be mixed.

    Raises:
        AdapterError: they cannot; the message says why.
    """
    contents = [run_folder.read(run)[1] for run in runs]
    for run, content in zip(runs, contents, strict=True):
        identity = content["identity"]
        if identity["labels"] is not None or identity.get("target") is not None:
            what = "a classifier" if identity["labels"] is not None else "a draft head"
            raise AdapterError(f"{run} trained {what}: a mixture is of runs that write text")
        first = contents[0]
        keys = ("quantization", "add_tokens")
        one, two = ([c["config"]["base"].get(key) for key in keys] for c in (first, content))
        if identity["base"] != first["identity"]["base"] or one != two:
            raise AdapterError(
                f"{runs[0]} and {run} have different bases: {first['config']['base'].get('path')}"
                f" and {content['config']['base'].get('path')}, whose tokens may differ. Give runs"
                " of one base"
            )


@torch.no_grad()
def _ask(run: str, sets: list[HeldRows]) -> None:
    """Add the run's log-probabilities to all rows."""
    loaded = load_trained(run, "cuda" if torch.cuda.is_available() else "cpu")
    if loaded.base.decoder_start is not None:
        raise AdapterError(
            f"{run} is of an encoder-decoder, whose prompts have no probability: leave it"
            " out of runs="
        )
    device = next(loaded.model.parameters()).device
    with Progress(f"rows under {run}", sum(len(part.ids) for part in sets), "rows") as progress:
        for part in sets:
            part.logs.append([])
            for ids in part.ids:
                part.logs[-1].append(_logs(loaded.model, ids, device))
                progress.advance()


def _logs(model: Any, ids: list[int], device: torch.device) -> Float[Tensor, " T"]:
    """Return log p of each token but the first."""
    tokens = torch.tensor([ids], device=device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, -len(ids) :]
    parts = []
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = logits[start : min(start + CHUNK, len(ids) - 1)].float()
        targets = tokens[0, start + 1 : start + 1 + len(chunk), None]
        parts.append(chunk.gather(-1, targets)[:, 0] - chunk.logsumexp(-1))
    return torch.cat(parts).double().cpu()


def mixture(
    logs: Float[Tensor, "J T"], posterior: bool = True, top: int | None = None
) -> Float[Tensor, " T"]:
    """Return log p of each token under the mixture of J runs with equal priors, of which `logs` are
    theirs. Without `posterior` the weights stay equal. `top` keeps that many runs at each token,
    those of the largest weight."""
    runs = len(logs)
    weights = torch.zeros_like(logs)
    if posterior:
        weights[:, 1:] = logs.cumsum(1)[:, :-1]
    if top is not None and top < runs:
        least = weights.topk(top, 0).values[-1]
        weights = weights.masked_fill(weights < least, float("-inf"))
    return (weights.log_softmax(0) + logs).logsumexp(0)


def route(logs: Float[Tensor, "J T"], trained: Bool[Tensor, " T"]) -> int:
    """Return the run of the least perplexity on the prompt: the tokens before the first trained
    one. Of equal ones the first."""
    prompt = int(trained.nonzero()[0])
    return int(logs[:, :prompt].sum(1).argmax())


def _numbers(part: HeldRows, own: int, top: int | None) -> dict[str, Any]:
    sums: dict[str, float] = dict.fromkeys([*map(str, range(len(part.logs))), *WAYS], 0.0)
    tokens = routed = 0
    for row, trained in enumerate(part.trained):
        logs = torch.stack([of_run[row] for of_run in part.logs])
        chosen = route(logs, trained)
        ways = {
            **{str(run): logs[run] for run in range(len(logs))},
            "uniform": mixture(logs, posterior=False),
            "mixture": mixture(logs, top=top),
            "route": logs[chosen],
        }
        for name, values in ways.items():
            sums[name] -= float(values[trained].sum())
        tokens += int(trained.sum())
        routed += chosen == own
    losses = {name: total / tokens for name, total in sums.items()}
    return {
        "run": part.run,
        "rows": len(part.ids),
        "runs": [losses[str(run)] for run in range(len(part.logs))],
        **{name: losses[name] for name in WAYS},
        "routed_to_own": routed / len(part.ids),
    }


def table(runs: list[str], results: Iterable[dict[str, Any]]) -> Any:
    """Return the table: for each run's rows a line, for each run and way a column."""
    from rich.table import Table

    result = Table("held-out rows of", *runs, *WAYS, "routed to their run")
    for part in results:
        numbers = [*part["runs"], *(part[way] for way in WAYS)]
        share = f"{part['routed_to_own']:.0%} of {part['rows']}"
        result.add_row(part["run"], *(f"{number:.4f}" for number in numbers), share)
    return result
