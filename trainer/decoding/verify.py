"""Which of a tree's tokens are kept, and the token after them: rules under which the text is the
target's, exactly.

    place       the newest token, then the tree's nodes, with rows p of what the target says comes after each; of several sequences
                one after another
    own         what is written after a place if none of its children is taken
    taken       whether a node is taken, given that its parent is; by a lossless rule at most one child of each parent

A walk from the newest token through taken nodes gives the step's text, and `own` of its last place
the token after it.

Where children were drawn from q, with k of them x_1 .. x_k, and p is the target's after their
parent, r starts as p and

    with replacement       x_i is taken with min(1, r(x_i) / q(x_i)); else r <- norm (r - q)+          (SpecInfer, arXiv 2305.09781)
    without replacement    the same with q <- norm q without x_i after each refusal                    (RSD, arXiv 2402.14160)
    k-sequential           x_i is taken with min(1, p(x_i) / (ρ q(x_i))), ρ solving 1 - (1 - b)^k = ρ b, b = Σ min(p / ρ, q);
                           at last r = norm (p - min(p / ρ, q) (1 - (1 - b)^k) / b)                    (SpecTr, arXiv 2310.15141)

and `own` is drawn from what r is at last. With one child all of them are Leviathan et al.'s rule
(arXiv 2211.17192). Children chosen without chance are q = 1 at one token each: taking them in turn
is the same as drawing `own` from p and taking the child that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer.drafters import Draft

RULES = ("recursive", "spectr", "typical_lossy")


@dataclass(frozen=True)
class Verdict:
    """What a rule has decided for all drafts together, on the device where it was computed: n
    nodes, and as many places more as drafts."""

    own: Int[Tensor, " places"]
    taken: Bool[Tensor, " n"]
    # of several paths of taken nodes, equally long ones, the largest sum wins
    weights: Float[Tensor, " n"] | None = None


def greedy(logits: Float[Tensor, "places V"], drafts: Sequence[Draft]) -> Verdict:
    """Children that are the target's best guess."""
    own = logits.max(-1).indices  # as argmax, which takes five times as long in bf16 on a CPU
    tokens, above = nodes_of(drafts, own.device)
    return Verdict(own, own[above] == tokens)


def sampled(
    p: Float[Tensor, "places V"],
    drafts: Sequence[Draft],
    generator: torch.Generator | None = None,
    rule: str = "recursive",
) -> Verdict:
    """The lossless rule for how each draft was made: without chance, or by `rule` recursive or,
    with replacement only, spectr."""
    tokens, above = nodes_of(drafts, p.device)
    left, decided = p, []
    for replaced in (False, True):
        families, rows = families_of(drafts, replaced)
        if not families:
            continue
        steps = (
            spectr
            if rule == "spectr" and replaced
            else with_replacement
            if replaced
            else without_replacement
        )
        widths = [len(children) for _, children in families]
        padded = torch.tensor(
            [nodes + [nodes[0]] * (widths[0] - len(nodes)) for _, nodes in families],
            device=p.device,
        )
        at = torch.tensor([place for place, _ in families], device=p.device)
        q = torch.cat([draft.probabilities for draft in drafts if draft.probabilities is not None])
        chances, rest = steps(
            p[at], q[torch.tensor(rows, device=p.device)].to(p), tokens[padded], widths
        )
        left = left.index_copy(0, at, rest)
        drawn = (
            torch.rand(chances.shape, generator=generator, device=p.device, dtype=p.dtype) < chances
        )
        real = torch.arange(widths[0], device=p.device) < torch.tensor(
            widths, device=p.device
        ).unsqueeze(1)
        decided.append((padded[real], (drawn & (drawn.cumsum(1) == 1))[real]))
    own = torch.multinomial(left, 1, generator=generator)[:, 0]
    taken = own[above] == tokens
    for nodes, yes in decided:
        taken[nodes] = yes
    return Verdict(own, taken)


def typical_lossy(
    p: Float[Tensor, "places V"],
    drafts: Sequence[Draft],
    generator: torch.Generator | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Verdict:
    """LOSSY: Medusa's typical acceptance (arXiv 2401.10774, section 2.3.1), whose texts are not
    distributed as the target's. A child is taken where p(x) > min(epsilon, delta exp(-H(p))), of
    several paths the longest, of those the likeliest."""
    tokens, above = nodes_of(drafts, p.device)
    chance = p[above].gather(1, tokens.unsqueeze(1))[:, 0]
    entropy = torch.special.entr(p[above]).sum(-1)
    taken = chance > (delta * (-entropy).exp()).clamp_max(epsilon)
    return Verdict(
        torch.multinomial(p, 1, generator=generator)[:, 0], taken, chance.clamp_min(1e-30).log()
    )


def nodes_of(
    drafts: Sequence[Draft], device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(tokens, places of the parents) of all nodes of all drafts."""
    above, start = [], 0
    for draft in drafts:
        above += [start + 1 + parent for parent in draft.parents.tolist()]
        start += 1 + len(draft.tokens)
    return torch.cat([draft.tokens for draft in drafts]).to(device), torch.tensor(
        above, dtype=torch.long, device=device
    )


def families_of(
    drafts: Sequence[Draft], replaced: bool
) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """((place of the parent, its children among all nodes), rows of what they were drawn from among
    all rows) of those drafts whose siblings were drawn that way, the largest families first."""
    found: dict[int, list[int]] = {}
    drawn_from: dict[int, int] = {}
    nodes = rows = 0
    for number, draft in enumerate(drafts):
        if draft.probabilities is not None and draft.rows is not None:
            if draft.replaced == replaced:
                for node, (parent, row) in enumerate(
                    zip(draft.parents.tolist(), draft.rows.tolist(), strict=True), nodes
                ):
                    place = nodes + number + 1 + parent
                    found.setdefault(place, []).append(node)
                    drawn_from[place] = rows + row
            rows += len(draft.probabilities)
        nodes += len(draft.tokens)
    # Widest first, so that those with an i-th child are the first ones.
    order = sorted(found, key=lambda place: -len(found[place]))
    return [(place, found[place]) for place in order], [drawn_from[place] for place in order]


def walk(parents: list[int], taken: list[bool], weights: list[float] | None = None) -> list[int]:
    """The longest path of taken nodes from the newest token; of equally long ones that of the
    largest sum of weights, or the first."""
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
    """(the chance that the i-th child is taken once those before it are refused, what `own` is
    drawn from if all are). The first widths[j] of parent j's children count, and widths fall."""
    return _in_turn(p, q, children, widths, replaced=True)


def without_replacement(
    p: Float[Tensor, "a V"],
    q: Float[Tensor, "a V"],
    children: Int[Tensor, "a k"],
    widths: list[int],
) -> tuple[Float[Tensor, "a k"], Float[Tensor, "a V"]]:
    """As `with_replacement`."""
    return _in_turn(p, q, children, widths, replaced=False)


def _in_turn(
    p: Tensor, q: Tensor, children: Tensor, widths: list[int], replaced: bool
) -> tuple[Tensor, Tensor]:
    left, rest = p.clone(), q if replaced else q.clone()
    chances = p.new_zeros(children.shape)
    for i in range(widths[0]):
        many = sum(width > i for width in widths)
        r, now, x = left[:many], rest[:many], children[:many, i : i + 1]
        drawable = now.gather(1, x) > 0
        chances[:many, i : i + 1] = torch.where(
            drawable, r.gather(1, x) / now.gather(1, x), 0.0
        ).clamp_max(1.0)
        refused = (r - now).clamp_min(0)
        mass = refused.sum(-1, keepdim=True)
        # Without mass r and q are the same but for rounding, and a refusal cannot be.
        left[:many] = torch.where(drawable & (mass > 0), refused / mass, r)
        if not replaced:
            now = now.scatter(1, x, 0.0)
            rest[:many] = now / now.sum(-1, keepdim=True).clamp_min(torch.finfo(now.dtype).tiny)
    return chances, left


def spectr(
    p: Float[Tensor, "a V"],
    q: Float[Tensor, "a V"],
    children: Int[Tensor, "a k"],
    widths: list[int],
) -> tuple[Float[Tensor, "a k"], Float[Tensor, "a V"]]:
    """As `with_replacement`."""
    k = torch.tensor(widths, device=p.device, dtype=p.dtype).unsqueeze(1)

    def shared(rho: Tensor) -> Tensor:
        return torch.minimum(p / rho, q).sum(-1, keepdim=True)

    def taken(b: Tensor) -> Tensor:
        return -torch.expm1(k * torch.log1p(-b.clamp_max(1.0)))  # 1 - (1 - b)^k

    # between them 1 - (1 - b)^k - ρ b turns from not negative to not positive
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
