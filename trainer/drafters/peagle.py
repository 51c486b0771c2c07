"""P-EAGLE: EAGLE-3's head, which drafts all tokens in one pass (arXiv 2602.01469).

    slot (a, 0):  the input of EAGLE-3 at position a: emb(x_{a+1}), fc [s_low ; s_mid ; s_high]_a
    slot (a, δ):  emb(mask), fc m                          δ = 1 .. K - 1, at the position a + δ
    z = EAGLE-3's layer, then N - 1 plain decoder layers   over all slots
    logits = lm_head(norm(z)) of (a, δ) predict x_{a+2+δ}, which is offset δ + 1

    (a, δ) sees (b, 0), b <= a in a's row, and (a, ε), 1 <= ε <= δ
    L = Σ_(a,δ) CE(p_{a+1+δ}, q(a,δ)), over the kept slots

m (3d,) is trained and stands for states that the target has not computed. Depth δ keeps
n max(r^δ, r_min) of a row's n trained positions, drawn from those that depth δ - 1 keeps and that
have a trained target (r = `keep`, r_min = `keep_least`). So 8 depths take about 3.4 n slots and not
8 n. In evaluation the kept positions are evenly spaced. Depth 0 is EAGLE-3 with one pass.

With init=last_layer the N layers start as the target's last N, on the last of the states.

In decoding one pass runs the accepted positions and K - 1 slots with the mask. Only the keys and
values of the former are stored. All nodes of a depth have the same logits.

Differs from the paper:
    The mask's embedding is that of a token that no row trains, as the target has it, and is not
    trained: m is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.linear import features
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate
from trainer.drafters.distillation import Distillation, Shared, chunked_distillation
from trainer.drafters.eagle3 import Eagle3, wide_layer
from trainer.drafters.independent import IndependentGrowth
from trainer.drafters.layers import (
    autocast_like,
    embeddings_ahead,
    run_layer,
    window,
)
from trainer.drafters.mask_token import check_mask, chosen_mask
from trainer.drafters.ragged import IndependentBatch, RaggedMemory, padded
from trainer.drafters.unrolled import Entries, masked_layer
from trainer.models.on_host import Host, all_sent, offset_mask


class PEagle(Eagle3):
    """P-EAGLE's head; conf/drafter/peagle.yaml documents the settings.

    Raises:
        DrafterError: there is not one weight for each offset, a setting is out of its range, or the
        model's decoder layers cannot be built.
    """

    mask_token: Tensor

    def __init__(
        self,
        model: Any,
        offsets: int,
        draft_layers: int,
        aux_layers: list[int] | None,
        draft_vocab_size: int | None,
        coverage: float,
        train_head: bool,
        fc_norm: bool,
        layer: str,
        init: str,
        keep: float,
        keep_least: float,
        mask_token: int | None,
        weights: list[float] | None,
        beta: float,
        weight: float,
        loss: str,
        eta: float,
        lr_scale: float,
    ):
        super().__init__(
            model,
            offsets,
            None,
            aux_layers,
            draft_vocab_size,
            coverage,
            train_head,
            False,
            fc_norm,
            layer,
            init,
            weights,
            beta,
            weight,
            loss,
            eta,
            None,
            lr_scale,
        )
        if not 0 < keep_least <= keep <= 1:
            raise DrafterError(
                f"drafter.keep={keep} and drafter.keep_least={keep_least}: expected"
                " 0 < keep_least <= keep <= 1"
            )
        self.keep, self.keep_least = keep, keep_least
        _, vocabulary = features(model.get_output_embeddings())
        check_mask(mask_token, vocabulary)
        self.requested_mask = mask_token
        self._build_layers(self.family or model, init, draft_layers)
        device = self.fc.weight.device
        self.mask_hidden = nn.Parameter(torch.empty(1, 1, self.fc.in_features, device=device))
        if device.type != "meta":
            nn.init.normal_(self.mask_hidden)
        start = vocabulary - 1 if mask_token is None else mask_token
        self.register_buffer("mask_token", torch.tensor(start, device=device))

    def _build_layers(self, source: Any, init: str, draft_layers: int) -> None:
        if init == "last_layer" and draft_layers > 1:
            self.midlayer = wide_layer(source, init, draft_layers)
        self.more = nn.ModuleList(
            _without_biases(masked_layer(source, init, draft_layers - number))
            for number in range(1, draft_layers)
        )

    def calibrate(self, counts: Callable[[], Int[Tensor, " V"]]) -> None:
        super().calibrate(counts)
        self.mask_token.fill_(chosen_mask(self.requested_mask, counts().cpu()))

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        output = replace(output, hidden=output.hidden.detach())
        host, device = output.on_host(), output.hidden.device
        anchors, real = self.rollouts(host)
        # Depth 0 has a slot at each position.
        first = offset_mask(1, host.labels, host.positions)
        counts = torch.cat([first, *real], dim=1)
        width = [first.shape[1], *(where.shape[1] for where in real)]
        depth = torch.arange(self.offsets).repeat_interleave(torch.tensor(width))
        at = torch.cat([_places(host), *anchors], dim=1)
        row, slot = counts.nonzero().unbind(1)
        depth, at = depth[slot], at[row, slot]
        places = row * output.ids.shape[1] + at + 1 + depth
        shared, order, places = Shared.by_place(places, device)
        weights = torch.tensor(self.weights)[depth]
        depth, at, row, slot, weights = (part[order] for part in (depth, at, row, slot, weights))
        depth, at, row, slot, weights, places = all_sent(
            device, depth, at, row, slot, weights, places
        )
        z = self.slots(output, target, *(all_sent(device, *part) for part in (anchors, real)))
        how = Distillation(
            self.kind, target.head, self.draft_heads(target), self.vocabulary, self.eta
        )
        total, numbers = chunked_distillation(
            z[row, slot][None],
            output.hidden.flatten(0, 1)[places],
            weights[None],
            how,
            chunk,
            self.head_parameters(),
            shared,
        )
        # Where nothing counts, all parameters still take part, as DDP needs.
        total = total + 0.0 * (z.float().sum() + self.mask_hidden.float().sum())
        return total, self._numbers(numbers[:, 0], row, at, depth, output.ids)

    def _numbers(
        self,
        numbers: Float[Tensor, "4 n"],
        row: Int[Tensor, " n"],
        at: Int[Tensor, " n"],
        depth: Int[Tensor, " n"],
        ids: Int[Tensor, "B T"],
    ) -> Float[Tensor, "K 7"]:
        """Return Distilled's numbers. Kept slots are nested, so all tokens of a draft before a kept
        one are kept too."""
        known, loss, best, among, acceptance = (
            torch.zeros(*ids.shape, self.offsets, device=ids.device).index_put(
                (row, at, depth), part
            )
            for part in (torch.ones_like(numbers[0]), *numbers)
        )
        unbroken, expected = (part.cumprod(2) for part in (best, acceptance))
        columns = (loss, known, best, among, unbroken, acceptance, expected)
        return torch.stack([part.sum((0, 1)) for part in columns], dim=1)

    def rollouts(self, host: Host) -> tuple[list[Int[Tensor, "B A"]], list[Bool[Tensor, "B A"]]]:
        """Return, for the depths 1 .. K - 1, the ascending positions that are kept, and which of
        them are kept and not padding; on the host."""
        alive = offset_mask(1, host.labels, host.positions)
        many = alive.sum(1)
        anchors, real = [], []
        for depth in range(1, self.offsets):
            where = offset_mask(depth + 1, host.labels, host.positions)
            valid = alive & where
            share = max(self.keep**depth, self.keep_least)
            count = torch.minimum((many * share).ceil().long(), valid.sum(1)).unsqueeze(1)
            if self.training:
                chance = torch.rand(valid.shape)
                alive = valid & (chance.masked_fill(~valid, 2.0).argsort(1).argsort(1) < count)
            else:
                rank, most = valid.cumsum(1), valid.sum(1, keepdim=True).clamp_min(1)
                alive = valid & (rank * count // most != (rank - 1) * count // most)
            width = max(1, int(alive.sum(1).max()))
            at = alive.byte().sort(dim=1, descending=True, stable=True).indices[:, :width]
            anchors.append(at)
            real.append(alive.gather(1, at))
        return anchors, real

    def slots(
        self,
        output: TargetOutput,
        target: Target,
        anchors: Sequence[Int[Tensor, "B A"]],
        real: Sequence[Bool[Tensor, "B A"]],
    ) -> Float[Tensor, "B S d"]:
        """Return the output head's input of all slots, in the dtype of the target's states: of
        depth 0 at each position, then of the rollouts, depth by depth."""
        assert output.features is not None, "the states of `layers` are missing"
        places = _places(output)
        at = torch.cat([places, *anchors], dim=1)
        depth = torch.cat(
            [places.new_full((part.shape[1],), d) for d, part in enumerate([places, *anchors])]
        )
        exists = torch.cat([torch.ones_like(places, dtype=torch.bool), *real], dim=1)
        positions = output.positions.gather(1, at) + depth
        start = (places - output.positions).gather(1, at)
        same = start.unsqueeze(2) == start.unsqueeze(1)
        itself = at.unsqueeze(2) == at.unsqueeze(1)
        earlier = (at.unsqueeze(2) >= at.unsqueeze(1)) & (depth == 0)
        sees = same & (earlier | (itself & (depth.unsqueeze(1) >= depth)))
        sees &= exists.unsqueeze(1) | torch.eye(len(depth), dtype=torch.bool, device=at.device)
        if (reach := window(self.around(target))) is not None:
            sees &= positions.unsqueeze(2) - positions.unsqueeze(1) < reach
        ahead = self.in_own_dtype(embeddings_ahead(1, output, target))
        embedded = torch.cat(
            [ahead, self.masks(target, len(ahead), len(depth) - ahead.shape[1])], dim=1
        )
        with autocast_like(output.hidden):
            real_states = self.in_own_dtype(output.features)
            hidden = self.first_input(
                real_states,
                torch.cat(
                    [
                        real_states,
                        self.mask_hidden.expand(len(ahead), len(depth) - ahead.shape[1], -1),
                    ],
                    dim=1,
                ),
            )
            inputs = [
                self.layer_inputs(target, embedded, positions, sees, Entries())
                for _ in range(1 + len(self.more))
            ]
            return self.through(embedded, hidden, inputs).to(output.hidden.dtype)

    def masks(self, target: Target, rows: int, count: int) -> Float[Tensor, "B n d"]:
        """Return the mask's embedding, `count` times for each row."""
        with torch.no_grad():
            return self.in_own_dtype(target.embed(self.mask_token.expand(rows, count)))

    def through(
        self, embedded: Tensor, hidden: Tensor, inputs: list[Any]
    ) -> Float[Tensor, "B S d"]:
        """Return the output head's input, given each layer's inputs."""
        z = self.step(embedded, hidden, inputs[0])
        for layer, around in zip(self.more, inputs[1:], strict=True):
            z = run_layer(layer, z, around)
        return self.head_input(z)

    def start(self, target: Target) -> list[Entries]:  # type: ignore[override]
        """Return each layer's keys and values, of the target's features only."""
        return [Entries() for _ in range(1 + len(self.more))]

    @torch.no_grad()
    def grow(  # type: ignore[override]
        self, memory: list[Entries], target: Target, update: TargetUpdate
    ) -> IndependentGrowth:
        known, count, ahead = memory[0].get_seq_length(), len(update.ids), self.offsets - 1
        places = torch.arange(known + count + ahead, device=update.ids.device)
        distance = places[known:].unsqueeze(1) - places
        sees = distance >= 0
        if (reach := window(self.around(target))) is not None:
            sees = sees & (distance < reach)
        embedded = torch.cat(
            [
                self.in_own_dtype(target.embed(update.ids)).unsqueeze(0),
                self.masks(target, 1, ahead),
            ],
            dim=1,
        )
        with autocast_like(update.hidden):
            states = self.in_own_dtype(update.features).unsqueeze(0)
            hidden = self.first_input(
                states, torch.cat([states, self.mask_hidden.expand(1, ahead, -1)], dim=1)
            )
            inputs = [
                self.layer_inputs(target, embedded, places[None, known:], sees[None], entries)
                for entries in memory
            ]
            z = self.through(embedded, hidden, inputs)[0, count - 1 :].to(update.hidden.dtype)
        for entries in memory:
            entries.crop(known + count)
        (head,) = self.draft_heads(target)
        growth = IndependentGrowth.read(head, z)
        growth.vocabulary = self.vocabulary
        return growth

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(1 + len(self.more), count)

    @torch.no_grad()
    def grow_batch(
        self, memory: Any, target: Target, updates: Sequence[TargetUpdate]
    ) -> IndependentBatch:
        read, ahead = padded(updates), self.offsets - 1
        rows, device = len(updates), read.ids.device
        counts = torch.tensor(read.counts).to(device, non_blocking=True).unsqueeze(1)
        places = memory.read(read.counts, ahead, device)
        # Masks follow each row's own last position, over its padding.
        index = torch.arange(places.at.shape[1], device=device)
        masked = (index >= counts).unsqueeze(2)
        embedded = F.pad(self.in_own_dtype(target.embed(read.ids)), (0, 0, 0, ahead))
        embedded = torch.where(masked, self.masks(target, rows, 1), embedded)
        slots = counts - 1 + torch.arange(self.offsets, device=device)
        with autocast_like(read.hidden):
            states = F.pad(self.in_own_dtype(read.features), (0, 0, 0, ahead))
            hidden = self.first_input(states, torch.where(masked, self.mask_hidden, states))
            sees = places.within(window(self.around(target)))
            inputs = [
                self.layer_inputs(target, embedded, places.at, sees, cache)
                for cache in memory.layers
            ]
            z = self.through(embedded, hidden, inputs).to(read.hidden.dtype)
        z = z.gather(1, slots.unsqueeze(2).expand(-1, -1, z.shape[2]))
        (head,) = self.draft_heads(target)
        growth = IndependentBatch.read(head, z)
        growth.vocabulary = self.vocabulary
        return growth

    def state(self) -> dict[str, Tensor]:
        """Return the weights, and the id of the mask token."""
        own = super().state().items()
        return {_numbered(name): tensor for name, tensor in own} | {"mask_token": self.mask_token}


def _places(output: TargetOutput | Host) -> Int[Tensor, "B T"]:
    positions = output.positions
    return torch.arange(positions.shape[1], device=positions.device).expand_as(positions)


def _numbered(name: str) -> str:
    """Return the name of a tensor with the number of its layer, as midlayer's is 0."""
    if not name.startswith("more."):
        return name
    _, number, rest = name.split(".", 2)
    return f"layers.{int(number) + 1}.{rest}"


def _without_biases(layer: Any) -> Any:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    return layer
