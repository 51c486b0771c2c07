"""PPD, parallel prompt decoding: a few trained prompt tokens let the target itself look ahead
(Chen et al. 2024, arXiv 2405.18628).

    tokens      x_0 .. x_t   π_1 .. π_K          K = `offsets`; π_k (d,) is trained, nothing else is
    positions   0 .. t       t + 1 .. t + K
    π_k sees the text up to x_t and π_1 .. π_k. It predicts x_{t+1+k}, by the target's own head.

    L = Σ_a Σ_k w_k loss(p_{a+k}, q_{a,k})        w_k = β^(k-1), divided by their sum
    p_{a+k} = the target's distribution of x_{a+1+k} after the row's own tokens

Offset k is π_k. With `members` E > 1 there are E such chains, which do not see each other, and the
states of their k-th tokens are averaged (the paper's ensemble). For a head without a cap on its
logits this is the average of their logits. SmolLM2-135M has 1,728 trained numbers for K = 3.

A chain is trained at up to `anchors` random positions of a row whose token and next token are
trained, and their loss counts for all such positions. A token of it counts while all tokens up to
its own are trained. The row's own positions do not see prompts: one pass without a gradient gives
their keys and values, and a second one runs the prompts alone.

In decoding the pass that verifies a tree has such chains after the newest token and after every
node, so a step is one pass of the target, over (1 + E K) times the tokens. The chain after the last
accepted token is the next draft. The first step has none, and drafts nothing. Where the target
cannot read trees, or its table of positions ends or changes, the drafter reads the text itself: a
step is then two passes, the second over the new tokens and one chain. Both give the same drafts.

Differs from the paper:
    The authors cut each row at one random place, where the target writes what follows; here a row
    has many anchors, blind to each other, and should be the target's own text. Prompts start as the
    mean of the table with noise of its spread, not as words.
    Every node has all K prompts; the authors give fewer to nodes that are seldom reached. Their
    typical acceptance is not lossless, and is not the default here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, passes
from trainer.drafters.anchors import anchors_of, counted, distilled_slots, goals, numbers_of
from trainer.drafters.batch_passes import after_texts, padded, room
from trainer.drafters.distillation import KINDS
from trainer.drafters.independent import IndependentGrowth
from trainer.drafters.layers import Heads, decayed
from trainer.drafters.ragged import Entries, IndependentBatch, RaggedMemory
from trainer.models.on_host import all_sent
from trainer.speed.roomy_cache import roomy


@dataclass
class Memory:
    """Keys and values of the first `length` tokens, and the token after them. All of it stays
    empty if the verifying pass runs the prompts."""

    cache: DynamicCache = field(default_factory=lambda: roomy(DynamicCache()))
    length: int = 0
    newest: Int[Tensor, " n"] | None = None


@dataclass
class BatchMemory(RaggedMemory):
    """Memory of several sequences."""

    newest: list[Int[Tensor, " n"] | None] = field(default_factory=list)

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.newest = [self.newest[row] for row in rows]


class PromptTokens(Heads):
    """The prompt tokens (K, E, d); conf/drafter/ppd.yaml documents the settings.

    Raises:
        DrafterError: a setting is out of its range, or the target cannot run such passes.
    """

    def __init__(
        self,
        model: Any,
        offsets: int,
        members: int,
        anchors: int,
        beta: float,
        weight: float,
        loss: str,
        eta: float,
        lr_scale: float,
    ):
        super().__init__(offsets, None, decayed(beta, offsets), weight, True, lr_scale)
        if loss not in KINDS:
            raise DrafterError(f"drafter.loss={loss}: one of {', '.join(KINDS)}")
        passes.refuse(model, "ppd")
        self.members, self.anchors, self.kind, self.eta = members, anchors, loss, eta
        table = model.get_input_embeddings().weight
        size = model.config.get_text_config().hidden_size
        if table.shape[1] != size:
            raise DrafterError(
                f"drafter=ppd puts trained embeddings before the first layer, and"
                f" {type(model).__name__}'s have {table.shape[1]} numbers, its layers {size}: train"
                " another drafter, such as eagle3"
            )
        self.prompts = nn.Parameter(torch.empty(offsets, members, size, device=table.device))
        if table.device.type != "meta":
            with torch.no_grad():
                some = table[:: max(1, len(table) // 1024)].float()
                self.prompts.copy_(some.mean(0) + torch.randn(self.prompts.shape) * some.std())

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        host = output.on_host()
        at, real, share = anchors_of(host, self.anchors, drawn=self.training)
        # The anchor's next token is the target's own, and known when the prompts are used.
        goal = goals(at, self.offsets + 1)
        counts = counted(goal, at, real, host)[:, :, 1:]
        weights = share.unsqueeze(1) * torch.tensor(self.weights)
        at, counts_there = all_sent(output.hidden.device, at, counts)
        states, how = self.looked_ahead(output, target, at), (self.kind, self.eta)
        total, numbers = distilled_slots(
            states, counts, goal[:, :, 1:], weights, output, target, how, chunk
        )
        return total, numbers_of(counts_there, *numbers)

    def looked_ahead(
        self, output: TargetOutput, target: Target, at: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A K d"]:
        """Return the states that the head reads at the prompts of the chains at these anchors."""
        passes.refuse_virtual_tokens(target.model, "ppd")
        rows, count = at.shape
        ahead, sees = self.chains(self.offsets, at.device)
        block = torch.arange(count, device=at.device).repeat_interleave(len(ahead))
        together = (block.unsqueeze(1) == block) & sees.repeat(count, count)
        prompts = self.embedded(self.offsets, target).repeat(rows, count, 1)
        hidden = passes.after_anchors(
            target,
            output,
            at,
            passes.Block({"inputs_embeds": prompts}, ahead, together),
            contextlib.nullcontext(),
        )
        return self.averaged(hidden.view(rows, count, len(ahead), -1))

    def chains(
        self, count: int, device: torch.device
    ) -> tuple[Int[Tensor, " n"], Bool[Tensor, "n n"]]:
        """Return how far each of the prompts of `count` offsets is ahead of the text's end, and
        which see which. They are in the order of `prompts`: n = count E."""
        number = torch.arange(count * self.members, device=device)
        k, member = number // self.members, number % self.members
        return 1 + k, (member.unsqueeze(1) == member) & (k.unsqueeze(1) >= k)

    def embedded(self, count: int, target: Target) -> Float[Tensor, "1 n d"]:
        """Return the prompts of `count` offsets in the dtype of the target's embeddings."""
        prompts = self.prompts[:count].flatten(0, 1).unsqueeze(0)
        return prompts.to(target.model.get_input_embeddings().weight.dtype)

    def averaged(self, hidden: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b K d"]:
        """Return the mean over the members."""
        if self.members == 1:
            return hidden
        return hidden.unflatten(-2, (-1, self.members)).mean(-2)

    def start(self, target: Target) -> Memory:
        passes.refuse_virtual_tokens(target.model, "ppd")
        return Memory()

    def appended(self, target: Target) -> Float[Tensor, "E K d"]:
        passes.refuse_virtual_tokens(target.model, "ppd")
        return self.prompts.detach().transpose(0, 1)

    @torch.no_grad()
    def grow(self, memory: Memory, target: Target, update: TargetUpdate) -> IndependentGrowth:
        if update.extra is not None:  # the verifying pass has read the prompts
            states = update.extra.mean(0) if self.members > 1 else update.extra[0]
            return IndependentGrowth.read(target.head, states)
        passes.cropped(memory.cache, memory.length)
        ids = passes.text_of(update)
        ids = ids if memory.newest is None else torch.cat([memory.newest, ids])
        text, memory.newest = ids[:-1], ids[-1:]
        read, memory.length = memory.length, memory.length + len(text)
        room = passes.room(target.config, memory.length)
        count = self.offsets if room is None else max(1, min(self.offsets, room))
        ahead, sees = self.chains(count, ids.device)
        places = torch.arange(memory.length, device=ids.device)
        queries = torch.cat([places[read:], memory.length - 1 + ahead])
        keys = torch.cat([places, queries[len(text) :]])
        visible = queries.unsqueeze(1) >= keys
        visible[: len(text), memory.length :] = False
        visible[len(text) :, memory.length :] = sees
        embedded = torch.cat([target.embed(text).unsqueeze(0), self.embedded(count, target)], dim=1)
        mask = passes.masks(target, visible[None], queries[None], keys[None], embedded.dtype)
        hidden = passes.run(
            target,
            memory.cache,
            inputs_embeds=embedded,
            position_ids=queries[None],
            attention_mask=mask,
        )
        states = self.averaged(hidden[0, len(text) :])
        return IndependentGrowth.read(target.head, states)

    def start_batch(self, target: Target, count: int) -> BatchMemory:
        passes.refuse_virtual_tokens(target.model, "ppd")
        layers = [Entries() for _ in range(target.config.num_hidden_layers)]
        return BatchMemory(layers, [0] * count, [None] * count)

    @torch.no_grad()
    def grow_batch(
        self, memory: BatchMemory, target: Target, updates: Sequence[TargetUpdate]
    ) -> IndependentBatch:
        """Start trees as `grow` does. All have as many prompts as the longest one has room for."""
        extras = [update.extra for update in updates if update.extra is not None]
        if extras:  # the verifying pass has read the prompts, of all sequences
            read = torch.stack(extras).mean(1)
            return IndependentBatch.read(target.head, read)
        texts = [passes.text_of(update) for update in updates]
        texts = [
            text if newest is None else torch.cat([newest, text])
            for text, newest in zip(texts, memory.newest, strict=True)
        ]
        memory.newest, texts = [text[-1:] for text in texts], [text[:-1] for text in texts]
        ids, counts = padded(texts)
        count = max(1, room(target, memory, counts, self.offsets))
        embedded = self.embedded(count, target).expand(len(texts), -1, -1)
        block = passes.Block({"inputs_embeds": embedded}, *self.chains(count, ids.device))
        _, hidden = after_texts(target, memory, ids, counts, block, contextlib.nullcontext())
        states = self.averaged(hidden)
        return IndependentBatch.read(target.head, states)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group | {"weight_decay": 0.0} for group in super().parameter_groups()]
