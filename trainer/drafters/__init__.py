"""Drafters: models of tokens beyond the next one, trained with an adapter or alone. In decoding
they propose tokens that the target verifies.

    offset k = 1 .. K: at position t the k-th prediction is of x_{t+1+k}. x_{t+1} is predicted by
    the target itself.

A target is the base with its adapter. A drafter shares the target's embedding and output head,
which it never trains. It reads the hidden states h (B, T, d) that the output head reads, and
returns for each offset the hidden states that the head turns into logits.

In decoding a drafter proposes a tree of tokens (Draft) that a decoder verifies in one pass of the
target. Most drafters only give distributions node by node (Growth), and a shape of
trainer.decoding.trees builds the tree. A drafter that proposes a whole block at once overrides
`propose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.models.heads import Head, decoder_of, output_head
from trainer.models.losses import chunked_predictions
from trainer.models.on_host import Host, count, flat, offset_mask, picked, placed, sent
from trainer.speed import fused


class DrafterError(ValueError):
    """The drafter does not fit the target or the rows. The message gives the setting and what is
    available."""


class Target:
    """The model that a drafter drafts for, and the parts that they share. With `drafted`=False it
    is decoded without a drafter.

    Raises:
        DrafterError: it is `drafted`, and it is not known how the model computes logits from its
            hidden states.
    """

    gives_logits = False  # whether plain decoding reads the model's own logits, not its states

    def __init__(self, model: Any, drafted: bool = True):
        self.model = model
        self.decoder = decoder_of(model)
        self.config = model.config.get_text_config()
        self.embed: Callable[[Tensor], Tensor] = model.get_input_embeddings()
        head = output_head(model)
        self.gives_logits = head is None
        if head is None and drafted:
            raise DrafterError(self.no_head())
        self.head: Head = head or _as_it_is
        self.native = fused.has_native_losses(model)  # whether C computes losses

    def no_head(self) -> str:
        """Return why no drafter can draft for a model whose head is not known."""
        return (
            f"{type(self.model).__name__}'s logits are not its output layer's with a known scale or"
            " cap, so no drafter can share its head: set drafter=none"
        )

    @property
    def depth(self) -> int:
        """L, the number of the target's decoder layers."""
        return len(self.decoder.layers)


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class TargetOutput:
    """The target's output for a batch. Padding is on the right; rows of a packed sequence follow
    each other."""

    hidden: Float[Tensor, "B T d"]  # the output head's input
    ids: Int[Tensor, "B T"]
    # the id of trained tokens, -100 elsewhere and at each row's first token
    labels: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]  # from 0 in each row
    # hidden states of what `Drafter.inputs` put after the sequence; R is 0 if it put nothing
    extra: Float[Tensor, "B R d"]
    # the states of `Drafter.layers`, concatenated; None if there are none
    features: Float[Tensor, "B T f"] | None = None
    host: Host | None = None  # labels and positions where they can be read without waiting

    def on_host(self) -> Host:
        """Return `host`, or make it."""
        return self.host or Host(self.labels.cpu(), self.positions.cpu())


@dataclass(frozen=True)
class TargetUpdate:
    """The target's states since the last proposal for one sequence: those of the n positions
    p .. p+n-1 that were accepted since then. Over all proposals positions start at 0."""

    hidden: Float[Tensor, "n d"]  # the output head's input
    # the states of `Drafter.layers`, concatenated; f is 0 if there are none
    features: Float[Tensor, "n f"]
    # x_{p+1} .. x_{p+n}, the token after each position; the last token has no state yet
    ids: Int[Tensor, " n"]
    first: Int[Tensor, ""] | None = None  # x_0, at the first proposal
    # all tokens of the last pass, including refused ones, and the logits after each
    tried: tuple[Int[Tensor, " m"], Float[Tensor, "m V"]] | None = None
    # the states of `Drafter.appended` after the last of these positions; None if it did not run
    extra: Float[Tensor, "E K d"] | None = None


@dataclass(frozen=True)
class Draft:
    """A tree of proposed tokens. Nodes come after their parents, and siblings in the order in which
    they were drawn.

    `rows` gives for each node the row of `probabilities` that it was drawn from. Siblings share one
    row: the distribution before the first of them was drawn. `parents` and `rows` are best on the
    CPU, where the decoder reads them.
    """

    tokens: Int[Tensor, " n"]
    parents: Int[Tensor, " n"]  # -1: the newest token
    probabilities: Float[Tensor, "r V"] | None = None  # None: chosen without chance
    rows: Int[Tensor, " n"] | None = None
    with_replacement: bool = False  # how siblings were drawn


def chain(tokens: Int[Tensor, " n"], probabilities: Float[Tensor, "n V"] | None = None) -> Draft:
    """Return the tree in which each token follows the one before."""
    nodes = torch.arange(len(tokens))
    return Draft(tokens, nodes - 1, probabilities, None if probabilities is None else nodes)


class Growth(Protocol):
    """A drafter's distributions over one tree, while a shape grows it."""

    depth: int  # how many tokens may follow one another
    branches: bool  # whether a node may have more than one child
    # the target's ids of the logits' entries; None if these are the ids
    vocabulary: Int[Tensor, " v"] | None
    # the predicted acceptance of the nodes of the last `extend`, if the drafter predicts it
    confidence: Float[Tensor, " m"] | None

    def first(self) -> Float[Tensor, " v"]:
        """Return the logits of the token after the newest one."""

    def extend(self, tokens: Int[Tensor, " m"], parents: Int[Tensor, " m"]) -> Float[Tensor, "m v"]:
        """Add m nodes of one depth, given by target ids and the numbers of their parents. Nodes
        count from 0 in the order in which they were added; -1 is the newest token. Return the
        logits of the token after each."""


TreeBuilder = Callable[[Growth], Draft]


class BatchGrowth(Protocol):
    """A drafter's distributions over the trees of B sequences, which grow together. Otherwise as
    Growth: nodes of each sequence count from 0."""

    depth: int
    branches: bool
    vocabulary: Int[Tensor, " v"] | None

    @property
    def confidence(self) -> Float[Tensor, "B m"] | None:
        """The predicted acceptance of the newest nodes; None without a prediction."""

    def first(self) -> Float[Tensor, "B v"]:
        """Return the logits of the token after each newest one."""

    def extend(
        self, tokens: Int[Tensor, "B m"], parents: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m v"]:
        """Add m nodes of one depth to each sequence, and return the logits after each."""


class BatchMemory(Protocol):
    """A drafter's memory of several sequences."""

    def select(self, rows: Sequence[int]) -> None:
        """Drop all sequences but these."""


class Drafter(nn.Module):
    """A method of drafting, built for one target model before the adapter is attached to it."""

    offsets: int  # K
    weights: list[float]  # of the offsets' losses
    main_weight = 1.0  # of the target's own next-token loss
    # False for a method that only shapes the adapter: it is not saved
    proposes = True
    detach = True  # whether gradients stop at the target's hidden states
    # True for a head that the base brings: its own weights are kept unless training improves them
    guarded = False
    elsewhere = False  # whether engines decode with it for targets that this project cannot
    # further states of the target that the drafter reads, as transformers counts hidden_states:
    # 0 .. L
    layers: tuple[int, ...] = ()

    output_type = TargetOutput  # CausalLoss builds it and passes it to `loss`

    @property
    def depth(self) -> int:
        """Return how many tokens may follow one another in a draft: K, unless the method can
        continue."""
        return self.offsets

    def calibrate(self, counts: Callable[[], Int[Tensor, " V"]]) -> None:
        """Prepare for the rows. Called once, before the first step of a new run and not of a
        resumed one. `counts` returns how often each token is trained in the run's rows. Results
        belong in `state`.

        Raises:
            DrafterError: the rows do not suit the settings.
        """

    def restore(self) -> None:
        """Load the weights that the base brings; for a `guarded` drafter."""
        raise NotImplementedError

    def inputs(self, batch: dict[str, Any], target: Target) -> dict[str, Tensor] | None:
        """Return the target's inputs for training, or None for the batch's own `input_ids` and
        `position_ids`. The batch's T positions come first, then what this method adds, which they
        must not see. Called in training only."""
        return None

    def states(self, output: TargetOutput, target: Target) -> Iterator[Float[Tensor, "B T d"]]:
        """Yield for each offset the output head's input at each position. Position t of offset k
        may use x up to x_{t+k} of its own row. Positions without such tokens may hold any finite
        value."""
        raise NotImplementedError

    def head_of(self, offset: int, target: Target) -> tuple[Head, tuple[nn.Parameter, ...]]:
        """Return (the head that turns an offset's states into logits (n, V), its trained
        parameters). By default the target's own output head."""
        # With adapter=full the shared head is trained too.
        layer = target.model.get_output_embeddings()
        return target.head, (
            () if self.detach else tuple(p for p in layer.parameters() if p.requires_grad)
        )

    def on_step(self, step: int, steps: int) -> None:
        """Prepare for a micro-batch of the 0-based `step` of the planned `steps`."""

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        """Return (weighted loss, numbers). The loss is the sum over offsets of weight times summed
        cross-entropy. Numbers are (K, 5) in fp32, for each offset: the summed loss, the number of
        targets, how often the best guess was right, how often one of the five best was, and how
        often the best guesses of this and all earlier offsets were. Never more than `chunk`
        positions' logits of one offset exist."""
        output = replace(output, hidden=output.hidden.detach()) if self.detach else output
        total = output.hidden.new_zeros((), dtype=torch.float32)
        numbers, unbroken = [], torch.ones_like(output.ids, dtype=torch.bool)
        for k, hidden in enumerate(self.states(output, target), 1):
            at, targets = offset_targets(k, output)
            head, trained = self.head_of(k, target)
            summed, best, among = chunked_predictions(
                picked(hidden, at), targets, head, chunk, trained, top=5, native=target.native
            )
            total = total + self.weights[k - 1] * summed
            unbroken = unbroken & placed(best, at, unbroken.shape)
            numbers.append(
                torch.stack(
                    [summed.detach(), count(at), best.sum(), among.sum(), unbroken.sum()]
                ).float()
            )
        return total, torch.stack(numbers)

    def appended(self, target: Target) -> Float[Tensor, "E K d"] | None:
        """Return embeddings for the verifying pass to put after the newest token and after each
        node, if the target allows it: E chains of K, which see the text up to there and themselves.
        Their states come back as `TargetUpdate.extra`."""
        return None

    def start(self, target: Target) -> Any:
        """Return an empty memory of one sequence, for `propose`."""
        raise NotImplementedError

    def grow(self, memory: Any, target: Target, update: TargetUpdate) -> Growth:
        """Read the target's update, and start a tree after the newest token. `memory` keeps only
        what was computed from the target's states, and nothing of a tree."""
        raise NotImplementedError

    def propose(
        self, memory: Any, target: Target, update: TargetUpdate, build: TreeBuilder
    ) -> Draft:
        """Return the tokens to verify next; there may be none. Every call must read its
        `update`."""
        return build(self.grow(memory, target, update))

    def start_batch(self, target: Target, count: int) -> BatchMemory | None:
        """Return an empty memory of `count` sequences, for `grow_batch`; None if this drafter can
        only draft for one sequence after another."""
        return None

    def grow_batch(
        self, memory: Any, target: Target, updates: Sequence[TargetUpdate]
    ) -> BatchGrowth:
        """Read each sequence's update in one pass, and start a tree after each newest token.
        Otherwise as `grow`."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters, with an `lr_scale` for the optimiser's rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def state(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy a `state` into the parameters.

        Raises:
            DrafterError: names or shapes differ; nothing is loaded then.
        """
        current = self.state()
        different = sorted(
            name
            for name in current.keys() | state.keys()
            if name not in current or name not in state or current[name].shape != state[name].shape
        )
        if different:
            raise DrafterError(
                "these drafter weights are of another model or of other settings:"
                f" {', '.join(different[:5])} differ"
            )
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(state[name])


def metrics(numbers: Float[Tensor, "K n"]) -> dict[str, float]:
    """Return the counts of Drafter.loss as means.

    For each offset: loss, top-1 and top-5 accuracy. `accepted` is the number of tokens that a step
    of greedy decoding would accept if the rows were the target's own text: 1 + the sum over offsets
    of how often all guesses up to it were right. If the target's distributions are known
    (Distilled), also each offset's `acceptance` Σ min(p, q), and `expected`, the tokens of a step
    of sampling: 1 + the sum over offsets of the mean product of the acceptances up to it. If a
    drafter predicts its acceptance, `confidence_error` is the mean |predicted - Σ min(p, q)|.
    """
    result: dict[str, float] = {}
    accepted = expected = 1.0
    for k, (loss, targets, best, among, unbroken, *chances) in enumerate(numbers.tolist(), 1):
        if targets:
            result |= {
                f"offset{k}/loss": loss / targets,
                f"offset{k}/top1": best / targets,
                f"offset{k}/top5": among / targets,
            }
            accepted += unbroken / targets
        if targets and chances:
            result[f"offset{k}/acceptance"] = chances[0] / targets
            expected += chances[1] / targets
            if len(chances) > 2:
                result[f"offset{k}/confidence_error"] = chances[2] / targets
    if not result:
        return result
    return (
        result | {"accepted": accepted} | ({"expected": expected} if numbers.shape[1] > 5 else {})
    )


def offset_targets(offset: int, output: TargetOutput) -> tuple[Int[Tensor, " n"], Tensor]:
    """Return (positions, targets) of an offset: the flat indices b T + t of the positions t whose
    token x_{t+1+offset} is trained and in the same row, and those tokens, both (n,)."""
    host = output.on_host()
    at = sent(flat(offset_mask(offset, host.labels, host.positions)), output.labels.device)
    return at, picked(output.labels, at + offset + 1)
