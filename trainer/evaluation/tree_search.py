"""tree=search of python -m trainer.speculate: the static tree for a drafter, its prompts and this
machine, measured and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from rich import get_console
from rich.table import Table

from tasks.reading import DataError
from trainer.assembly.trained import Trained
from trainer.decoding import calibration, speculative, trees
from trainer.decoding.texts import allow_trees
from trainer.drafters import Drafter, DrafterError, Target

# times that the pass over one token may take longer as a chain than as a tree, or the reverse: it
# is the same work
ALIKE = 1.2
STEADY = 1.5  # times the least that half of a pass's repetitions may take


def searched(
    found: Trained,
    drafter: Drafter,
    prompts: list[list[int]],
    stops: list[int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The tree for this drafter, these prompts and this machine, what it gives, and what was
    measured for it, as plain numbers.

    Raises:
        DataError: the prompts' answers are too short.
        DrafterError: the drafter makes trees of its own, or cannot draft for its target.
    """
    calibration.growing(drafter)
    target, device = Target(found.model), next(found.model.parameters()).device
    first = torch.tensor(prompts[0], device=device)
    # one that cannot draft says so now
    speculative.generate(target, drafter, first, min(8, options["max_new_tokens"]), stops)
    texts = [
        calibration.written(
            target, drafter, torch.tensor(prompt, device=device), options["max_new_tokens"], stops
        )
        for prompt in prompts
    ]
    longest, no_trees = max(texts, key=lambda text: len(text.ids) - text.start), None
    if len(longest.ids) - longest.start < 2:
        raise DataError(
            "no answer to these prompts has a second token, which is the first that is drafted:"
            " give other prompts"
        )
    branches = calibration.branching(target, drafter, longest)
    if branches:
        try:
            allow_trees(target)
        except DrafterError as error:
            branches, no_trees = False, str(error)
    widths = {"chain": 1} | ({"tree": options["top_k"]} if branches else {})
    depth = min(drafter.depth, options["count"] or trees.LONGEST)
    ranks = [
        calibration.ranks(target, drafter, text, max(widths.values()), depth) for text in texts
    ]
    most = options["size"]
    passes = calibration.verifying(
        target,
        longest.ids[: max(1, found.base.longest - most - 1)],
        sorted({most + 1, *(n for n in calibration.WIDTHS if n <= most)}),
        trees=branches,
        layers=drafter.layers,
    )
    verify = calibration.least(passes, most)
    best = calibration.fastest(
        ranks, widths, verify, lambda paths: calibration.drafting(target, drafter, longest, paths)
    )
    return {
        "prompts": len(prompts),
        "places": sum(map(len, ranks)),
        "max_new_tokens": options["max_new_tokens"],
        "drafter": options["drafter"],
        "paths": [list(path) for path in best.paths],
        "tokens": best.tokens,
        "draft_ms": 1000 * best.draft,
        "verify_ms": 1000 * best.verify,
        "plain_ms": 1000 * verify["chain"][0],
        "ratio": best.tokens * verify["chain"][0] / best.seconds,
        "acceptance": calibration.acceptance(ranks, max(widths.values())),
        "passes_ms": {
            shape: {f"{n}": 1000 * verify[shape][n - 1] for n in took}
            for shape, took in passes.items()
        },
        "no_trees": no_trees,
        "busy": busy(passes),
    }


def busy(passes: Mapping[str, Mapping[int, Sequence[float]]]) -> str | None:
    """What in the seconds of passes (`calibration.verifying`) says that something else ran on the
    machine; None for nothing."""
    alone = {shape: 1000 * min(took[1]) for shape, took in passes.items()}
    if max(alone.values()) > ALIKE * min(alone.values()):
        return "the pass over one token took at least " + " and ".join(
            f"{ms:.3g} ms as a {shape}" for shape, ms in alone.items()
        )
    every = [
        (median(took) / min(took), shape, n, took)
        for shape, widths in passes.items()
        for n, took in widths.items()
    ]
    spread, shape, n, took = max(every, key=lambda one: one[0])
    if spread <= STEADY:
        return None
    tokens = "one token" if n == 1 else f"{n} tokens"
    return (
        f"the pass over {tokens} as a {shape} took {1000 * min(took):.3g} ms at least and"
        f" {1000 * median(took):.3g} ms as a rule"
    )


def show_searched(found: dict[str, Any], file: str | None) -> None:
    """What was found, and how to use it."""
    console = get_console()
    shown = min(5, len(found["acceptance"][0])) if found["acceptance"] else 0
    table = Table(
        "draft position",
        *(f"rank {rank}" for rank in range(1, shown + 1)),
        title=f"right guesses after right ones, of {found['places']} drafts",
    )
    for depth, row in enumerate(found["acceptance"], 1):
        table.add_row(f"{depth}", *(f"{share:.1%}" for share in row[:shown]))
    console.print(table)
    table = Table("tokens of a pass", *(f"{n}" for n in found["passes_ms"]["chain"]))
    for shape, took in found["passes_ms"].items():
        table.add_row(f"{shape}, ms", *(f"{ms:.3g}" for ms in took.values()))
    console.print(table)
    if found["busy"]:
        console.print(
            "Warning: the machine seems busy, and this may not be the best tree."
            f" {found['busy'].capitalize()}. Measure again."
        )
    if found["no_trees"]:
        console.print(f"Chains only: {found['no_trees']}.")
    if not found["paths"]:
        console.print(
            "Drafting does not pay here: no tree gives more tokens a second than a pass of"
            f" {found['plain_ms']:.3g} ms for each. " + (f"{file} is not written." if file else "")
        )
        return
    paths, step = found["paths"], found["draft_ms"] + found["verify_ms"]
    console.print(
        f"Tokens to draft: {len(paths)}, up to {len(paths[-1])} after one another. A step gives"
        f" {found['tokens']:.2f} tokens, the target's own among them, and takes {step:.3g} ms,"
        f" {found['draft_ms']:.3g} to draft and {found['verify_ms']:.3g} to verify; without a draft"
        f" a token takes {found['plain_ms']:.3g} ms. So {found['ratio']:.2f} times as many tokens a"
        " second are expected, the prompt's pass and bookkeeping not counted."
    )
    console.print(f"tree=static paths={file}" if file else json.dumps(paths), soft_wrap=True)
