"""Acceptance of a tree's tokens, and the token after them: rules that keep the text exactly
the target's. `traversal` decides whole paths and has a file of its own.

    place          the newest token, then the tree's nodes, each with a row p: the target's
                   distribution of the token after it. Several sequences follow one another.
    next_tokens    the token written after a place if none of its children is accepted
    taken          whether a node is accepted, given that its parent is. A lossless rule accepts at
                   most one child of each parent.

A walk from the newest token through accepted nodes gives the step's text. `next_tokens` of its last
place is the token after it.

Children x_1 .. x_k were drawn from q, p is the target's distribution after their parent, and r
starts as p:

    with replacement       accept x_i with probability min(1, r(x_i) / q(x_i)); otherwise
                           r <- norm (r - q)+                     (SpecInfer, arXiv 2305.09781)
    without replacement    the same, with q <- norm q without x_i after each refusal
                                                                       (RSD, arXiv 2402.14160)
    k-sequential           accept x_i with probability min(1, p(x_i) / (ρ q(x_i))), where ρ solves
                           1 - (1 - b)^k = ρ b with b = Σ min(p / ρ, q); at the end
                           r = norm (p - min(p / ρ, q) (1 - (1 - b)^k) / b)
                                                                    (SpecTr, arXiv 2310.15141)

`next_tokens` is drawn from the final r. With one child all of them are the rule of Leviathan et al.
(arXiv 2211.17192). Children chosen without chance have q = 1 at one token each: testing them in
turn is the same as drawing `next_tokens` from p and accepting the child that equals it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer.drafters import Draft

RULES = ("traversal", "recursive", "spectr", "typical_lossy")


@dataclass(frozen=True)
class Verdict:
    """A rule's decisions for all drafts together, on the device where they were computed: n nodes,
    and n + (number of drafts) places."""

    next_tokens: Int[Tensor, " places"]
    taken: Bool[Tensor, " n"]
    # Of several accepted paths of equal length, the one with the largest sum wins.
    weights: Float[Tensor, " n"] | None = None


def greedy(logits: Float[Tensor, "places V"], drafts: Sequence[Draft]) -> Verdict:
    """Accept children that are the target's best guess."""
    # As argmax, which takes five times as long in bf16 on a CPU.
    best = logits.max(-1).indices
    tokens, above = nodes_of(drafts, best.device)
    return Verdict(best, best[above] == tokens)


def sampled(
    p: Float[Tensor, "places V"],
    drafts: Sequence[Draft],
    generator: torch.Generator | None = None,
    rule: str = "recursive",
) -> Verdict:
    """Apply the lossless rule that fits how each draft was built: without chance, or by `rule`:
    recursive or, with replacement only, spectr."""
    tokens, above = nodes_of(drafts, p.device)
    rest, decided = p, []
    for replacement in (False, True):
        families, rows = families_of(drafts, replacement)
        if not families:
            continue
        accept = without_replacement
        if replacement:
            accept = spectr if rule == "spectr" else with_replacement
        widths = [len(children) for _, children in families]
        padded = torch.tensor(
            [nodes + [nodes[0]] * (widths[0] - len(nodes)) for _, nodes in families],
            device=p.device,
        )
        parents = torch.tensor([place for place, _ in families], device=p.device)
        q = torch.cat([draft.probabilities for draft in drafts if draft.probabilities is not None])
        chances, refused = accept(
            p[parents], q[torch.tensor(rows, device=p.device)].to(p), tokens[padded], widths
        )
        rest = rest.index_copy(0, parents, refused)
        uniform = torch.rand(chances.shape, generator=generator, device=p.device, dtype=p.dtype)
        accepted = uniform < chances
        real = torch.arange(widths[0], device=p.device) < torch.tensor(
            widths, device=p.device
        ).unsqueeze(1)
        # Only the first accepted child counts.
        decided.append((padded[real], (accepted & (accepted.cumsum(1) == 1))[real]))
    next_tokens = torch.multinomial(rest, 1, generator=generator)[:, 0]
    taken = next_tokens[above] == tokens
    for nodes, accepted in decided:
        taken[nodes] = accepted
    return Verdict(next_tokens, taken)


def typical_lossy(
    p: Float[Tensor, "places V"],
    drafts: Sequence[Draft],
    generator: torch.Generator | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Verdict:
    """LOSSY: Medusa's typical acceptance (arXiv 2401.10774, section 2.3.1), whose texts do not have
    the target's distribution. A child is accepted if p(x) > min(epsilon, delta exp(-H(p))); of
    several paths the longest one, and of those the most likely."""
    tokens, above = nodes_of(drafts, p.device)
    chance = p[above].gather(1, tokens.unsqueeze(1))[:, 0]
    entropy = torch.special.entr(p[above]).sum(-1)
    taken = chance > (delta * (-entropy).exp()).clamp_max(epsilon)
    next_tokens = torch.multinomial(p, 1, generator=generator)[:, 0]
    return Verdict(next_tokens, taken, chance.clamp_min(1e-30).log())


def nodes_of(
    drafts: Sequence[Draft], device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return (tokens, places of the parents) of all nodes of all drafts."""
    above, start = [], 0
    for draft in drafts:
        above += [start + 1 + parent for parent in draft.parents.tolist()]
        start += 1 + len(draft.tokens)
    return torch.cat([draft.tokens for draft in drafts]).to(device), torch.tensor(
        above, dtype=torch.long, device=device
    )


def families_of(
    drafts: Sequence[Draft], replacement: bool
) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Return ((place of the parent, its children among all nodes), rows of the distributions they
    were drawn from, among all rows), of drafts whose siblings were drawn with this `replacement`;
    the largest families first."""
    children: dict[int, list[int]] = {}
    drawn_from: dict[int, int] = {}
    nodes = rows = 0
    for number, draft in enumerate(drafts):
        if draft.probabilities is not None and draft.rows is not None:
            if draft.with_replacement == replacement:
                for node, (parent, row) in enumerate(
                    zip(draft.parents.tolist(), draft.rows.tolist(), strict=True), nodes
                ):
                    place = nodes + number + 1 + parent
                    children.setdefault(place, []).append(node)
                    drawn_from[place] = rows + row
            rows += len(draft.probabilities)
        nodes += len(draft.tokens)
    # Widest first, so that the families with an i-th child are the first ones.
    order = sorted(children, key=lambda place: -len(children[place]))
    return [(place, children[place]) for place in order], [drawn_from[place] for place in order]


def walk(parents: list[int], taken: list[bool], weights: list[float] | None = None) -> list[int]:
    """Return the longest path of accepted nodes from the newest token; of equally long ones the one
    with the largest sum of weights, or the first."""
    length, weight = [0] * len(parents), [0.0] * len(parents)  # 0: not reached
    last, most = -1, (0, 0.0)
    for node, parent in enumerate(parents):
        if not taken[node] or (parent >= 0 and not length[parent]):
            continue
        length[node] = 1 + (length[parent] if parent >= 0 else 0)
        weight[node] = (weight[parent] if parent >= 0 else 0.0) + (
            weights[node] if weights else 0.0
        )
        if last < 0 or (length[node], weight[node]) > most:
            last, most = node, (length[node], weight[node])
    path = []
    while last >= 0:
        path.append(last)
        last = parents[last]
    return path[::-1]


def with_replacement(
    p: Float[Tensor, "a V"],
    q: Float[Tensor, "a V"],
    children: Int[Tensor, "a k"],
    widths: list[int],
) -> tuple[Float[Tensor, "a k"], Float[Tensor, "a V"]]:
    """Return (probability that the i-th child is accepted once those before it are refused, the
    distribution of `next_tokens` if all are refused). Parent j has widths[j] children; widths do
    not increase."""
    return _in_turn(p, q, children, widths, replacement=True)


def without_replacement(
    p: Float[Tensor, "a V"],
    q: Float[Tensor, "a V"],
    children: Int[Tensor, "a k"],
    widths: list[int],
) -> tuple[Float[Tensor, "a k"], Float[Tensor, "a V"]]:
    """Return the same as `with_replacement`."""
    return _in_turn(p, q, children, widths, replacement=False)


def _in_turn(
    p: Tensor, q: Tensor, children: Tensor, widths: list[int], replacement: bool
) -> tuple[Tensor, Tensor]:
    rest, proposal = p.clone(), q if replacement else q.clone()
    chances = p.new_zeros(children.shape)
    for i in range(widths[0]):
        count = sum(width > i for width in widths)
        r, drawn_from, x = rest[:count], proposal[:count], children[:count, i : i + 1]
        drawable = drawn_from.gather(1, x) > 0
        chances[:count, i : i + 1] = torch.where(
            drawable, r.gather(1, x) / drawn_from.gather(1, x), 0.0
        ).clamp_max(1.0)
        refused = (r - drawn_from).clamp_min(0)
        mass = refused.sum(-1, keepdim=True)
        # Without mass r and q differ by rounding only, and a refusal is impossible.
        rest[:count] = torch.where(drawable & (mass > 0), refused / mass, r)
        if not replacement:
            left = drawn_from.scatter(1, x, 0.0)
            tiny = torch.finfo(left.dtype).tiny
            proposal[:count] = left / left.sum(-1, keepdim=True).clamp_min(tiny)
    return chances, rest


def spectr(
    p: Float[Tensor, "a V"],
    q: Float[Tensor, "a V"],
    children: Int[Tensor, "a k"],
    widths: list[int],
) -> tuple[Float[Tensor, "a k"], Float[Tensor, "a V"]]:
    """Return the same as `with_replacement`."""
    k = torch.tensor(widths, device=p.device, dtype=p.dtype).unsqueeze(1)

    def shared(rho: Tensor) -> Tensor:
        return torch.minimum(p / rho, q).sum(-1, keepdim=True)

    def taken(b: Tensor) -> Tensor:
        return -torch.expm1(k * torch.log1p(-b.clamp_max(1.0)))  # 1 - (1 - b)^k

    # 1 - (1 - b)^k - ρ b changes from not negative to not positive between them.
    low, high = torch.ones_like(k), k.clone()
    for _ in range(64 if p.dtype == torch.float64 else 32):
        middle = (low + high) / 2
        b = shared(middle)
        above = taken(b) > middle * b
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    rho = high
    b = shared(rho)
    x = children
    drawn_from = q.gather(1, x)
    chances = torch.where(drawn_from > 0, p.gather(1, x) / (rho * drawn_from), 0.0).clamp_max(1.0)
    tiny = torch.finfo(p.dtype).tiny
    left = (p - torch.minimum(p / rho, q) * (taken(b) / b.clamp_min(tiny))).clamp_min(0)
    mass = left.sum(-1, keepdim=True)
    return chances, torch.where(mass > 0, left / mass.clamp_min(tiny), p)
