"""Speculative decoding with a drafter that reads the target's own hidden states: the target's text,
in fewer of its steps.

    a step:  draft a tree of tokens after the newest one  ->  one forward pass over the newest token
    and the tree
             ->  the tree's longest right path, and after it a token of the target's own

With temperature 0 a drafted token is right where the target's best guess is the same, so the text
is that of plain greedy decoding. Else tokens are taken by the rules of trainer.decoding.verify, and
the text is distributed as the target's. p and q are what temperature, top_k and top_p leave. Trees
come from trainer.decoding.trees, passes over them from trainer.decoding.texts.

Several sequences share the target's passes; the drafter is asked sequence by sequence, and each
ends on its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer.decoding import verify
from trainer.decoding.texts import Texts, allow_trees, is_chain, no_way_back
from trainer.decoding.trees import Chances, Drawing, Shape, chain, nothing
from trainer.drafters import Draft, Drafter, DrafterError, News, Target


@dataclass(frozen=True)
class Result:
    """One decoded text and what it took. Of several that were decoded together, seconds are the
    batch's until this one ended."""

    tokens: list[int]  # new ones, the stop among them
    # for each step after the prompt's: the tree's depth, and how many tokens of it were taken
    drafts: list[tuple[int, int]]
    seconds: float  # with the prompt's forward pass
    prompt_seconds: float  # until the first token
    draft_seconds: float = 0.0  # of the drafter
    # of the target's passes after the prompt's, and of what decides on tokens
    verify_seconds: float = 0.0
    nodes: int = 0  # drafted tokens that the target read, all steps together

    @property
    def steps(self) -> int:
        """The target's forward passes after the prompt's, which gives the first token."""
        return len(self.drafts)

    @property
    def histogram(self) -> list[int]:
        """How many steps took 0, 1, 2 ... drafted tokens."""
        taken = [count for _, count in self.drafts]
        return [taken.count(count) for count in range(max(taken, default=0) + 1)]


@dataclass(frozen=True)
class Place:
    """The k-th drafted token over many steps; of trees, any of the k-th level."""

    proposed: int
    reached: int  # of those proposed, after as many right ones
    taken: int


def places(results: Iterable[Result]) -> list[Place]:
    """Place by place, from the first: how often a token was proposed, came after right ones only,
    and was taken."""
    drafts = [draft for result in results for draft in result.drafts]
    return [
        Place(
            sum(proposed > k for proposed, _ in drafts),
            sum(proposed > k and taken >= k for proposed, taken in drafts),
            sum(taken > k for _, taken in drafts),
        )
        for k in range(max((proposed for proposed, _ in drafts), default=0))
    ]


def generate(
    target: Target,
    drafter: Drafter | None,
    ids: Int[Tensor, " n"],
    max_new_tokens: int,
    stops: Iterable[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    count: int | None = None,
    **more: Any,
) -> Result:
    """Continue one sequence, as `generate_batch` does with several."""
    return generate_batch(
        target,
        drafter,
        [ids],
        max_new_tokens,
        stops,
        temperature,
        top_p,
        generator,
        count=count,
        **more,
    )[0]


@torch.no_grad()
def generate_batch(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Int[Tensor, " n"]],
    max_new_tokens: int,
    stops: Iterable[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    count: int | None = None,
    top_k: int = 0,
    shape: Shape | None = None,
    rule: str = "recursive",
) -> list[Result]:
    """Continue each sequence, up to `max_new_tokens` tokens or through the first of `stops`.

    A `shape` makes the trees, by default a chain of `count` tokens, at most and by default the
    drafter's depth; count=0 drafts nothing. Without a drafter this is plain decoding. `rule` is one
    of verify.RULES and is asked for when sampling only; typical_lossy is not lossless. `generator`
    is of the device of the prompts. top_k=0 keeps all tokens.

    Raises:
        DrafterError: the target's state cannot be taken back by some tokens, it cannot read trees,
        or the drafter does not draft.
    """
    if rule not in verify.RULES:
        raise DrafterError(f"rule={rule}: one of {', '.join(verify.RULES)}")
    if drafter is not None and getattr(target.model, "_is_stateful", False):
        raise DrafterError(no_way_back(target))
    most = 0 if drafter is None else drafter.depth if count is None else min(count, drafter.depth)
    shape = shape or (chain(most) if most else None)
    drafter = drafter if shape is not None else None
    branches = drafter is not None and shape is not None and shape.branches
    if branches or len(prompts) > 1:
        allow_trees(target)
    # A drafter with a `propose` of its own may give trees, whatever shape is asked for.
    own = drafter is not None and type(drafter).propose is not Drafter.propose
    chances = None if temperature == 0 else chances_of(temperature, top_k, top_p)
    ends, device = set(stops), prompts[0].device
    clock = Clock(device)
    texts = Texts(
        target,
        drafter.layers if drafter is not None else (),
        whole=branches or own or len(prompts) > 1,
    )
    read = texts.open(prompts)
    if drafter is not None and len(prompts) == 1:
        texts.may_forget()
    logits = target.head(torch.cat([hidden[-1:] for hidden, _ in read]))
    firsts = _first(logits, chances, generator)
    found = firsts.tolist()
    rows = [
        _Row(
            i,
            None if drafter is None else drafter.start(target),
            News(
                *read[i],
                torch.cat([ids[1:], firsts[i : i + 1]]),
                ids[0],
                (ids[-1:], logits[i : i + 1]),
            ),
            [found[i]],
        )
        for i, ids in enumerate(prompts)
    ]
    del read
    prompt_seconds = clock.lap("prompt")
    results: dict[int, Result] = {}
    size = logits.shape[-1]
    while True:
        for row in [
            row for row in rows if row.tokens[-1] in ends or len(row.tokens) >= max_new_tokens
        ]:
            results[row.number] = Result(
                row.tokens,
                row.drafts,
                clock.seconds(),
                prompt_seconds,
                clock.of("draft"),
                clock.of("verify"),
                row.nodes,
            )
        if kept := [place for place, row in enumerate(rows) if row.number not in results]:
            if len(kept) < len(rows):
                texts.only(kept)
                rows = [rows[place] for place in kept]
        else:
            return [results[i] for i in range(len(prompts))]
        drafts = []
        for row in rows:
            limit = max_new_tokens - len(row.tokens) - 1  # the target's own token comes on top
            draft = nothing()
            if drafter is not None and shape is not None and limit > 0:
                drawing = Drawing(size, limit, chances, generator)
                draft = drafter.propose(
                    row.memory, target, row.news, lambda growth, at=drawing: shape(growth, at)
                )  # type: ignore[misc]
            drafts.append(replace(draft, tokens=draft.tokens.to(device)))
        clock.lap("draft")
        step(target, texts, rows, drafts, chances, generator, rule, ends, max_new_tokens)
        clock.lap("verify")


@dataclass
class _Row:
    """A sequence that is being decoded."""

    number: int
    memory: Any
    news: News
    tokens: list[int]
    drafts: list[tuple[int, int]] = field(default_factory=list)
    nodes: int = 0


def step(
    target: Target,
    texts: Texts,
    rows: Sequence[_Row],
    drafts: Sequence[Draft],
    chances: Chances | None,
    generator: torch.Generator | None,
    rule: str,
    ends: set[int],
    max_new_tokens: int,
) -> None:
    """Verify the drafts and add what they give to the rows."""
    parents = [draft.parents.tolist() for draft in drafts]
    read = [
        torch.cat([row.news.ids[-1:], draft.tokens])
        for row, draft in zip(rows, drafts, strict=True)
    ]
    states = texts.read(read, parents)
    logits = target.head(torch.cat([hidden for hidden, _ in states]))
    p = logits if chances is None else chances(logits)
    if chances is None:
        verdict = verify.greedy(p, drafts)
    elif rule == "typical_lossy":
        verdict = verify.typical_lossy(p, drafts, generator)
    else:
        verdict = verify.sampled(p, drafts, generator, rule)
    drafted = torch.cat([tokens[1:] for tokens in read])
    # a step's only wait for the device
    numbers = torch.cat([verdict.own, verdict.taken.to(verdict.own), drafted]).tolist()
    weights = None if verdict.weights is None else verdict.weights.tolist()
    nodes, place, paths = sum(map(len, parents)), 0, []
    for number, (row, above, tokens, (hidden, features)) in enumerate(
        zip(rows, parents, read, states, strict=True)
    ):
        n, node = len(above), place - number  # the first place and the first node of this sequence
        taken, proposed = (
            numbers[start : start + n] for start in (len(logits) + node, len(logits) + nodes + node)
        )
        path = verify.walk(above, taken, None if weights is None else weights[node : node + n])
        paths.append(path)
        last = path[-1] + 1 if path else 0
        text = [*(proposed[node] for node in path), numbers[place + last]]
        kept = slice(0, len(path) + 1) if is_chain(path) else [0, *(node + 1 for node in path)]
        following = torch.cat([tokens[kept][1:], verdict.own[place + last : place + last + 1]])
        row.news = News(
            hidden[kept], features[kept], following, None, (tokens, logits[place : place + n + 1])
        )
        place += n + 1
        end = next((i for i, token in enumerate(text, 1) if token in ends), len(text))
        end = min(end, max_new_tokens - len(row.tokens))
        row.tokens += text[:end]
        row.nodes += n
        # What stands behind a stop counts as neither proposed nor taken.
        row.drafts.append((depth_of(above), len(path)) if end > len(path) else (end, end))
    texts.keep(paths)


def depth_of(parents: Sequence[int]) -> int:
    """The levels of a tree."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    return max(depths, default=0)


class Clock:
    """Seconds by what they went into. A device is not waited for but where they are read."""

    def __init__(self, device: torch.device):
        self.device, self.spent = device, dict[str, float]()
        self.waiting: list[tuple[str, Any, Any]] = []
        self.started = now(device)
        self.last = self._mark()

    def lap(self, name: str) -> float:
        """Count what was asked for since the last call to `name`; gives the seconds so far where
        that needs no waiting."""
        mark = self._mark()
        self.waiting.append((name, self.last, mark))
        self.last = mark
        return time.perf_counter() - self.started

    def of(self, name: str) -> float:
        now(self.device)
        for lap, first, last in self.waiting:
            took = first.elapsed_time(last) / 1000 if self.device.type == "cuda" else last - first
            self.spent[lap] = self.spent.get(lap, 0.0) + took
        self.waiting.clear()
        return self.spent.get(name, 0.0)

    def seconds(self) -> float:
        return now(self.device) - self.started

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def chances_of(temperature: float, top_k: int = 0, top_p: float = 1.0) -> Chances:
    """Logits to probabilities, by the processors that transformers' sampling uses, in fp32 as
    there."""
    processors = LogitsProcessorList()
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))

    def chances(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return processors(None, logits.float()).softmax(-1)  # type: ignore[arg-type]

    return chances


def _first(
    logits: Float[Tensor, "B V"], chances: Chances | None, generator: torch.Generator | None
) -> Int[Tensor, " B"]:
    if chances is None:
        return logits.max(-1).indices
    return torch.multinomial(chances(logits), 1, generator=generator)[:, 0]
