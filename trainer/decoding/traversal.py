"""Verify a tree from its leaves up: `rule=traversal`.

Traversal Verification (arXiv 2505.12398). On a chain it is block verification (arXiv 2403.10444),
whose law is that of Tree Monte Carlo (Hu and Huang, ICML 2024). On a tree of one level it is the
recursive rule.

Each place has a budget r and a rest. The budget of the newest token is 1, the rest starts as p,
the target's distribution after the place. Child x of a place, in the order of drawing:

    r_x <- min(1, r rest(x) / q(x))
    D   <- (r rest - q)+
    r   <- S / (S + 1 - r) with S = sum of D; the newest token keeps r = 1
    rest <- D / S
    q   <- norm q without x, if siblings were drawn without replacement

A child chosen without chance has q = 1 at x. Then each place takes a uniform number u. In
post-order (children before their parent) the first place with u < r is the end of the accepted
path, and the token after it comes from its rest. The recursive rule stops at the first refusal
instead; this one accepts at least as many tokens on average, and its text is exactly the target's.

Differs from the paper: budgets need no random numbers, so they are computed for all nodes of one
depth at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.decoding.verify import Verdict, nodes_of
from trainer.drafters import Draft


@dataclass(frozen=True)
class Family:
    """The children of one place in the order of drawing. `row` is that of the distribution that
    they were drawn from, and the last `chosen` of them were chosen without chance."""

    place: int
    children: tuple[int, ...]  # their places
    row: int
    replacement: bool
    chosen: int


def traversal(
    p: Float[Tensor, "places V"],
    drafts: Sequence[Draft],
    generator: torch.Generator | None = None,
) -> Verdict:
    """Accept the path that the bottom-up walk ends at. Drafts without probabilities are walked from
    the newest token, which is the same law: `next_tokens` equals a child, or ends the path."""
    tokens, above = nodes_of(drafts, p.device)
    budget, rest = budgets(p, drafts)
    next_tokens = torch.multinomial(rest, 1, generator=generator)[:, 0]
    taken = next_tokens[above] == tokens
    first, last, root, drawn = _post_order(drafts)
    if not any(drawn):
        return Verdict(next_tokens, taken)
    uniform = torch.rand(len(p), generator=generator, device=p.device, dtype=p.dtype)
    rank = torch.tensor(last, device=p.device)
    of = torch.tensor(root, device=p.device)
    # The rank of the end of each draft's path. A newest token always stops: its budget is 1.
    stops = torch.where(uniform < budget, rank, len(p))
    ends = torch.full_like(rank, len(p)).scatter_reduce(0, of, stops, "amin")[of]
    on_path = (torch.tensor(first, device=p.device) <= ends) & (ends <= rank)
    nodes = torch.tensor([i for i, place in enumerate(root) if i != place], device=p.device)
    of_drawn = torch.tensor(drawn, device=p.device)[nodes]
    return Verdict(next_tokens, torch.where(of_drawn, on_path[nodes], taken))


def budgets(
    p: Float[Tensor, "places V"], drafts: Sequence[Draft]
) -> tuple[Float[Tensor, " places"], Float[Tensor, "places V"]]:
    """Return (the chance that a path ends at a place, if it ends neither at a child of it nor below
    one, the distribution of the token after that path)."""
    levels, starts = _families(drafts)
    budget, rest = p.new_ones(len(p)), p
    if not levels:
        return budget, rest
    rest = p.clone()
    tokens = torch.zeros(len(p), dtype=torch.long, device=p.device)
    drafted = nodes_of(drafts, p.device)[0]
    is_root = torch.zeros(len(p), dtype=torch.bool, device=p.device)
    is_root[torch.tensor(starts, device=p.device)] = True
    tokens[~is_root] = drafted
    drawn_from = torch.cat([d.probabilities for d in drafts if d.probabilities is not None]).to(p)
    for families in levels:
        _one_level(families, drawn_from, tokens, is_root, (budget, rest))
    return budget, rest


def _one_level(
    families: list[Family],
    drawn_from: Tensor,
    tokens: Tensor,
    is_root: Tensor,
    state: tuple[Tensor, Tensor],
) -> None:
    """Write the budgets of all children of the families, and what is left at their parents."""
    budget, rest = state
    families = sorted(families, key=lambda family: -len(family.children))
    places = torch.tensor([family.place for family in families], device=rest.device)
    q = drawn_from[torch.tensor([family.row for family in families], device=rest.device)]
    tiny = torch.finfo(rest.dtype).tiny
    for i in range(len(families[0].children)):
        here = [family for family in families if len(family.children) > i]
        parent = places[: len(here)]
        child = torch.tensor([family.children[i] for family in here], device=rest.device)
        x = tokens[child].unsqueeze(1)
        chosen = torch.tensor(
            [len(family.children) - i <= family.chosen for family in here], device=rest.device
        ).unsqueeze(1)
        now = q[: len(here)]
        if any(len(family.children) - i <= family.chosen for family in here):
            now = torch.where(chosen, torch.zeros_like(now).scatter(1, x, 1.0), now)
        r, left, chance = budget[parent].unsqueeze(1), rest[parent], now.gather(1, x)
        drawable = chance > 0
        budget[child] = torch.where(drawable, r * left.gather(1, x) / chance, 0.0).clamp_max(1)[
            :, 0
        ]
        excess = (r * left - now).clamp_min(0)
        mass = excess.sum(-1, keepdim=True)
        whole = mass + 1 - r
        after = torch.where(whole > 0, mass / whole.clamp_min(tiny), 1.0)
        after = torch.where(is_root[parent].unsqueeze(1), 1.0, after)
        budget[parent] = torch.where(drawable, after, r)[:, 0]
        rest[parent] = torch.where(drawable & (mass > 0), excess / mass.clamp_min(tiny), left)
        again = torch.tensor([family.replacement for family in here], device=rest.device)
        without = now.scatter(1, x, 0.0)
        without = without / without.sum(-1, keepdim=True).clamp_min(tiny)
        q[: len(here)] = torch.where(again.unsqueeze(1) | chosen, now, without)


def _families(drafts: Sequence[Draft]) -> tuple[list[list[Family]], list[int]]:
    """Return (the families of drawn drafts by the depth of their parent, the places of the newest
    tokens)."""
    levels: list[list[Family]] = []
    starts, start, rows = [], 0, 0
    for draft in drafts:
        starts.append(start)
        if draft.probabilities is not None and draft.rows is not None:
            children: dict[int, list[int]] = {}
            depth = {start: 0}
            row_of: dict[int, int] = {}
            chosen: dict[int, int] = {}
            parents, node_rows = draft.parents.tolist(), draft.rows.tolist()
            for node, (parent, row) in enumerate(zip(parents, node_rows, strict=True)):
                place = start + 1 + parent
                children.setdefault(place, []).append(start + 1 + node)
                depth[start + 1 + node] = depth[place] + 1
                if row < 0:
                    chosen[place] = chosen.get(place, 0) + 1
                else:
                    row_of[place] = rows + row
            for place, places in children.items():
                while len(levels) <= depth[place]:
                    levels.append([])
                levels[depth[place]].append(
                    Family(
                        place,
                        tuple(places),
                        row_of.get(place, 0),
                        draft.with_replacement,
                        chosen.get(place, 0),
                    )
                )
            rows += len(draft.probabilities)
        start += 1 + len(draft.tokens)
    return levels, starts


def _post_order(drafts: Sequence[Draft]) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Return for each place (the rank of the first place below it or itself, its own rank, the
    place of its newest token, whether its draft was drawn). Ranks count all places in
    post-order."""
    first: list[int] = []
    last: list[int] = []
    root: list[int] = []
    drawn: list[bool] = []
    rank = start = 0
    for draft in drafts:
        parents = draft.parents.tolist()
        below: list[list[int]] = [[] for _ in range(len(parents) + 1)]
        for node, parent in enumerate(parents):
            below[parent + 1].append(node + 1)
        firsts, lasts = [0] * len(below), [0] * len(below)
        waiting = [(0, False)]
        while waiting:
            place, done = waiting.pop()
            if done:
                lasts[place] = rank
                rank += 1
                continue
            firsts[place] = rank
            waiting.append((place, True))
            waiting += [(child, False) for child in reversed(below[place])]
        first += firsts
        last += lasts
        root += [start] * len(below)
        drawn += [draft.probabilities is not None] * len(below)
        start += len(below)
    return first, last, root, drawn
