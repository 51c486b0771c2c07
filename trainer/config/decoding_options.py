"""Options of several commands: sampling, the drafter, the growth of drafts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config import paths
from trainer.config.options import option

# options that every measurement of decoding records
LEAST_CONTEXT = 16  # tokens of a text that a small model reads
RECORDED = ("max_new_tokens", "temperature", "top_p", "seed")


@dataclass(frozen=True)
class SamplingOptions:
    """The way tokens are drawn."""

    temperature: float = option("sampling temperature; 0 is greedy", 0.0, at_least=0)
    top_p: float = option("draw from the likeliest tokens of this share", 1.0, above=0, at_most=1)
    seed: int = option("seed of the random draws", 0, at_least=0)


@dataclass(frozen=True)
class DrafterOptions:
    """The drafter to use."""

    drafter: Literal[
        "run",
        "lookup",
        "edit",
        "recycling",
        "small",
        "run+lookup",
        "run+edit",
        "run+recycling",
        "small+lookup",
        "small+edit",
    ] = option(
        "run: the run's own. lookup copies n-grams of the text so far, edit copies the prompt that"
        " the answer rewrites, recycling proposes what the model nearly said before, small asks the"
        " model of small=PATH; these need no training. A+B merges the drafts of both into one tree",
        "run",
    )
    small: str | None = option(
        "a smaller model of the same tokenizer: its folder, or its name on the hub",
        None,
        value="PATH",
        reads=paths.model_fault,
    )
    context: str = option(
        "small: the part of a long text that the small model reads. last:N is its end of N tokens,"
        " bm25:N the end of N/2 and the chunks that share most with it. The text stays the same",
        "all",
        value="all",
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if self.drafter.startswith("small") != (self.small is not None):
            yield (
                "drafter=small and small=PATH, the small model's folder or its name on the hub, are"
                " given together"
            )
        try:
            kind, _ = context_of(self.context)
        except ValueError as fault:
            yield str(fault)
        else:
            if kind != "all" and self.small is None:
                yield f"context={self.context} has no effect without drafter=small"


def context_of(setting: str) -> tuple[str, int]:
    """Return (kind, tokens) of a setting of context=, such as (last, 512).

    Raises:
        ValueError: it cannot be read.
    """
    if setting == "all":
        return "all", 0
    match = re.fullmatch(r"(last|bm25):(\d{1,9})", setting)
    if match is None or int(match.group(2)) < LEAST_CONTEXT:
        raise ValueError(
            f"context={setting}: expected all, last:N or bm25:N, with N of {LEAST_CONTEXT} tokens"
            " or more"
        )
    return match.group(1), int(match.group(2))


@dataclass(frozen=True)
class GrowthOptions:
    """The growth of a draft, as trainer.decoding.trees reads it."""

    tree: Literal["chain", "static", "eagle2", "dyspec"] = option(
        "chain: one token after another. static: EAGLE-1's tree, or that of paths=FILE. eagle2:"
        " EAGLE-2's, which extends the top_k likeliest nodes of each level. dyspec: DySpec's, which"
        " extends the likeliest node",
        "chain",
    )
    count: int | None = option(
        "tokens to draft one after another, by default as many as the drafter can",
        None,
        value="N",
        at_least=1,
    )
    size: int = option("tokens of a tree", 59, at_least=1)
    top_k: int = option("children of a node", 10, at_least=1)
    paths: str | None = option(
        "static: the paths of the tree's nodes, as [[0], [1], [0, 0]]", None, value="FILE.json"
    )
    policy: str = option(
        "when to stop early: fixed, confidence:P where the drafter gives no next token the"
        " probability P, refusal:P where it expects a refusal with more than P, entropy:H where its"
        " next distribution has more than H nats, profitable:FILE where a longer chain gives fewer"
        " tokens a second, by the file of graft speculate tree=search json=FILE",
        "fixed",
    )
    siblings: Literal["without", "with", "spectr", "best"] = option(
        "how siblings of static trees are drawn when sampling: without or with replacement, spectr"
        " verified by SpecTr's rule, or the best tokens. eagle2 and dyspec take the best",
        "without",
    )

    rule: Literal["traversal", "recursive"] = option(
        "which drafted tokens are accepted when sampling. Both keep the target's distribution."
        " traversal decides from the leaves up and accepts at least as many; siblings=spectr has a"
        " rule of its own",
        "traversal",
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        yield from getattr(super(), "faults", tuple)()
        merged = getattr(self, "drafter", "")
        if "+" in merged and (self.rule != "traversal" or self.siblings == "spectr"):
            yield (
                f"drafter={merged} has drawn and copied siblings, which only rule=traversal with"
                " siblings=without, with or best verifies"
            )
        if self.tree == "static" and self.paths and (fault := paths.file_fault(self.paths)):
            yield f"paths={self.paths}: {fault}"


@dataclass(frozen=True)
class MeasureOptions(GrowthOptions, DrafterOptions, SamplingOptions):
    """The measurement of decoding with a drafter, and its prompts."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    prompts: str | None = option(
        "a file of prompts", None, value="FILE.jsonl", reads=paths.file_fault
    )
    heldout: int = option("the first N held-out conversations of the run's task", 0, at_least=0)
    max_new_tokens: int = option("most tokens of an answer", 128, at_least=1)
    json: Path | None = option("write the result as JSON", None, value="FILE", writes=True)

    def recorded(self, *more: str) -> dict[str, Any]:
        """Return the options that a result records, and `more` of them."""
        return {name: getattr(self, name) for name in (*RECORDED, *more)}
