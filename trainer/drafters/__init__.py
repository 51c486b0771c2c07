"""What predicts tokens beyond the next one: trained beside an adapter or alone, and proposing tokens while decoding.

    offset k = 1 .. K: at position t the k-th prediction is of x_{t+1+k}. x_{t+1} is the target's own.

A target is the base with its adapter. A drafter shares the target's embedding and output head, which it never trains, reads the
hidden states h (B, T, d) that the output head reads, and gives for each offset the hidden states that the head turns into logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.losses import Head, chunked_predictions, output_head


class DrafterError(ValueError):
    """The drafter does not fit the target or the rows. The message says what was asked for and what there is."""


class Target:
    """What a drafter shares with the model that it drafts for.

    Raises:
        DrafterError: no known way leads from the model's hidden states to its logits.
    """

    def __init__(self, model: Any):
        self.model = model
        self.decoder = model.get_decoder()
        self.config = model.config.get_text_config()
        self.embed: Callable[[Tensor], Tensor] = model.get_input_embeddings()
        head = output_head(model)
        if head is None:
            raise DrafterError(
                f"{type(model).__name__}'s logits are not its output layer's with a known scale or cap, "
                "so no drafter can share its head: set drafter=none"
            )
        self.head: Head = head


@dataclass(frozen=True)
class Seen:
    """A batch after the target's forward pass. Padding is to the right; rows of a packed sequence follow each other."""

    hidden: Float[Tensor, "B T d"]  # what the output head read
    ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]  # the id where a token is trained, -100 elsewhere, at each row's first token too
    positions: Int[Tensor, "B T"]  # from 0 in each row
    extra: Float[Tensor, "B R d"]  # hidden states of what `inputs` put after the sequence; R is 0 without


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, one after another, with the distributions that they were drawn from."""

    tokens: Int[Tensor, " n"]
    probabilities: Float[Tensor, "n V"] | None  # None for greedy proposals: all of it on the token


class Drafter(nn.Module):
    """A method, made for one target model before the adapter is attached to it."""

    offsets: int  # K
    weights: list[float]  # of the offsets' losses
    main_weight = 1.0  # of the target's own next-token loss beside them
    proposes = True  # whether it is of use after training: a method that only shapes the adapter is not saved
    detach = True  # whether gradients stop at the target's hidden states

    seen = Seen  # what CausalLoss gives to `loss`

    def inputs(self, batch: dict[str, Any], target: Target) -> dict[str, Tensor] | None:
        """The target's inputs for training, where they are not the batch's own `input_ids` and `position_ids`: the batch's T
        positions first, and what this method puts after them, which they must not see. Called while training only."""
        return None

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        """For each offset in turn what the output head reads at each position. Position t of offset k may use x up to x_{t+k} of
        its own row; positions for which those do not exist may hold anything finite."""
        raise NotImplementedError

    def loss(self, seen: Seen, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        """(weighted loss, numbers): the sum over offsets of weight times summed cross-entropy; and in fp32 (K, 5), for each
        offset the summed loss, the number of targets, how often the best and one of the five best guesses was right, and how
        often it and those of all offsets before were. Never more than `chunk` positions' logits of one offset exist."""
        seen = replace(seen, hidden=seen.hidden.detach()) if self.detach else seen
        # With adapter=full the shared head is trained, too.
        layer = target.model.get_output_embeddings()
        trained = () if self.detach else tuple(p for p in layer.parameters() if p.requires_grad)
        total = seen.hidden.new_zeros((), dtype=torch.float32)
        numbers, unbroken = [], torch.ones_like(seen.ids, dtype=torch.bool)
        for k, hidden in enumerate(self.states(seen, target), 1):
            where, targets = targets_of(k, seen.labels, seen.positions)
            summed, best, among = chunked_predictions(hidden[where], targets, target.head, chunk, trained, top=5)
            total = total + self.weights[k - 1] * summed
            right = torch.zeros_like(unbroken)
            right[where] = best
            unbroken = unbroken & right
            numbers.append(torch.stack([summed.detach(), where.sum(), best.sum(), among.sum(), unbroken.sum()]).float())
        return total, torch.stack(numbers)

    def start(self, target: Target) -> Any:
        """What `propose` remembers of one sequence, empty."""
        raise NotImplementedError

    def propose(
        self, memory: Any, target: Target, hidden: Float[Tensor, "n d"], ids: Int[Tensor, " n"], count: int,
        choose: Callable[[Float[Tensor, " V"]], tuple[Tensor, Tensor | None]],
    ) -> Draft:  # fmt: skip
        """Up to `count` tokens, at most K, to follow x_{p+n}.

        `hidden` are the target's states at the n positions p .. p+n-1 that were accepted since the last call, from position 0
        on over all calls, and `ids` the tokens x_{p+1} .. x_{p+n} after them: the last one's own state is not known yet.
        `choose` turns logits into a token (scalar) and the distribution it was drawn from (V,), None when greedy.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters, with an `lr_scale` on the optimiser's rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def state(self) -> dict[str, Tensor]:
        """The trained tensors, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put a `state` back, in place.

        Raises:
            DrafterError: names or shapes differ; nothing is loaded then.
        """
        own = self.state()
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
            different = sorted(
                name
                for name in own.keys() | state.keys()
                if name not in own or name not in state or own[name].shape != state[name].shape
            )
            raise DrafterError(
                f"these drafter weights are of another model or of other settings: {', '.join(different[:5])} differ"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


def metrics(numbers: Float[Tensor, "K 5"]) -> dict[str, float]:
    """What Drafter.loss counts, as means: for each offset its loss, top-1 and top-5 accuracy, and `accepted`, the tokens that a
    step of greedy decoding would take if the rows were its own text: 1 + sum over offsets of how often all guesses up to it
    were right."""
    found: dict[str, float] = {}
    accepted = 1.0
    for k, (loss, count, best, among, unbroken) in enumerate(numbers.tolist(), 1):
        if count:
            found |= {f"offset{k}/loss": loss / count, f"offset{k}/top1": best / count, f"offset{k}/top5": among / count}
            accepted += unbroken / count
    return found | {"accepted": accepted} if found else found


def targets_of(offset: int, labels: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]) -> tuple[Tensor, Int[Tensor, " n"]]:
    """(where, targets) of an offset: the positions t (B, T) whose token x_{t+1+offset} is trained and of the same row, and those
    tokens (n,)."""
    ahead = offset + 1
    where = torch.zeros_like(labels, dtype=torch.bool)
    if labels.shape[1] > ahead:
        same = positions[:, ahead:] == positions[:, :-ahead] + ahead
        where[:, :-ahead] = same & (labels[:, ahead:] != -100)
    shifted = torch.full_like(labels, -100)
    shifted[:, :-ahead] = labels[:, ahead:]
    return where, shifted[where]
