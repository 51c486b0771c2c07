"""A block of tokens drafted in one pass: DSpark (arXiv 2607.05147), and DFlash (arXiv 2602.06036),
its case without a Markov head.

    c_s = norm_c(F [h_s of `layers`])                            s < a: the context, once for all
    z_0 = emb(x_a), z_1 .. z_{K-1} = emb(mask)                   the block at the anchor a
    z <- z + Attention(norm(z); keys and values of [c_s, s < a; norm(z_0) .. norm(z_{K-1})])
    z <- z + MLP(norm(z))                                        N layers of Qwen3's kind
    u_k = norm_out(z_{k-1}),  U_k = head(u_k)                    head and emb are the target's
    q_k(. | x_{a+k-1}) = softmax(U_k + W_2 W_1[x_{a+k-1}])       predicts x_{a+k}, k = 1 .. K;
                         or another Markov head (trainer.drafters.markov)
    c_k = σ(w·[u_k ; W_1[x_{a+k-1}]] + w_0)                      whether x_{a+k} is accepted

    L = Σ_a Σ_k exp(-(k-1)/γ) (ce CE(p, q_k) + l1 |q_k - p|_1 + v BCE(c_k, Σ min(p, q_k)))

F (d, n d), W_1 (V, r), W_2 (V, r). The tokens of a block see each other in both directions, without
knowing what they will be; W makes neighbours fit. A block is trained at each of up to `anchors`
random positions of a row whose token and next token are trained, and their loss counts for all such
positions. A slot counts while all tokens up to it are trained, so that a block never
reaches over the end of an answer. In evaluation the anchors are evenly spaced.

With a draft vocabulary of v tokens (trainer.drafters.draft_vocabulary) head are the target's rows
of these, W_2 is (v, r), and trainer.drafters.distillation says how p counts.

With init=last_layer the block starts as the target's last layers (trainer.drafters.block_start).

In decoding the context's keys and values are kept, and a block is computed once for each draft.
Every node of a tree has its own q, by its parent's token, so trees grow as with any head.

Differs from the paper:
    CE is against the target's distribution and not the row's token: the same mean for rows that the
    target wrote, with less variance. The acceptance head has no gradient to u and W_1, as all such
    heads here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.linear import features, float_weight
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, draft_vocabulary
from trainer.drafters.anchors import anchors_of, counted, goals, numbers_of, shared_places
from trainer.drafters.block_batch import BlockBatch
from trainer.drafters.block_growth import BlockGrowth
from trainer.drafters.block_layer import KeysValues, keys_values, run_block
from trainer.drafters.block_start import start_as_last_layers
from trainer.drafters.distillation import Distillation, chunked_distillation
from trainer.drafters.families import family_of
from trainer.drafters.layers import (
    Heads,
    autocast_like,
    check_states,
    decoder_layer,
    final_norm,
    layers_of,
    projection,
    requested_layers,
    rotations,
)
from trainer.drafters.markov import Markov, check_settings
from trainer.drafters.mask_token import check_mask, chosen_mask
from trainer.drafters.ragged import RaggedMemory, padded
from trainer.models.heads import Head
from trainer.models.on_host import Host, all_sent


class Block(Heads):
    """A block drafter; conf/drafter/dspark.yaml documents the settings.

    Raises:
        DrafterError: a setting is out of its range, or the acceptance head has no Markov head.
    """

    mask_token: Tensor
    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        model: Any,
        offsets: int,
        draft_layers: int,
        aux_layers: list[int] | None,
        draft_vocab_size: int | None,
        coverage: float,
        train_head: bool,
        markov_rank: int,
        markov: str,
        init: str,
        mask_token: int | None,
        anchors: int,
        decay: float,
        ce: float,
        l1: float,
        confidence: float | None,
        weight: float,
        lr_scale: float,
    ):
        default = [math.exp(-k / decay) for k in range(offsets)]
        super().__init__(offsets, None, default, weight, True, lr_scale)
        check_settings(markov_rank, markov, ce, l1, confidence)
        size = model.config.get_text_config().hidden_size
        _, vocabulary = features(model.get_output_embeddings())
        check_mask(mask_token, vocabulary)
        self.requested_mask = mask_token
        self.layers = context_layers(len(layers_of(model)), aux_layers)
        check_states(model, self.layers)
        self.anchors, self.ce, self.l1 = anchors, ce, l1
        family: Any = family_of(model, "qwen3", "random", keeps_biases=False)
        self.family = family
        self.fc = projection(model, len(self.layers) * size, size)
        self.context_norm = final_norm(family, "random")
        self.blocks = nn.ModuleList(decoder_layer(family, "random") for _ in range(draft_layers))
        self.norm = final_norm(family, "random")
        if init == "last_layer":
            start_as_last_layers(model, self.fc, list(self.blocks), self.norm)
        device = self.fc.weight.device
        drafted = min(draft_vocab_size or vocabulary, vocabulary)
        self._give_vocabulary(model, drafted, coverage, train_head)
        self.markov: Markov | None = None
        if markov_rank:
            self.markov = Markov(markov, model, family, vocabulary, markov_rank, drafted)
        self.confidence_weight = confidence or 0.0
        self.confidence: nn.Linear | None = None
        if confidence is not None:
            self.confidence = nn.Linear(size + markov_rank, 1, device=device, dtype=torch.float32)
            if device.type != "meta":
                nn.init.zeros_(self.confidence.weight)
                nn.init.constant_(self.confidence.bias, math.log(0.7 / 0.3))
        start = vocabulary - 1 if mask_token is None else mask_token
        self.register_buffer("mask_token", torch.tensor(start, device=device))

    def _give_vocabulary(self, model: Any, drafted: int, coverage: float, train_head: bool) -> None:
        """Build the head over a draft vocabulary, if `drafted` tokens are not all."""
        output = model.get_output_embeddings()
        size, vocabulary = features(output)
        self.coverage = coverage
        self.lm_head: nn.Linear | None = None
        self._rows: Callable[[], Tensor] = lambda: float_weight(output)
        if drafted == vocabulary:
            if train_head:
                raise DrafterError(
                    "drafter.train_head=true trains the rows of a draft vocabulary, and there is"
                    " none: set drafter.draft_vocab_size, or drafter.train_head=false"
                )
            return
        self.lm_head = projection(model, size, drafted).requires_grad_(train_head)
        draft_vocabulary.register(self, drafted, vocabulary, self.lm_head.weight.device)
        self._start_head()

    @property
    def vocabulary(self) -> Int[Tensor, " v"] | None:
        """Return the target's ids of the tokens that can be drafted; None for all."""
        return None if self.lm_head is None else draft_vocabulary.token_ids(self)

    @torch.no_grad()
    def _start_head(self) -> None:
        """Copy the target's rows of the draft vocabulary."""
        if self.lm_head is not None and self.lm_head.weight.device.type != "meta":
            rows = self._rows()[draft_vocabulary.token_ids(self)]
            self.lm_head.weight.copy_(rows.to(self.lm_head.weight))

    def calibrate(self, counts: Callable[[], Int[Tensor, " V"]]) -> None:
        if self.lm_head is not None:
            draft_vocabulary.choose_most_frequent(self, counts(), self.coverage)
            self._start_head()
        self.mask_token.fill_(chosen_mask(self.requested_mask, counts().cpu()))

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        output = replace(output, hidden=output.hidden.detach())
        host = output.on_host()
        at, real, share = self.anchors_of(host)
        goal = goals(at, self.offsets)
        counts = counted(goal, at, real, host)
        shared, (row, anchor, slot), places = shared_places(
            counts, goal - 1, output.hidden.device, output.ids.shape[1]
        )
        ahead = goal[row, anchor, slot]
        weights = torch.tensor(self.weights)[slot] * share[row]
        at, counts, row, anchor, slot, weights, ahead, places = all_sent(
            output.hidden.device, at, counts, row, anchor, slot, weights, ahead, places
        )
        u = self.slots(output, target, at)
        before = output.ids[row, ahead - 1]
        z = u[row, anchor, slot]
        if self.markov is not None:
            known = goals(at, self.offsets) - 1
            inside = known.clamp_max(output.ids.shape[1] - 1).flatten(1)
            tokens = output.ids.gather(1, inside).view(known.shape)
            z = torch.cat([z, self.markov.blocks(u, tokens)[row, anchor, slot]], dim=-1)
        heads = (self.draft_head(target),)
        how = Distillation("ce_l1", target.head, heads, self.vocabulary, ce=self.ce, l1=self.l1)
        total, numbers = chunked_distillation(
            z[None],
            output.hidden.flatten(0, 1)[places],
            weights[None],
            how,
            chunk,
            self.head_parameters(),
            shared,
        )
        # Where nothing counts, all parameters still take part, as DDP needs.
        total = total + 0.0 * u.float().sum()
        acceptance = numbers[3, 0]
        spread = [
            torch.zeros(counts.shape, device=u.device).index_put((row, anchor, slot), part)
            for part in numbers[:, 0]
        ]
        columns = list(numbers_of(counts, *spread).unbind(1))
        if self.confidence is not None:
            logits = self.acceptance_logits(u[row, anchor, slot].detach(), before)
            wrong = F.binary_cross_entropy_with_logits(logits, acceptance, reduction="none")
            total = total + self.confidence_weight * (weights * wrong).sum()
            error = (logits.detach().sigmoid() - acceptance).abs()
            columns.append(
                torch.zeros(counts.shape, device=u.device)
                .index_put((row, anchor, slot), error)
                .sum((0, 1))
            )
        return total, torch.stack(columns, dim=1)

    def anchors_of(
        self, host: Host
    ) -> tuple[Int[Tensor, "B A"], Bool[Tensor, "B A"], Float[Tensor, " B"]]:
        """Return the anchors of a batch, as trainer.drafters.anchors does."""
        return anchors_of(host, self.anchors, drawn=self.training)

    def slots(
        self, output: TargetOutput, target: Target, at: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A K d"]:
        """Return u of the blocks at these anchors, in the dtype of the target's states."""
        assert output.features is not None, "the states of `layers` are missing"
        places = torch.arange(output.ids.shape[1], device=at.device)
        start = (places - output.positions).gather(1, at).unsqueeze(2)
        sees = (places >= start) & (places < at.unsqueeze(2))
        positions = output.positions.gather(1, at).unsqueeze(2) + torch.arange(
            self.offsets, device=at.device
        )
        with autocast_like(output.hidden):
            context = self.context(output.features)
            turn = rotations(self.family, context, output.positions)
            z = self.entering(target, output.ids.gather(1, at))
            turned = rotations(self.family, context, positions.flatten(1))
            for layer in self.blocks:
                z = run_block(layer, z, turned, keys_values(layer, context, turn), sees)
            return self.norm(z).to(output.hidden.dtype)

    def context(self, states: Float[Tensor, "B T f"]) -> Float[Tensor, "B T d"]:
        """Return c of the target's states."""
        return self.context_norm(self.fc(states.to(self.fc.weight.dtype)))

    def entering(self, target: Target, tokens: Int[Tensor, "B A"]) -> Float[Tensor, "B A K d"]:
        """Return the blocks' input."""
        with torch.no_grad():
            mask = self.mask_token.expand(*tokens.shape, self.offsets - 1)
            embedded = target.embed(torch.cat([tokens.unsqueeze(2), mask], dim=2))
        return embedded.to(self.fc.weight.dtype)

    def head_input(
        self, u: Float[Tensor, "*b d"], before: Int[Tensor, "*b"], s: Float[Tensor, "*b s"]
    ) -> tuple[Float[Tensor, "*b d+r"], Float[Tensor, "*b s"]]:
        """Return [u ; b], which `draft_head` reads, and the next slot's s of the Markov head."""
        if self.markov is None:
            return u, s
        b, s = self.markov.step(u, before, s)
        return torch.cat([u, b], dim=-1), s

    def first_state(self, u: Float[Tensor, "*b d"]) -> Float[Tensor, "*b s"]:
        """Return the Markov head's s of a block's first slot."""
        return u[..., :0] if self.markov is None else self.markov.start(u)

    def draft_head(self, target: Target) -> Head:
        """Return the function from `head_input` to logits."""
        size = self.fc.out_features

        def head(z: Tensor) -> Tensor:
            u, own = z[:, :size], self.lm_head
            if own is None:
                logits = target.head(u)
            else:
                with autocast_like(u):
                    logits = own(u.to(own.weight.dtype))
            if self.markov is None:
                return logits
            weight = self.markov.w2.weight
            return logits.float() + F.linear(z[:, size:].to(weight.dtype), weight).float()

        return head

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the trained parameters of `draft_head`."""
        parts = (self.lm_head, None if self.markov is None else self.markov.w2)
        weights = [p for part in parts if part is not None for p in part.parameters()]
        return tuple(weight for weight in weights if weight.requires_grad)

    def acceptance_logits(
        self, u: Float[Tensor, "n d"], before: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Return the logits of c. There is a head. W_1 gets no gradient."""
        assert self.confidence is not None
        assert self.markov is not None
        z = torch.cat([u, self.markov.w1(before).detach().to(u.dtype)], dim=-1)
        with autocast_like(z):
            return self.confidence(z.to(self.confidence.weight.dtype))[:, 0].float()

    def start(self, target: Target) -> list[KeysValues]:
        """Return each layer's keys and values of the context; empty before the first proposal."""
        return []

    @torch.no_grad()
    def grow(self, memory: list[KeysValues], target: Target, update: TargetUpdate) -> BlockGrowth:
        known = memory[0][0].shape[2] if memory else 0
        count = len(update.ids)
        places = torch.arange(known, known + count + self.offsets, device=update.ids.device)
        with autocast_like(update.hidden):
            context = self.context(update.features.unsqueeze(0))
            turn = rotations(self.family, context, places[None, :count])
            turned = rotations(self.family, context, places[None, count:])
            z = self.entering(target, update.ids[None, -1:])
            sees = torch.ones(1, 1, known + count, dtype=torch.bool, device=z.device)
            for number, layer in enumerate(self.blocks):
                more = keys_values(layer, context, turn)
                if number == len(memory):
                    memory.append(more)
                else:
                    pairs = zip(memory[number], more, strict=True)
                    keys, values = (torch.cat(pair, dim=2) for pair in pairs)
                    memory[number] = keys, values
                z = run_block(layer, z, turned, memory[number], sees)
            u = self.norm(z)[0, 0].to(update.hidden.dtype)
        return BlockGrowth(self, target, u, update.ids[-1:])

    def start_batch(self, target: Target, count: int) -> RaggedMemory:
        return RaggedMemory.empty(len(self.blocks), count)

    @torch.no_grad()
    def grow_batch(
        self, memory: RaggedMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> BlockBatch:
        read = padded(updates)
        device = read.ids.device
        anchor = read.newest(read.ids.unsqueeze(2))
        with autocast_like(read.hidden):
            context = self.context(read.features)
            places = memory.read(read.counts, 0, device)
            turn = rotations(self.family, context, places.at)
            at = torch.tensor(memory.lengths).to(device, non_blocking=True).unsqueeze(1)
            block = at + torch.arange(self.offsets, device=device)
            turned = rotations(self.family, context, block)
            z = self.entering(target, anchor)
            sees = (torch.arange(places.end, device=device) < at).unsqueeze(1)
            for layer, entries in zip(self.blocks, memory.layers, strict=True):
                known = entries.update(*keys_values(layer, context, turn))
                z = run_block(layer, z, turned, known, sees)
            u = self.norm(z)[:, 0].to(read.hidden.dtype)
        return BlockBatch(self, target, u, anchor)

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the id of the mask token, with a draft vocabulary also d2t, t2d
        and the rows of the output layer."""
        state = super().state() | {"mask_token": self.mask_token}
        if self.lm_head is not None:
            state |= {"lm_head.weight": self.lm_head.weight.detach()}
            state |= {"d2t": self.d2t, "t2d": self.t2d}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        draft_vocabulary.check_stored(state)
        super().load_state(state)


def context_layers(depth: int, requested: list[int] | None) -> tuple[int, ...]:
    """Return the states of the target that are read, as transformers counts hidden_states: the
    outputs of layers round(1 + i (L - 4) / 4), i = 0 .. 4, of L = `depth`, or the `requested` ones.

    Raises:
        DrafterError: the target has no such states, or they are not ascending.
    """
    if requested is None:
        places = (round(1 + i * (depth - 4) / 4) for i in range(5))
        return tuple(sorted({min(max(place, 0), depth - 1) + 1 for place in places}))
    return requested_layers(depth, requested)
