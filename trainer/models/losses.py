"""The loss of a causal language model. Logits are computed only where a token is trained, and never
more of them than a chunk.

    L = - Σ_t log softmax(head(h_t))[x_{t+1}]      over the positions t whose next token is trained

h (n, d) are the hidden states of those positions, V is the vocabulary. All logits would be n V
numbers, three times over with their gradients. Here a chunk of c positions is computed, turned into
its gradient at h (c, d), and dropped. With a frozen head the backward pass then costs one product
with the stored gradient.

Compared with torch 2.13's F.linear_cross_entropy at SmolLM2's shapes on one CPU thread
(`python -m scripts.bench.losses`), this takes half of the processor time in bf16 and 1.1 times of
it in fp32. In bf16 torch's mean is off by up to 0.09, and this one by 1e-4. Four heads of 1024
positions have a peak of 0.12 to 0.26 GB, and of 1.2 GB with all logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.context import after_context
from trainer.models.heads import Head, captured_hidden, captured_layers, output_head
from trainer.models.on_host import count, flat, picked, supervised
from trainer.speed import fused, known_rows, predictions

LOGITS = 12 << 20  # logits in a chunk: 256 positions of a vocabulary of 49152
ON_GPU = 4 * LOGITS  # on a GPU larger chunks: the output weight is read once per chunk
TILE = 128  # rows of a GPU's tile of a matrix product


class NonFinite(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


def positions(vocabulary: int, device: str) -> int:
    """Return the default number of positions in a chunk. It falls with the vocabulary, so that the
    memory of the logits hardly grows. On a GPU it is a multiple of TILE, if it is that many: its
    products have whole tiles."""
    if device == "cpu":
        return max(16, LOGITS // max(1, vocabulary))
    count = ON_GPU // max(1, vocabulary)
    return count // TILE * TILE if count >= TILE else max(16, count)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, chunk by chunk, and for each row whether the best guess was right and
    whether one of the `top` best was.

    Forward    for each chunk of rows, logits = head(h_c), the loss and d loss_c / d logits in fp32;
               by autograd through the head d loss_c / d h_c, and for trained head parameters their
               gradient, summed over the chunks
    Backward   those times the incoming scalar
    Shapes     hidden (n, d), targets (n,), parameters as they are; returns a scalar in fp32 and two
               (n,) of bool
    Notes      the logits of a chunk are dropped before the next one; no second derivative
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk: int,
        slopes_of: Callable[..., tuple[Tensor, ...]],
        weights: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = hidden.new_zeros((), dtype=torch.float32)
        best = torch.zeros_like(targets, dtype=torch.bool)
        among = torch.zeros_like(best)
        grad_hidden = torch.empty_like(hidden)
        grads: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(True)
                logits = head(part)
            losses, best[rows], among[rows], slopes = slopes_of(
                logits.detach(), targets[rows], None if weights is None else weights[rows]
            )
            loss += losses.sum()
            inputs = [part, *parameters]
            # A parameter may not compute yet, as RoSA's values before there is a mask.
            grad_part, *chunk_grads = torch.autograd.grad(logits, inputs, slopes, allow_unused=True)
            grad_hidden[rows] = grad_part
            for i, grad in enumerate(chunk_grads):
                total = grads[i]
                if grad is not None:
                    grads[i] = (
                        grad.to(torch.float32, copy=True) if total is None else total.add_(grad)
                    )
            del logits, slopes, grad_part, chunk_grads
        ctx.save_for_backward(grad_hidden, *grads)
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.mark_non_differentiable(best, among)
        return loss, best, among

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (grad_hidden * grad_loss.to(grad_hidden.dtype), *[None] * 5, *scaled)


def chunked_cross_entropy(
    hidden: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    head: Head,
    chunk: int,
    parameters: tuple[Tensor, ...] = (),
    weights: Float[Tensor, " n"] | None = None,
    native: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return (summed loss, number of right guesses) of next-token predictions, each times its
    weight; see `chunked_predictions`."""
    loss, best, _ = chunked_predictions(
        hidden, targets, head, chunk, parameters, weights=weights, native=native
    )
    return loss, (best.sum() if weights is None else (best * weights).sum()).float()


def chunked_predictions(
    hidden: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    head: Head,
    chunk: int,
    parameters: tuple[Tensor, ...] = (),
    top: int = 1,
    weights: Float[Tensor, " n"] | None = None,
    native: bool = False,
) -> tuple[Float[Tensor, ""], Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return (summed loss, whether the best guess was right, whether one of the `top` best was).

    `parameters` are those of the head that are trained. With `weights`, each position's loss counts
    that many times. `native` takes elementwise.c for what it supports.
    The loss is summed in fp32, whatever the dtype of the hidden states. It is zero for n = 0.
    """
    if len(hidden) == 0:
        none = torch.zeros_like(targets, dtype=torch.bool)
        # A rank without targets gives all parameters a zero gradient: DDP waits for every one.
        return sum((p.sum().float() for p in parameters), hidden.sum().float()) * 0.0, none, none
    parameters = tuple(p for p in parameters if p.requires_grad)
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        slopes_of = partial(predictions.with_slopes, top=top, native=native)
        return _ChunkedCrossEntropy.apply(
            hidden, targets, head, chunk, slopes_of, weights, *parameters
        )
    loss = hidden.new_zeros((), dtype=torch.float32)
    right = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = head(hidden[rows])
        some = None if weights is None else weights[rows]
        summed, *both = predictions.without_slopes(logits, targets[rows], some, top, native)
        loss = loss + summed
        right.append(both)
        del logits  # before the next chunk's exist
    best, among = (torch.cat(parts) for parts in zip(*right, strict=True))
    return loss, best, among


class CausalLoss:
    """The loss of a batch of trainer.data.batches.Collate. With a drafter (trainer.drafters) the
    drafter's loss is added. With a `window`, prompt tokens before it have no gradient, see
    trainer.models.context."""

    window: int | None = None

    def __init__(
        self, model: nn.Module, chunk: int | None, drafter: Any = None, target: Any = None
    ):
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        self.chunk = chunk or positions(vocabulary, next(model.parameters()).device.type)
        self.model, self.drafter, self.target = model, drafter, target
        self.layer: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.head = output_head(model)
        self.native = fused.has_native_losses(model)

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (summed loss, {loss, tokens, right}); the sums are detached, and count each token
        as often as its row's weight. With a drafter there is also `offsets`, see Drafter.loss."""
        batch = self.windowed(batch)
        at = supervised(batch)
        targets, weights = targets_at(batch, at)
        if self.head is None:
            with known_rows.of(batch):
                logits = self.model(**_inputs(batch)).logits[:, -batch["labels"].shape[1] :]
            loss, right = chunked_cross_entropy(
                picked(logits, at),
                targets,
                _identity,
                self.chunk,
                weights=weights,
                native=self.native,
            )
        else:
            more = (
                self.drafter.inputs(batch, self.target)
                if self.drafter is not None and torch.is_grad_enabled()
                else None
            )
            hidden, features, extra = self.forward(batch, more)
            states, head, parameters = self.readout(picked(hidden, at))
            loss, right = chunked_cross_entropy(
                states, targets, head, self.chunk, parameters, weights, self.native
            )
        tokens = count(at) if weights is None else weights.sum()
        sums = {"loss": loss.detach(), "tokens": tokens, "right": right.detach()}
        if self.drafter is not None:
            term, sums["offsets"] = self.drafted(batch, hidden, features, extra)
            loss = self.drafter.main_weight * loss + term
        return loss, sums

    def readout(self, states: Float[Tensor, "n d"]) -> tuple[Tensor, Head, tuple[Tensor, ...]]:
        """Return (states, the function from them to logits, its trained parameters). Where an
        adapter of the output layer reads gradients, the states are the logits themselves: it reads
        those of a whole micro-batch, and in a chunk they would be parts of another scale."""
        assert self.head is not None
        if torch.is_grad_enabled() and getattr(self.layer, "reads_gradients", False):
            return self.head(states), _identity, ()
        return states, self.head, tuple(p for p in self.layer.parameters() if p.requires_grad)

    def windowed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch to train on whose tokens before the window, if there is one, have run."""
        if self.window is None or not torch.is_grad_enabled():
            return batch
        return after_context(
            batch, self.window, self.model, None if self.head is None else self.layer
        )

    def forward(
        self, batch: dict[str, Any], more: dict[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T f"] | None, Float[Tensor, "B m d"]]:
        """Run the model over a batch, or over `Drafter.inputs`, without computing logits.

        Returns the states that the output head reads, (B, T, d); those of the drafter's `layers`,
        concatenated, (B, T, f); and the states that the head reads at the positions that the
        drafter has put after the batch's own, (B, m, d).
        """
        length = batch["labels"].shape[1]
        layers = self.drafter.layers if self.drafter is not None else ()
        decoder = self.target.decoder if self.drafter is not None else self.model
        with (
            captured_hidden(self.layer) as read,
            captured_layers(decoder, layers) as between,
            known_rows.of(batch),
        ):
            self.model(**(_inputs(batch) if more is None else {**more, "use_cache": False}))
        # Virtual tokens of prompt learning come before the row's tokens, those of a drafter after.
        hidden, extra = (
            (read[0][:, :length], read[0][:, length:])
            if more is not None
            else (read[0][:, -length:], read[0][:, :0])
        )
        features = (
            torch.cat([states[:, -length:].detach() for states in between], dim=-1)
            if between
            else None
        )
        return hidden, features, extra

    def drafted(
        self,
        batch: dict[str, Any],
        hidden: Float[Tensor, "B T d"],
        features: Float[Tensor, "B T f"] | None,
        extra: Float[Tensor, "B m d"],
    ) -> tuple[Tensor, Tensor]:
        """Return the drafter's (loss, numbers), see Drafter.loss, from the results of `forward`."""
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand_as(
                batch["input_ids"]
            )
        output = self.drafter.output_type(
            hidden,
            batch["input_ids"],
            batch["labels"],
            positions,
            extra,
            features,
            batch.get("host"),
        )
        with known_rows.of(batch):
            return self.drafter.loss(output, self.target, self.chunk)


def targets_at(
    batch: dict[str, Any], at: Int[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Return the tokens after the positions of trainer.models.on_host.supervised, and their weights
    if the batch has some."""
    following = at + 1  # position t predicts token t + 1 of its own sequence
    weights = picked(batch["weights"], following) if "weights" in batch else None
    return picked(batch["labels"], following), weights


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    if "arguments" in batch:  # of trainer.models.context
        return {"input_ids": batch["input_ids"], **batch["arguments"]}
    # A causal model needs no mask: what it pads with comes after the row.
    pairs = ("attention_mask", "decoder_input_ids") if "decoder_input_ids" in batch else ()
    names = ("input_ids", "position_ids", *pairs)
    return {key: batch[key] for key in names if key in batch} | {"use_cache": False}


def _identity(logits: Tensor) -> Tensor:
    return logits


class ClassLoss:
    """The loss of a sequence classifier, as transformers computes it for the `problem_type` of its
    config; a row counts as one token.

    single_label_classification  cross-entropy
    regression                   (output - number)²
    multi_label_classification   binary cross-entropy, the mean over the classes
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.problem = getattr(model.config, "problem_type", None) or "single_label_classification"
        self.guesses = self.problem == "single_label_classification"  # one class of each row
        self.reads_types = _reads_types(model)

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (summed loss, {loss, tokens, right, scores}); the sums are detached, and count
        each row as often as its weight. Scores are (B, classes). `right` only where each row has
        one class."""
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if self.reads_types else [])]
        logits = self.model(**{key: batch[key] for key in names if key in batch}).logits.float()
        classes = batch["classes"]
        weights = batch["weights"][:, 0] if "weights" in batch else None
        if not self.guesses:
            return self._of_values(logits, classes, weights, batch.get("supervised"))
        loss = _weighted_sum(F.cross_entropy, logits, classes, weights)
        real, right = classes != -100, logits.argmax(-1) == classes
        sums = {
            "loss": loss.detach(),
            "tokens": (real if weights is None else real * weights).sum(),
            "right": (right if weights is None else right * weights).sum().float(),
            "scores": logits.detach(),
        }
        return loss, sums

    def _of_values(
        self, logits: Tensor, values: Tensor, weights: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if real is None:
            real = flat(~values.isnan().any(-1))
        each = F.mse_loss if self.problem == "regression" else F.binary_cross_entropy_with_logits
        weights = None if weights is None else weights.index_select(0, real)
        rows = logits.index_select(0, real), values.index_select(0, real)
        loss = _weighted_sum(each, *rows, weights) / values.shape[-1]
        tokens = count(real) if weights is None else weights.sum()
        return loss, {"loss": loss.detach(), "tokens": tokens, "scores": logits.detach()}


def _weighted_sum(
    loss: Callable[..., Tensor], logits: Tensor, targets: Tensor, weights: Tensor | None
) -> Tensor:
    """Return the sum of a loss over rows and outputs, each row's times its weight."""
    if weights is None:
        return loss(logits, targets, reduction="sum")
    each = loss(logits, targets, reduction="none")
    return (each.reshape(len(weights), -1).sum(-1) * weights).sum()


def _reads_types(model: Any) -> bool:
    """Return whether a classifier tells the two texts of a pair apart by token_type_ids. RoBERTa
    takes them and knows one type; some tokenizers make them for models that take none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = "token_type_ids" in inspect.signature(inner.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 2) > 1
