"""What predicts tokens beyond the next one: trained beside an adapter or alone, and proposing
tokens while decoding.

    offset k = 1 .. K: at position t the k-th prediction is of x_{t+1+k}. x_{t+1} is the target's
    own.

A target is the base with its adapter. A drafter shares the target's embedding and output head,
which it never trains, reads the hidden states h (B, T, d) that the output head reads, and gives for
each offset the hidden states that the head turns into logits.

While decoding a drafter proposes a tree of tokens (Draft) that a decoder verifies in one pass of
the target. Most drafters only give distributions node by node (Growth), and a strategy of
trainer.decoding.trees makes the tree; one that drafts a whole block at once overrides `propose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.models.heads import Head, output_head
from trainer.models.losses import chunked_predictions


class DrafterError(ValueError):
    """The drafter does not fit the target or the rows. The message says what was asked for and what
    there is."""


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
                f"{type(model).__name__}'s logits are not its output layer's with a known scale or"
                " cap, so no drafter can share its head: set drafter=none"
            )
        self.head: Head = head

    @property
    def depth(self) -> int:
        """L, the number of the target's decoder layers."""
        return len(self.decoder.layers)


@dataclass(frozen=True)
class Seen:
    """A batch after the target's forward pass. Padding is to the right; rows of a packed sequence
    follow each other."""

    hidden: Float[Tensor, "B T d"]  # what the output head read
    ids: Int[Tensor, "B T"]
    # the id where a token is trained, -100 elsewhere, at each row's first token too
    labels: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]  # from 0 in each row
    # hidden states of what `inputs` put after the sequence; R is 0 without
    extra: Float[Tensor, "B R d"]
    # the states of `Drafter.layers`, side by side; None without any
    features: Float[Tensor, "B T f"] | None = None


@dataclass(frozen=True)
class News:
    """What the target has computed since the last proposal for one sequence: its states at the n
    positions p .. p+n-1 that were accepted since, from position 0 on over all proposals."""

    hidden: Float[Tensor, "n d"]  # what the output head read
    # the states of `Drafter.layers`, side by side; f is 0 without any
    features: Float[Tensor, "n f"]
    # x_{p+1} .. x_{p+n}, the token after each of them: the last one's own state is not known yet
    ids: Int[Tensor, " n"]
    first: Int[Tensor, ""] | None = None  # x_0, at the first proposal
    tried: tuple[Int[Tensor, " m"], Float[Tensor, "m V"]] | None = (
        None  # tokens of the last pass, refused ones too, and logits after each
    )


@dataclass(frozen=True)
class Draft:
    """A tree of proposed tokens. Nodes stand after their parents, and siblings in the order in
    which they were drawn.

    `rows` gives for each node the row of `probabilities` that it was drawn from, the same for all
    siblings: the distribution as it was before the first of them was drawn. `parents` and `rows`
    are best on the CPU, where the decoder reads them.
    """

    tokens: Int[Tensor, " n"]
    parents: Int[Tensor, " n"]  # -1: the newest token
    probabilities: Float[Tensor, "r V"] | None = None  # None: chosen without chance
    rows: Int[Tensor, " n"] | None = None
    replaced: bool = False  # whether siblings were drawn with replacement; else without


def chain(tokens: Int[Tensor, " n"], probabilities: Float[Tensor, "n V"] | None = None) -> Draft:
    """The tree in which each token follows the one before."""
    places = torch.arange(len(tokens))
    return Draft(tokens, places - 1, probabilities, None if probabilities is None else places)


class Growth(Protocol):
    """A drafter's distributions over one tree, as a strategy grows it."""

    depth: int  # how many tokens may follow one another
    branches: bool  # whether a node may have more than one child
    # target ids of the logits' places; None where they are the target's own
    vocabulary: Int[Tensor, " v"] | None
    confidence: (
        Float[Tensor, " m"] | None
    )  # of the nodes that `below` was last given, where the drafter predicts that they are taken

    def first(self) -> Float[Tensor, " v"]:
        """Logits of the token after the newest one."""

    def below(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
        """Add m nodes of one depth to the tree, with target ids and the numbers of their parents
        (nodes count from 0 in the order in which they were added; -1 is the newest token). Gives
        the logits of the token after each."""


Strategy = Callable[[Growth], Draft]


class Drafter(nn.Module):
    """A method, made for one target model before the adapter is attached to it."""

    offsets: int  # K
    weights: list[float]  # of the offsets' losses
    main_weight = 1.0  # of the target's own next-token loss beside them
    # whether it is of use after training: a method that only shapes the adapter is not saved
    proposes = True
    detach = True  # whether gradients stop at the target's hidden states
    # further states of the target that it reads, as transformers counts hidden_states: 0 .. L
    layers: tuple[int, ...] = ()

    seen = Seen  # what CausalLoss gives to `loss`

    @property
    def depth(self) -> int:
        """How many tokens may follow one another in a draft: K, unless the method can go on."""
        return self.offsets

    def calibrate(self, counts: Callable[[], Int[Tensor, " V"]]) -> None:
        """Called once before a run's first step, not where one goes on: `counts` says how often
        each token is trained in the run's rows. What is made from it belongs into `state`.

        Raises:
            DrafterError: the rows do not suit the settings.
        """

    def inputs(self, batch: dict[str, Any], target: Target) -> dict[str, Tensor] | None:
        """The target's inputs for training, where they are not the batch's own `input_ids` and
        `position_ids`: the batch's T positions first, and what this method puts after them, which
        they must not see. Called while training only."""
        return None

    def states(self, seen: Seen, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        """For each offset in turn what the output head reads at each position. Position t of offset
        k may use x up to x_{t+k} of its own row; positions for which those do not exist may hold
        anything finite."""
        raise NotImplementedError

    def head_of(self, offset: int, target: Target) -> tuple[Head, tuple[nn.Parameter, ...]]:
        """(what turns an offset's states into logits (n, V), what of it is trained): the target's
        own output head by default."""
        # With adapter=full the shared head is trained, too.
        layer = target.model.get_output_embeddings()
        return target.head, (
            () if self.detach else tuple(p for p in layer.parameters() if p.requires_grad)
        )

    def at(self, step: int, steps: int) -> None:
        """Called before each of a run's micro-batches with the 0-based step that it belongs to, of
        the planned ones."""

    def loss(self, seen: Seen, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        """(weighted loss, numbers): the sum over offsets of weight times summed cross-entropy; and
        in fp32 (K, 5), for each offset the summed loss, the number of targets, how often the best
        and one of the five best guesses was right, and how often it and those of all offsets before
        were. Never more than `chunk` positions' logits of one offset exist."""
        seen = replace(seen, hidden=seen.hidden.detach()) if self.detach else seen
        total = seen.hidden.new_zeros((), dtype=torch.float32)
        numbers, unbroken = [], torch.ones_like(seen.ids, dtype=torch.bool)
        for k, hidden in enumerate(self.states(seen, target), 1):
            where, targets = targets_of(k, seen.labels, seen.positions)
            head, trained = self.head_of(k, target)
            summed, best, among = chunked_predictions(
                hidden[where], targets, head, chunk, trained, top=5
            )
            total = total + self.weights[k - 1] * summed
            right = torch.zeros_like(unbroken)
            right[where] = best
            unbroken = unbroken & right
            numbers.append(
                torch.stack(
                    [summed.detach(), where.sum(), best.sum(), among.sum(), unbroken.sum()]
                ).float()
            )
        return total, torch.stack(numbers)

    def start(self, target: Target) -> Any:
        """What `propose` remembers of one sequence, empty."""
        raise NotImplementedError

    def grow(self, memory: Any, target: Target, news: News) -> Growth:
        """Take in what the target has computed, and open a tree after the newest token. `memory`
        keeps only what was computed from the target's states; a tree's own entries are gone with
        it."""
        raise NotImplementedError

    def propose(self, memory: Any, target: Target, news: News, strategy: Strategy) -> Draft:
        """The tokens to verify next, none at all if there is nothing to say. Every call's `news`
        must be taken in."""
        return strategy(self.grow(memory, target, news))

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
        if {name: t.shape for name, t in own.items()} != {
            name: t.shape for name, t in state.items()
        }:
            different = sorted(
                name
                for name in own.keys() | state.keys()
                if name not in own or name not in state or own[name].shape != state[name].shape
            )
            raise DrafterError(
                "these drafter weights are of another model or of other settings:"
                f" {', '.join(different[:5])} differ"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


def metrics(numbers: Float[Tensor, "K n"]) -> dict[str, float]:
    """What Drafter.loss counts, as means: for each offset its loss, top-1 and top-5 accuracy, and
    `accepted`, the tokens that a step of greedy decoding would take if the rows were its own text:
    1 + sum over offsets of how often all guesses up to it were right. Where the target's
    distributions are known (Distilled), also each offset's `acceptance` Σ min(p, q), and
    `expected`, the tokens of a step of sampling: 1 + sum over offsets of the mean product of the
    acceptances up to it. Where a drafter predicts its acceptance, `confidence_error` is the mean
    |predicted - Σ min(p, q)|."""
    found: dict[str, float] = {}
    accepted = expected = 1.0
    for k, (loss, count, best, among, unbroken, *chances) in enumerate(numbers.tolist(), 1):
        if count:
            found |= {
                f"offset{k}/loss": loss / count,
                f"offset{k}/top1": best / count,
                f"offset{k}/top5": among / count,
            }
            accepted += unbroken / count
        if count and chances:
            found[f"offset{k}/acceptance"] = chances[0] / count
            expected += chances[1] / count
            if len(chances) > 2:
                found[f"offset{k}/confidence_error"] = chances[2] / count
    if not found:
        return found
    return found | {"accepted": accepted} | ({"expected": expected} if numbers.shape[1] > 5 else {})


def targets_of(
    offset: int, labels: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]
) -> tuple[Tensor, Int[Tensor, " n"]]:
    """(where, targets) of an offset: the positions t (B, T) whose token x_{t+1+offset} is trained
    and of the same row, and those tokens (n,)."""
    ahead = offset + 1
    where = torch.zeros_like(labels, dtype=torch.bool)
    if labels.shape[1] > ahead:
        same = positions[:, ahead:] == positions[:, :-ahead] + ahead
        where[:, :-ahead] = same & (labels[:, ahead:] != -100)
    shifted = torch.full_like(labels, -100)
    shifted[:, :-ahead] = labels[:, ahead:]
    return where, shifted[where]
