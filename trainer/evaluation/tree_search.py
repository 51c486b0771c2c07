"""The search for a static tree: for a drafter, its prompts and this machine, measured and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table

from tasks.reading import DataError
from trainer.assembly.trained import Trained
from trainer.decoding import calibration, profit, speculative, trees
from trainer.decoding.calibration import Ranks, Text
from trainer.decoding.target_cache import allow_trees
from trainer.drafters import Drafter, DrafterError, Target
from trainer.evaluation.decode_ways import WARM_UP_TOKENS
from trainer.storage.progress import Progress

# The pass over one token is the same work as a chain and as a tree: a larger ratio is a sign of
# other programs.
MAX_RATIO_OF_SHAPES = 1.2
MAX_RATIO_TO_LEAST = 1.5  # the median of a pass's repetitions over their least

Passes = Mapping[str, Mapping[int, Sequence[float]]]  # seconds by shape and number of tokens


@dataclass(frozen=True)
class SearchLimits:
    """Limits of a searched tree, and the length of the measured answers."""

    size: int  # nodes
    top_k: int  # children of a node
    count: int | None  # levels; None: as many as the drafter can propose
    max_new_tokens: int


def search_tree(
    run: Trained,
    drafter: Drafter,
    prompts: list[list[int]],
    stops: list[int],
    limits: SearchLimits,
) -> dict[str, Any]:
    """Return as plain data the tree for this drafter, these prompts and this machine, its expected
    effect, and the measurements.

    Raises:
        DataError: the prompts' answers are too short.
        DrafterError: the drafter builds its own trees, or cannot draft for its target.
    """
    calibration.refuse_own_trees(drafter)
    target = Target(run.model)
    texts = _texts(target, drafter, prompts, stops, limits.max_new_tokens)
    longest = max(texts, key=lambda text: len(text.ids) - text.start)
    if len(longest.ids) - longest.start < 2:
        raise DataError(
            "no answer to these prompts has a second token, which is the first that is drafted:"
            " give other prompts"
        )
    branches, no_trees = _can_branch(target, drafter, longest)
    widths = {"chain": 1} | ({"tree": limits.top_k} if branches else {})
    width, depth = max(widths.values()), min(drafter.depth, limits.count or trees.LONGEST)
    with Progress("measuring the drafter's guesses", len(texts), "texts") as progress:
        ranks = [
            calibration.ranks(target, drafter, text, width, depth) for text in progress.each(texts)
        ]
    with Progress("timing the target's passes"):
        passes = calibration.time_verification(
            target,
            longest.ids[: max(1, run.base.longest - limits.size - 1)],
            sorted({limits.size + 1, *(n for n in calibration.WIDTHS if n <= limits.size)}),
            trees=branches,
            layers=drafter.layers,
        )
    verify = calibration.least_seconds(passes, limits.size)
    best = calibration.fastest_tree(
        ranks,
        widths,
        verify,
        lambda paths: calibration.time_drafting(target, drafter, longest, paths),
    )
    return {
        "prompts": len(prompts),
        "max_new_tokens": limits.max_new_tokens,
        "no_trees": no_trees,
        "busy": busy(passes),
        **_expected(best, verify["chain"][0]),
        **_measured(ranks, width, passes, verify),
        "profit": _profit(target, drafter, texts, ranks, verify["chain"]),
    }


def _profit(
    target: Target,
    drafter: Drafter,
    texts: Sequence[Text],
    ranks: Sequence[Ranks],
    verify: Sequence[float],
) -> dict[str, list[float]]:
    """Return what trainer.decoding.profit reads: seconds and acceptance of chains, temperatures."""
    rates = [row[0] for row in calibration.acceptance(ranks, 1)][: len(verify) - 1]
    longest = max(texts, key=lambda text: len(text.ids) - text.start)
    chains = [[(0,) * length for length in range(1, 1 + last)] for last in range(1, 1 + len(rates))]
    drafting = calibration.time_drafting(target, drafter, longest, chains) if chains else []
    with Progress("measuring predicted acceptance", len(texts), "texts") as progress:
        drafts = [
            draft
            for text in progress.each(texts)
            for draft in calibration.observed(target, drafter, text, len(rates))
        ]
    seconds = [a + b for a, b in zip(verify, [0.0, *drafting], strict=False)]
    return {
        "seconds": seconds,
        "acceptance": rates,
        "temperatures": profit.temperatures(drafts),
    }


def _texts(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    stops: list[int],
    max_new_tokens: int,
) -> list[Text]:
    ids = [
        torch.tensor(prompt, device=next(target.model.parameters()).device) for prompt in prompts
    ]
    # A drafter that cannot draft fails here, before the long measurements.
    speculative.generate(target, drafter, ids[0], min(WARM_UP_TOKENS, max_new_tokens), stops)
    with Progress("answering the prompts", len(ids), "prompts") as progress:
        return [
            calibration.greedy_text(target, drafter, prompt, max_new_tokens, stops)
            for prompt in progress.each(ids)
        ]


def _can_branch(target: Target, drafter: Drafter, text: Text) -> tuple[bool, str | None]:
    """Return whether trees are possible, and why the target cannot read them."""
    if not calibration.can_branch(target, drafter, text):
        return False, None
    try:
        allow_trees(target)
    except DrafterError as error:
        return False, str(error)
    return True, None


def _expected(best: calibration.Step, plain_seconds: float) -> dict[str, Any]:
    return {
        "paths": [list(path) for path in best.paths],
        "tokens": best.tokens,
        "draft_ms": 1000 * best.draft,
        "verify_ms": 1000 * best.verify,
        "plain_ms": 1000 * plain_seconds,
        "ratio": best.tokens * plain_seconds / best.seconds,
    }


def _measured(
    ranks: Sequence[Ranks], width: int, passes: Passes, verify: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    return {
        "places": sum(map(len, ranks)),
        "acceptance": calibration.acceptance(ranks, width),
        "passes_ms": {
            shape: {f"{n}": 1000 * verify[shape][n - 1] for n in seconds}
            for shape, seconds in passes.items()
        },
    }


def busy(passes: Passes) -> str | None:
    """Return a sign in the seconds of passes (`calibration.time_verification`) that other programs
    ran on the machine, or None."""
    single = {shape: 1000 * min(seconds[1]) for shape, seconds in passes.items()}
    if max(single.values()) > MAX_RATIO_OF_SHAPES * min(single.values()):
        return "the pass over one token took at least " + " and ".join(
            f"{ms:.3g} ms as a {shape}" for shape, ms in single.items()
        )
    spreads = [
        (median(seconds) / min(seconds), shape, n, seconds)
        for shape, widths in passes.items()
        for n, seconds in widths.items()
    ]
    spread, shape, n, seconds = max(spreads, key=lambda entry: entry[0])
    if spread <= MAX_RATIO_TO_LEAST:
        return None
    tokens = "one token" if n == 1 else f"{n} tokens"
    return (
        f"the pass over {tokens} as a {shape} took {1000 * min(seconds):.3g} ms at least and"
        f" {1000 * median(seconds):.3g} ms in the median"
    )


def search_report(result: dict[str, Any], file: str | None) -> Iterator[Table | str]:
    """Yield the tables and lines of a search; `file` is where the tree's paths are written."""
    best_ranks = min(5, len(result["acceptance"][0])) if result["acceptance"] else 0
    table = Table(
        "draft position",
        *(f"rank {rank}" for rank in range(1, best_ranks + 1)),
        title=f"right guesses after right ones, of {result['places']} drafts",
    )
    for depth, row in enumerate(result["acceptance"], 1):
        table.add_row(f"{depth}", *(f"{share:.1%}" for share in row[:best_ranks]))
    yield table
    table = Table("tokens of a pass", *(f"{n}" for n in result["passes_ms"]["chain"]))
    for shape, times in result["passes_ms"].items():
        table.add_row(f"{shape}, ms", *(f"{ms:.3g}" for ms in times.values()))
    yield table
    if result["busy"]:
        yield (
            "Warning: the machine seems busy, and this may not be the best tree."
            f" {result['busy'].capitalize()}. Measure again."
        )
    if result["no_trees"]:
        yield f"Chains only: {result['no_trees']}."
    if not result["paths"]:
        yield (
            "Drafting does not pay here: no tree gives more tokens a second than a pass of"
            f" {result['plain_ms']:.3g} ms for each. " + (f"{file} is not written." if file else "")
        )
        return
    paths, step_ms = result["paths"], result["draft_ms"] + result["verify_ms"]
    yield (
        f"Tokens to draft: {len(paths)}, up to {len(paths[-1])} after one another. A step gives"
        f" {result['tokens']:.2f} tokens, including the target's own, and takes {step_ms:.3g} ms,"
        f" {result['draft_ms']:.3g} to draft and {result['verify_ms']:.3g} to verify; without a"
        f" draft a token takes {result['plain_ms']:.3g} ms. So {result['ratio']:.2f} times as many"
        " tokens a second are expected, without the prompt's pass and bookkeeping."
    )
    yield f"tree=static paths={file}" if file else json.dumps(paths)
