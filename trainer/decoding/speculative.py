"""Speculative decoding with a drafter that reads the target's own hidden states: the target's text,
in fewer of its steps.

    prefill    read the prompts; the target gives each one's first token
    then, until all texts have ended:
    finish     take out the texts that have ended
    draft      propose a tree of tokens after each text's newest one
    verify     read the newest tokens and the trees in one forward pass of the target; add the
               longest accepted path of each tree, and one token of the target after it

With temperature 0 a drafted token is accepted if it is the target's best guess, so the text is that
of plain greedy decoding. Otherwise tokens are accepted by the rules of trainer.decoding.verify, and
the text has the target's distribution. p and q are the distributions after temperature, top-k and
top-p. trainer.decoding.trees builds trees, trainer.decoding.target_cache reads them.

Several sequences share the passes of target and drafter (trainer.decoding.drafting), and each
sequence ends on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.data.stops import Stops
from trainer.decoding import positions, verify
from trainer.decoding.clock import Clock
from trainer.decoding.drafting import Drafting, Limit, drafting
from trainer.decoding.drawing import Drawing, depth_of, empty_draft
from trainer.decoding.fused import Fused
from trainer.decoding.layout import is_chain
from trainer.decoding.prompted_cache import PromptedCache, prompts_for
from trainer.decoding.sampling import Sampling
from trainer.decoding.target_cache import TargetCache, allow_trees, cannot_roll_back
from trainer.decoding.traversal import traversal
from trainer.decoding.trees import Shape, chain
from trainer.decoding.verdicts import decisions_of, joined
from trainer.decoding.verify import Verdict
from trainer.drafters import Draft, Drafter, DrafterError, Target, TargetUpdate
from trainer.models.cache_argument import rolls_back
from trainer.speed.quick_passes import quick


@dataclass(frozen=True)
class Result:
    """One decoded text and its cost. If several were decoded together, `seconds` and the parts are
    those of the batch until this text ended."""

    tokens: list[int]  # the new ones, including the stop token
    # for each step after the prompt's: the depth of the tree, and the number of accepted tokens
    drafts: list[tuple[int, int]]
    seconds: float  # including the prompt's forward pass
    prompt_seconds: float  # until the first token
    draft_seconds: float = 0.0  # of the drafter
    verify_seconds: float = 0.0  # of the target's passes after the prompt's, and of verification
    nodes: int = 0  # drafted tokens that the target read, over all steps

    @property
    def steps(self) -> int:
        """The target's forward passes after the prompt's, which gives the first token."""
        return len(self.drafts)

    @property
    def histogram(self) -> list[int]:
        """The number of steps that accepted 0, 1, 2 ... drafted tokens."""
        taken = [count for _, count in self.drafts]
        return [taken.count(count) for count in range(max(taken, default=0) + 1)]


@dataclass(frozen=True)
class PositionCounts:
    """Counts of the k-th drafted token over many steps; for trees, of any token of level k."""

    proposed: int
    reached: int  # proposed, and all tokens before it accepted
    taken: int  # accepted


def position_counts(results: Iterable[Result]) -> list[PositionCounts]:
    """Return the counts of each draft position, from the first."""
    drafts = [draft for result in results for draft in result.drafts]
    return [
        PositionCounts(
            sum(proposed > k for proposed, _ in drafts),
            sum(proposed > k and taken >= k for proposed, taken in drafts),
            sum(taken > k for _, taken in drafts),
        )
        for k in range(max((proposed for proposed, _ in drafts), default=0))
    ]


@dataclass(frozen=True)
class Strategy:
    """The way drafts are built and verified."""

    shape: Shape | None = None  # None: a chain of as many tokens as the drafter can propose
    # One of verify.RULES, used only when sampling. typical_lossy is not lossless.
    rule: str = "traversal"


def generate(
    target: Target,
    drafter: Drafter | None,
    ids: Int[Tensor, " n"],
    max_new_tokens: int,
    stops: Iterable[int],
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    strategy: Strategy = Strategy(),
) -> Result:
    """Continue one sequence, as `generate_batch` does with several."""
    return generate_batch(target, drafter, [ids], max_new_tokens, stops, sampling, strategy)[0]


def generate_batch(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Int[Tensor, " n"]],
    max_new_tokens: int,
    stops: Iterable[int],
    sampling: Sampling = Sampling(),  # noqa: B008
    strategy: Strategy = Strategy(),
) -> list[Result]:
    """Continue each sequence until `max_new_tokens` tokens or the first of `stops`.

    Without a drafter this is plain decoding.

    Raises:
        DrafterError: the target's state cannot be rolled back, it cannot read trees, or the drafter
        does not propose tokens.
    """
    limit = positions.boundary(target.config)
    if limit is not None and max(map(len, prompts)) + max_new_tokens > limit.length:
        positions.warn(target.model, limit)
        if len(prompts) > 1:  # a batch shares one table
            return [
                generate(target, drafter, ids, max_new_tokens, stops, sampling, strategy)
                for ids in prompts
            ]
    return Decoder(target, drafter, max_new_tokens, stops, sampling, strategy).decode(prompts)


@dataclass
class Continuation:
    """A sequence that is being decoded."""

    number: int
    update: TargetUpdate
    tokens: list[int]
    prompt: Tensor
    drafts: list[tuple[int, int]] = field(default_factory=list)
    nodes: int = 0
    unread: bool = False  # whether the drafter has not read `update`

    @property
    def length(self) -> int:
        """The number of tokens of the text."""
        return len(self.prompt) + len(self.tokens)


class Decoder:
    """Decodes prompts; see the module's text for its steps.

    Raises:
        DrafterError: the rule is unknown, or the target's state cannot be rolled back.
    """

    cache: TargetCache
    clock: Clock
    drafting: Drafting | None
    generator: torch.Generator | None

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        max_new_tokens: int,
        stops: Iterable[int],
        sampling: Sampling,
        strategy: Strategy,
    ):
        if strategy.rule not in verify.RULES:
            raise DrafterError(f"rule={strategy.rule}: one of {', '.join(verify.RULES)}")
        if drafter is not None and not rolls_back(target.model):
            raise DrafterError(cannot_roll_back(target))
        if drafter is not None and target.gives_logits:
            raise DrafterError(target.no_head())
        self.target, self.drafter, self.rule = target, drafter, strategy.rule
        self.shape = strategy.shape
        if drafter is not None and self.shape is None:
            self.shape = chain(drafter.depth)
        if isinstance(drafter, Fused) and sampling.temperature and self.rule != "traversal":
            raise DrafterError(
                f"rule={self.rule}: merged drafts have drawn and copied siblings, which only"
                " rule=traversal verifies"
            )
        self.max_new_tokens, self.stops = max_new_tokens, Stops.of(stops)
        self.sampling, self.to_probabilities = sampling, sampling.to_probabilities()
        self.boundary = positions.boundary(target.config)
        self.results: dict[int, Result] = {}

    @torch.no_grad()
    def decode(self, prompts: Sequence[Int[Tensor, " n"]]) -> list[Result]:
        """Continue each sequence.

        Raises:
            DrafterError: the target cannot read trees, or the drafter does not propose tokens.
        """
        longest = max(map(len, prompts))
        self.max_new_tokens = positions.new_tokens(self.target.model, longest, self.max_new_tokens)
        positions.reset_tables(self.target.model)
        with quick(self.target.model, self.drafter):
            rows = self.prefill(prompts)
            while rows := self.finish(rows):
                self.verify(rows, self.draft(rows))
        return [self.results[number] for number in range(len(prompts))]

    def prefill(self, prompts: Sequence[Int[Tensor, " n"]]) -> list[Continuation]:
        """Read the prompts and draw the first token of each."""
        target, drafter, together = self.target, self.drafter, len(prompts) > 1
        branches = drafter is not None and self.shape is not None and self.shape.branches
        if branches or together:
            allow_trees(target)
        # A drafter that overrides `propose` may build trees whatever the shape.
        builds_trees = drafter is not None and type(drafter).propose is not Drafter.propose
        device = prompts[0].device
        self.generator, self.clock = self.sampling.generator(device), Clock(device)
        layers = () if drafter is None else drafter.layers
        whole = branches or builds_trees or together
        appended = prompts_for(drafter, target) if self.boundary is None else None
        self.cache = (
            TargetCache(target, layers, whole)
            if appended is None
            else PromptedCache(target, layers, appended)
        )
        states = self.cache.open(prompts)
        if drafter is not None and not together:
            self.cache.start_rollback()
        logits = target.head(torch.cat([hidden[-1:] for hidden, _ in states]))
        self.vocabulary_size = logits.shape[-1]
        firsts = self._draw(logits)
        rows = []
        for i, (ids, first) in enumerate(zip(prompts, firsts.tolist(), strict=True)):
            following = torch.cat([ids[1:], firsts[i : i + 1]])
            update = TargetUpdate(
                *states[i], following, first=ids[0], tried=(ids[-1:], logits[i : i + 1])
            )
            rows.append(Continuation(i, update, [first], ids))
        self.drafting = None
        if drafter is not None and self.shape is not None:
            self.drafting = drafting(drafter, target, self.shape, len(prompts))
        self.prompt_seconds = self.clock.lap("prompt")
        return rows

    def finish(self, rows: Sequence[Continuation]) -> list[Continuation]:
        """Store the results of the sequences that have ended and return the others."""
        unfinished = []
        for index, row in enumerate(rows):
            ended = self.stops.end(row.tokens, len(row.tokens) - 1) is not None
            if not ended and len(row.tokens) < self.max_new_tokens:
                unfinished.append(index)
                continue
            self.results[row.number] = Result(
                row.tokens,
                row.drafts,
                self.clock.seconds(),
                self.prompt_seconds,
                self.clock.of("draft"),
                self.clock.of("verify"),
                row.nodes,
            )
        if unfinished and len(unfinished) < len(rows):
            self.cache.select_rows(unfinished)
            if self.drafting is not None:
                self.drafting.select(unfinished)
        return [rows[index] for index in unfinished]

    def draft(self, rows: Sequence[Continuation]) -> list[Draft]:
        """Propose a tree for each sequence; an empty one where there is nothing to propose."""
        limits = []
        for row in rows:
            # The target's own token comes after the drafted ones.
            limit, most = self.max_new_tokens - len(row.tokens) - 1, None
            if isinstance(self.cache, PromptedCache) and row.update.extra is None:
                limit = 0
            row.unread = limit > 0
            if self.boundary is not None and limit > 0:
                most = self.boundary.draft_limit(row.length, self.cache.lengths[0])
                limit = limit if most is None else min(limit, most)
            row.unread &= self.drafting is None or limit < 1
            limits.append(Limit(limit, most))
        drafts = [empty_draft() for _ in rows]
        if self.drafting is not None:
            deepest = max(limit.depth for limit in limits)
            drawing = Drawing(self.vocabulary_size, deepest, self.to_probabilities, self.generator)
            drafts = self.drafting.drafts([row.update for row in rows], drawing, limits)
        drafts = [replace(draft, tokens=draft.tokens.to(self.clock.device)) for draft in drafts]
        self.clock.lap("draft")
        return drafts

    def verify(self, rows: Sequence[Continuation], drafts: Sequence[Draft]) -> None:
        """Read the drafts in one pass of the target and add the accepted tokens."""
        trees = [draft.parents.tolist() for draft in drafts]
        tokens = [
            torch.cat([row.update.ids[-1:], draft.tokens])
            for row, draft in zip(rows, drafts, strict=True)
        ]
        states = self._read(rows, tokens, trees)
        logits = self.target.head(torch.cat([hidden for hidden, _ in states]))
        verdict = self._verdict(logits, drafts)
        decisions = decisions_of(verdict, trees, torch.cat([draft.tokens for draft in drafts]))
        start = 0  # in `logits`: a sequence's newest token, then its nodes
        for i, (row, parents, read, (hidden, features), (path, text)) in enumerate(
            zip(rows, trees, tokens, states, decisions, strict=True)
        ):
            end, last = start + len(read), start + (path[-1] + 1 if path else 0)
            taken = slice(0, len(path) + 1) if is_chain(path) else [0, *(node + 1 for node in path)]
            update = TargetUpdate(
                hidden[taken],
                features[taken],
                torch.cat([read[taken][1:], verdict.next_tokens[last : last + 1]]),
                tried=(read, logits[start:end]),
                extra=self.cache.after(i, path),
            )
            # Only longrope lets a drafter pause and continue.
            waits = row.unread and self.boundary is not None and self.boundary.kind == "longrope"
            row.update = joined(row.update, update) if waits else update
            self._append(row, parents, path, text)
            start = end
        self.cache.commit([path for path, _ in decisions])
        self.clock.lap("verify")

    def _read(
        self, rows: Sequence[Continuation], tokens: list[Tensor], trees: list[list[int]]
    ) -> list[Any]:
        """Read the newest tokens and the trees, or the whole text where transformers would read it
        again."""
        if self.boundary is not None and len(rows) == 1 and not trees[0]:
            row = rows[0]
            text = torch.cat([row.prompt, row.prompt.new_tensor(row.tokens)])
            if self.boundary.crossed(len(text), self.cache.lengths[0]) and positions.reads_again(
                self.target.model, text, self.cache.cache
            ):
                return self.cache.read_again(text)
        return self.cache.read(tokens, trees)

    def _draw(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        if self.to_probabilities is None:
            return logits.max(-1).indices
        p = self.to_probabilities(logits)
        return torch.multinomial(p, 1, generator=self.generator)[:, 0]

    def _verdict(self, logits: Float[Tensor, "places V"], drafts: Sequence[Draft]) -> Verdict:
        if self.to_probabilities is None:
            return verify.greedy(logits, drafts)
        p = self.to_probabilities(logits)
        if self.rule == "typical_lossy":
            return verify.typical_lossy(p, drafts, self.generator)
        if self.rule == "traversal":
            return traversal(p, drafts, self.generator)
        return verify.sampled(p, drafts, self.generator, self.rule)

    def _append(
        self, row: Continuation, parents: Sequence[int], path: Sequence[int], text: list[int]
    ) -> None:
        """Add a step's tokens to a sequence, up to its end."""
        before = len(row.tokens)
        end = (self.stops.end([*row.tokens, *text], before) or before + len(text)) - before
        end = min(end, self.max_new_tokens - len(row.tokens))
        row.tokens += text[:end]
        row.nodes += len(parents)
        # Tokens after a stop count as neither proposed nor taken.
        row.drafts.append((depth_of(parents), len(path)) if end > len(path) else (end, end))
