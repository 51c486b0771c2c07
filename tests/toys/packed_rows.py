"""Rows of tokens alone and packed, and what a drafter sees of them."""

from __future__ import annotations

import torch

from trainer.data.batches import Collate, Pick
from trainer.data.render import Tokens
from trainer.drafters import TargetOutput


def numbers_of(kind, p, q, vocabulary, eta):
    """(loss, α, whether it counts) of one position from whole distributions, in plain autograd."""
    best = int(p.argmax())
    if vocabulary is not None:
        if best not in vocabulary.tolist():
            return None, torch.minimum(p[vocabulary], q).sum(), best
        p = p[vocabulary]
    whole = p / p.sum()
    accepted = torch.minimum(p, q).sum()
    ce = -(whole * torch.log(q)).sum()
    kl = (whole * torch.log(whole / q)).sum()
    if kind == "lk_hybrid":
        share = torch.exp(-eta * accepted.detach())
        return share * kl + (1 - share) * (1 - accepted), accepted, best
    return (
        {"ce": ce, "kl": kl, "tv": 1 - accepted, "lk_alpha": -torch.log(accepted)}[kind],
        accepted,
        best,
    )


ROWS = [
    ([5, 9, 3, 7, 11, 13, 2, 8], 3),
    ([17, 12], 1),
    ([8, 2, 6, 4, 12, 3], 5),
    ([4, 21, 13, 3, 17, 12, 6, 9, 1, 5], 1),
]
APART, PACKED = [[r] for r in ROWS], [ROWS[:3], [ROWS[3]]]


def output_of(packs, size, features=0):
    """(seen, states by row): a batch as the trainer collates it, whose states depend on the row
    alone."""
    items = [
        (
            Pick(i, True, 1),
            [Tokens(ids, [at >= first for at in range(len(ids))]) for ids, first in pack],
        )
        for i, pack in enumerate(packs)
    ]
    batch = Collate(0, any(len(pack) > 1 for pack in packs), False)(items)
    draw = torch.Generator().manual_seed(11)
    by_row = [
        torch.randn(size + features, generator=draw)
        + 0.4 * torch.randn(len(ids), size + features, generator=draw)
        for ids, _ in ROWS
    ]
    states = torch.randn(*batch["input_ids"].shape, size + features, generator=draw)
    for i, pack in enumerate(packs):
        at = 0
        for row in pack:
            states[i, at : at + len(row[0])] = by_row[ROWS.index(row)]
            at += len(row[0])
    positions = batch.get("position_ids", torch.arange(states.shape[1]).expand(len(packs), -1))
    hidden, more = states.split([size, features], dim=-1)
    output = TargetOutput(
        hidden,
        batch["input_ids"],
        batch["labels"],
        positions,
        hidden[:, :0],
        more if features else None,
    )
    return output, [one.split([size, features], dim=-1) for one in by_row]
