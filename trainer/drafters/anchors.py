"""Places of a row from which a block of tokens is drafted in training, and the numbers of such
blocks.

A block at the anchor a has K slots; slot k = 1 .. K predicts x_{a+k}. All of this is computed on
the host, from a batch's labels and positions, and sent to the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer.drafters import Target, TargetOutput
from trainer.drafters.distillation import Distillation, Shared, chunked_distillation
from trainer.models.on_host import Host, all_sent


def anchors_of(
    host: Host, most: int, drawn: bool
) -> tuple[Int[Tensor, "B A"], Bool[Tensor, "B A"], Float[Tensor, " B"]]:
    """Return (ascending positions, which of them are anchors and not padding, how many anchors each
    of them stands for). They are at most `most` of the positions whose token and next token are
    trained: `drawn` at random, or evenly spaced."""
    valid = torch.zeros_like(host.labels, dtype=torch.bool)
    valid[:, :-1] = (
        (host.labels[:, :-1] != -100)
        & (host.labels[:, 1:] != -100)
        & (host.positions[:, 1:] == host.positions[:, :-1] + 1)
    )
    many = valid.sum(1)
    count = max(1, min(most, int(many.max())))
    if drawn:
        chance = torch.rand(valid.shape)
        chosen = valid & (chance.masked_fill(~valid, 2.0).argsort(1).argsort(1) < count)
    else:
        rank = valid.cumsum(1)
        each = many.clamp_min(count).unsqueeze(1)
        chosen = valid & (rank * count // each != (rank - 1) * count // each)
    at = chosen.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
    real = chosen.gather(1, at)
    return at, real, many / real.sum(1).clamp_min(1)


def goals(at: Int[Tensor, "B A"], slots: int) -> Int[Tensor, "B A K"]:
    """Return the positions a + 1 .. a + K that the slots of each anchor predict."""
    return at.unsqueeze(2) + 1 + torch.arange(slots, device=at.device)


def counted(
    goal: Int[Tensor, "B A K"],
    at: Int[Tensor, "B A"],
    real: Bool[Tensor, "B A"],
    host: Host,
) -> Bool[Tensor, "B A K"]:
    """Return which slots have a target: their tokens x_goal, and all before them in the block, are
    trained and in the anchor's row."""
    inside = goal.clamp_max(host.labels.shape[1] - 1)
    flat = inside.flatten(1)
    labels = host.labels.gather(1, flat).view(goal.shape)
    positions = host.positions.gather(1, flat).view(goal.shape)
    expected = host.positions.gather(1, at).unsqueeze(2) + goal - at.unsqueeze(2)
    right = (goal == inside) & (labels != -100) & (positions == expected) & real.unsqueeze(2)
    return right.long().cumprod(2).bool()


def shared_places(
    counts: Bool[Tensor, "B A K"], places: Int[Tensor, "B A K"], device: torch.device, length: int
) -> tuple[Shared, tuple[Int[Tensor, " m"], ...], Int[Tensor, " n"]]:
    """Return (Shared, the indices (row, anchor, slot) of the slots that count, b T + t of the n
    different places t) of slots whose teacher is at `places` of T = `length`; all but Shared on the
    host."""
    index = counts.nonzero()
    row, anchor, slot = index.unbind(1)
    shared, order, different = Shared.by_place(row * length + places[row, anchor, slot], device)
    return shared, index[order].unbind(1), different


def distilled_slots(
    states: Float[Tensor, "B A K d"],
    counts: Bool[Tensor, "B A K"],
    goal: Int[Tensor, "B A K"],
    weights: Float[Tensor, "B K"],
    output: TargetOutput,
    target: Target,
    how: tuple[str, float],
    chunk: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "4 B A K"]]:
    """Return the weighted loss of the target's head on the slots that count, and chunked
    distillation's numbers of each slot, 0 where it does not count. `counts`, `goal` and `weights`
    are on the host. `how` is the kind of loss and lk_hybrid's eta. Without slots that count, all
    that `states` depends on still has a gradient of 0, as DDP needs."""
    device, length = states.device, output.ids.shape[1]
    shared, (row, anchor, slot), places = shared_places(counts, goal - 1, device, length)
    each = weights[row, slot]
    row, anchor, slot, places, each = all_sent(device, row, anchor, slot, places, each)
    total, numbers = chunked_distillation(
        states[row, anchor, slot][None],
        output.hidden.flatten(0, 1)[places].detach(),
        each[None],
        Distillation(how[0], target.head, (target.head,), eta=how[1]),
        chunk,
        shared=shared,
    )
    total = total + 0.0 * states.float().sum()
    spread = numbers.new_zeros(len(numbers), *counts.shape)
    spread[:, row, anchor, slot] = numbers[:, 0]
    return total, spread


def numbers_of(
    counts: Bool[Tensor, "B A K"],
    loss: Float[Tensor, "B A K"],
    best: Float[Tensor, "B A K"],
    among: Float[Tensor, "B A K"],
    acceptance: Float[Tensor, "B A K"],
) -> Float[Tensor, "K 7"]:
    """Return the numbers of trainer.drafters.distilled, given each slot's and 0 where a slot does
    not count."""
    known = counts.float()
    unbroken, expected = (part.cumprod(2) * known for part in (best, acceptance))
    columns = (loss, known, best, among, unbroken, acceptance, expected)
    return torch.stack([part.sum((0, 1)) for part in columns], dim=1)
