"""Speculative decoding with a drafter that reads the target's own hidden states: the target's text, in fewer of its steps.

    a step:  draft x̂_1 .. x̂_k after the newest token  ->  one forward pass over the newest token and the draft
             ->  the draft's longest right beginning, and after it a token of the target's own

With temperature 0 a drafted token is right where the target's best guess is the same, so the text is that of plain greedy
decoding. Else a token x̂ drawn from q is taken with probability min(1, p(x̂) / q(x̂)), and after the first refusal the target's
own token is drawn from max(p - q, 0) / Σ max(p - q, 0), else from p: the text is distributed as the target's
(Leviathan et al. 2023, algorithm 1; Chen et al. 2023, theorem 1). p and q are what temperature and top_p leave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from trainer.drafters import Draft, Drafter, DrafterError, Target
from trainer.losses import captured_hidden

Chances = Callable[[Float[Tensor, "n V"]], Float[Tensor, "n V"]]


@dataclass(frozen=True)
class Result:
    """One decoded text and what it took."""

    tokens: list[int]  # new ones, the stop among them
    drafts: list[tuple[int, int]]  # for each step after the prompt's: tokens proposed, and how many of them were taken
    seconds: float  # with the prompt's forward pass
    prompt_seconds: float  # until the first token

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
    """The k-th drafted token over many steps."""

    proposed: int
    reached: int  # of those proposed, after as many right ones
    taken: int


def places(results: Iterable[Result]) -> list[Place]:
    """Place by place, from the first: how often a token was proposed, came after right ones only, and was taken."""
    drafts = [draft for result in results for draft in result.drafts]
    return [
        Place(
            sum(proposed > k for proposed, _ in drafts),
            sum(proposed > k and taken >= k for proposed, taken in drafts),
            sum(taken > k for _, taken in drafts),
        )
        for k in range(max((proposed for proposed, _ in drafts), default=0))
    ]


@torch.no_grad()
def generate(
    target: Target, drafter: Drafter | None, ids: Int[Tensor, " n"], max_new_tokens: int, stops: Iterable[int],
    temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None, count: int | None = None,
) -> Result:  # fmt: skip
    """Continue one sequence, up to `max_new_tokens` tokens or through the first of `stops`.

    `count` tokens are drafted at a time, at most and by default the drafter's K; without a drafter this is plain decoding.
    `generator` is of the device of `ids`.

    Raises:
        DrafterError: the target's state cannot be taken back by some tokens, or the drafter does not draft.
    """
    if drafter is not None and getattr(target.model, "_is_stateful", False):
        raise DrafterError(_no_way_back(target))
    most = 0 if drafter is None else drafter.offsets if count is None else min(count, drafter.offsets)
    chances = None if temperature == 0 else _chances(temperature, top_p)
    ends, drafts = set(stops), []

    def choose(logits: Float[Tensor, " V"]) -> tuple[Tensor, Tensor | None]:
        if chances is None:
            return logits.argmax(-1), None
        p = chances(logits.unsqueeze(0))
        return torch.multinomial(p, 1, generator=generator)[0, 0], p[0]

    started = now(ids.device)
    text = _Text(target)
    hidden = text.read(ids)
    if drafter is not None:
        text.may_forget()
        memory = drafter.start(target)
    token, _ = choose(target.head(hidden[-1:])[0])
    following = torch.cat([ids[1:], token.view(1)])  # the token after each position of `hidden`
    tokens = [int(token)]
    prompt_seconds = time.perf_counter() - started
    while tokens[-1] not in ends and len(tokens) < max_new_tokens:
        asked = min(most, max_new_tokens - len(tokens) - 1)  # the target's own token comes on top
        draft = Draft(ids[:0], None)
        if drafter is not None and asked:
            draft = drafter.propose(memory, target, hidden, following, asked, choose)
        states = text.read(torch.cat([following[-1:], draft.tokens]))
        logits = target.head(states)
        if chances is None:
            found, following = _greedy(logits, draft.tokens)
        else:
            found, following = _sampled(chances(logits), draft, generator)
        proposed, taken = len(draft.tokens), len(found) - 1
        if drafter is not None:
            text.forget(proposed - taken)
        hidden = states[: taken + 1]
        end = next((i for i, token in enumerate(found, 1) if token in ends), taken + 1)
        tokens += found[:end]
        drafts.append((proposed, taken) if end > taken else (end, end))  # what stands behind a stop counts as neither
    return Result(tokens, drafts, time.perf_counter() - started, prompt_seconds)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _chances(temperature: float, top_p: float) -> Chances:
    """Logits to probabilities, by the processors that transformers' sampling uses, in fp32 as there."""
    processors = LogitsProcessorList()
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))

    def chances(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return processors(None, logits.float()).softmax(-1)  # type: ignore[arg-type]

    return chances


def _greedy(logits: Float[Tensor, "n V"], proposed: Int[Tensor, " k"]) -> tuple[list[int], Int[Tensor, " m"]]:
    """The tokens of a step: those proposed that are the best guesses, up to the first that is not, and the best guess there."""
    best = logits.argmax(-1)
    found = torch.cat([best, proposed]).tolist()  # the step's only wait for the device
    guesses, drafted = found[: len(best)], found[len(best) :]
    taken = next((i for i, token in enumerate(drafted) if token != guesses[i]), len(drafted))
    return guesses[: taken + 1], best[: taken + 1]


def _sampled(p: Float[Tensor, "n V"], draft: Draft, generator: torch.Generator | None) -> tuple[list[int], Int[Tensor, " m"]]:
    """The tokens of a step: those proposed that are taken, up to the first that is not, and one drawn from what is left of p
    there."""
    x, k = draft.tokens, len(draft.tokens)
    q = F.one_hot(x, p.shape[-1]).to(p) if draft.probabilities is None else draft.probabilities.to(p)
    drawn = torch.rand(k, generator=generator, device=p.device)
    rows = torch.arange(k, device=p.device)
    taken = (drawn * q[rows, x] < p[rows, x]).cumprod(0).sum().view(1)
    p_there = p.index_select(0, taken)
    left = (p_there - F.pad(q, (0, 0, 0, 1)).index_select(0, taken)).clamp_min(0)
    left = torch.where(left.sum() > 0, left, p_there)  # p and q the same up to rounding
    own = torch.multinomial(left, 1, generator=generator)[0]
    count, last, *drafted = torch.cat([taken, own, x]).tolist()  # the step's only wait for the device
    return [*drafted[:count], last], torch.cat([x[:count], own])


class _Text:
    """One sequence, as far as the target has read it."""

    def __init__(self, target: Target):
        self.target = target
        self.layer = target.model.get_output_embeddings()
        self.cache = DynamicCache(config=target.config)
        self.model = target.model

    def read(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """The hidden states that the output head reads at n further tokens."""
        with captured_hidden(self.layer) as kept:
            self.cache = self.model(input_ids=ids.unsqueeze(0), past_key_values=self.cache, use_cache=True).past_key_values
        peft = getattr(self.model, "active_peft_config", None)
        if peft is not None and peft.is_prompt_learning:
            self.model = self.model.get_base_model()  # virtual tokens stand before the first ones only
        return kept[0][0, -len(ids) :]

    def may_forget(self) -> None:
        """From here on `forget` follows each `read`.

        Raises:
            DrafterError: some layer's state has no way back.
        """
        if not self.cache.is_croppable:
            raise DrafterError(_no_way_back(self.target))
        self.cache.activate_past_recording()  # a sliding window keeps what it would have dropped until `forget`

    def forget(self, count: int) -> None:
        """Unread the last `count` tokens."""
        self.cache.crop(-count)


def _no_way_back(target: Target) -> str:
    return (
        f"{type(target.model).__name__} has layers whose state cannot be taken back by some tokens (a recurrence), which every "
        "refused draft asks for. Decode it without its drafter: python -m trainer.generate"
    )
