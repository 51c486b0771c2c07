"""FineTune: a frozen base with an adapter, a drafter or both, trained on its task's loss.

A step's loss is the mean over all its trained tokens, whichever micro-batch or rank they are in:

    L = Σ_ranks Σ_micro-batches Σ_t loss_t / N

    N = trained tokens of the step, known before it starts

With task.weight_column, a token of a row of weight w counts w times in both sums.

Lightning averages the micro-batches' losses, and DDP the ranks' gradients, so each sum is scaled by
their numbers / N.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from adapters.delta import Adapter
from adapters.shards import shard_like
from trainer.drafters import Drafter, Target
from trainer.models.flops import Work
from trainer.models.losses import CausalLoss, ClassLoss
from trainer.penalties.deft import DensityDEFT
from trainer.schedules import factor
from trainer.schedules.cooldown import RuntimeCooldown
from trainer.training import late
from trainer.training.fsdp import Sharded, average_unsharded_grads
from trainer.training.optimizer import clip_gradients, parameter_groups, part_norms
from trainer.training.out_of_memory import Repeating
from trainer.training.untrained import warn_of_untrained


class FineTune(lightning.LightningModule):
    """Trains what `adapter` added to `model`, with an optional `penalty` on its activations and an
    optional `drafter`.

    `schedule(step, steps=...)` gives the rate's factor for a 0-based step of the planned ones,
    until a `runtime_cooldown` takes over; `optimizer` makes the optimiser from parameter groups. A
    step whose loss or gradient is not finite changes nothing and is counted; `nonfinite_limit` of
    them in a row raise NonFinite. On a GPU the host reads this one step later, see
    trainer.training.late. With `repeat_smaller` a step that does not fit into memory is
    repeated in smaller micro-batches, see trainer.training.out_of_memory. Prompt tokens before the
    last `context_window` ones run without a gradient, see trainer.models.context."""

    # checkpoints hold the adapter only; on_load_checkpoint compares the names itself
    strict_loading = False
    counted: tuple[str, ...] = ("loss", "tokens", "right")  # sums of a batch that the loss returns

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[..., float],
        steps: int,
        labelled: bool,
        accumulate: int,
        seed: int,
        max_grad_norm: float | None,
        logits_chunk: int | None,
        gradient_checkpointing: bool | int,
        nonfinite_limit: int,
        repeat_smaller: bool,
        penalty: DensityDEFT | None = None,
        drafter: Drafter | None = None,
        runtime_cooldown: RuntimeCooldown | None = None,
        context_window: int | None = None,
    ):
        super().__init__()
        self.model, self.adapter, self.penalty, self.drafter = model, adapter, penalty, drafter
        self.make_optimizer, self.schedule = optimizer, schedule
        self.steps, self.runtime_cooldown = steps, runtime_cooldown
        self.drop_cooldown = False  # True: the run was extended, and restarts before its cooldown
        self.accumulate, self.seed, self.max_grad_norm, self.nonfinite_limit = (
            accumulate,
            seed,
            max_grad_norm,
            nonfinite_limit,
        )
        self.loss = ClassLoss(model) if labelled else self.make_loss(logits_chunk)
        if isinstance(self.loss, ClassLoss) and not self.loss.guesses:
            self.counted = ("loss", "tokens")
        if isinstance(self.loss, CausalLoss):
            self.loss.window = context_window
        if gradient_checkpointing:
            # True is every layer, N every N-th.
            model.activation_checkpointing_enable(
                {"use_reentrant": False}, every_n_layers=int(gradient_checkpointing)
            )  # type: ignore[operator]
        self.step = 0  # optimiser steps done, skipped ones included: the run's clock
        self.tokens = 0  # processed so far, over all ranks
        self.skipped = self.skipped_in_a_row = 0
        self.repeat_smaller = repeat_smaller
        self.work: Work | None = None  # the operations of a step, where a formula has them
        self.parts_differ: str | None = None  # why a micro-batch in parts is another one
        self.repeating: Repeating | None = None
        self.rows_at_once: int | None = None  # None: those of a whole micro-batch
        self.smaller: dict[str, Any] | None = None  # how this step had to become smaller
        self.gradients_checked = False  # whether parameters without a gradient were looked for
        self.step_done = False  # whether this micro-batch has ended a step
        self.late = False  # whether steps are read one step later, see trainer.training.late
        self.unread: late.Unread | None = None  # the last step, if it was not read
        self.grad_norm: Tensor | None = None
        self.part_norms: dict[str, Tensor] = {}  # of an adapter of several parts, before clipping
        self.density: float | None = None  # mean over layers in this step, if there is a penalty
        self.densities: dict[str, float] = {}  # the same, of each layer that saw a token
        self.news: dict[str, float] = {}  # numbers that the adapter reports after the step
        self.sums: dict[str, Any] = {}  # of this step

    def make_loss(self, chunk: int | None) -> CausalLoss:
        """Make the loss of a batch. It holds the logits of at most `chunk` positions at a time."""
        return CausalLoss(
            self.model,
            chunk,
            self.drafter,
            Target(self.model) if self.drafter is not None else None,
        )

    def train(self, mode: bool = True) -> FineTune:
        """Set the mode of all modules. A model in which nothing is trained stays in eval mode,
        without dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            self.model.eval()
        return self

    def configure_model(self) -> None:
        if isinstance(strategy := self.trainer.strategy, Sharded):
            strategy.shard(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.adapter, self.model, self.drafter)
        optimizer = self.adapter.optimizer(groups, self.make_optimizer)
        # A loaded optimiser state brings its old rates along; these are the config's.
        self.peaks = [group["lr"] * group["lr_scale"] for group in optimizer.param_groups]
        self.parts: dict[str, list[nn.Parameter]] = {}
        self.group_of: dict[str, int] = {}  # by part: the number of its first group
        for number, group in enumerate(optimizer.param_groups):
            if part := group.get("part"):
                self.group_of.setdefault(part, number)
                self.parts.setdefault(part, []).extend(group["params"])
        return optimizer

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        micro = batch_idx % self.accumulate
        if micro == 0:
            self.smaller = None
            self.sums = dict.fromkeys(self.counted, 0.0) | {"processed": 0, "sequences": []}
            if self.repeating is not None:
                self.repeating.window.clear()
            rate = factor(
                self.schedule, self.step, self.steps, self.adapter.restart, self.runtime_cooldown
            )
            for group, peak in zip(
                self.trainer.optimizers[0].param_groups, self.peaks, strict=True
            ):
                group["lr"] = peak * rate
        self.step_done = False
        if self.penalty is not None:
            self.penalty.strength = self.penalty.phase.share(self.step, self.steps)
        if self.drafter is not None:
            self.drafter.on_step(self.step, self.steps)
        reseed(self.seed, self.global_rank, self.step, micro)

    def restart_step(self) -> None:
        """Set the gradients and sums of the current step back to nothing."""
        self.sums = dict.fromkeys(self.counted, 0.0) | {"processed": 0, "sequences": []}
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def on_train_start(self) -> None:
        # Ranks would have to repeat a step together, and DDP would have summed some gradients.
        if self.repeat_smaller and self.trainer.world_size == 1:
            self.repeating = Repeating(self, self.parts_differ)
        self.late = late.possible(self)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss_of(batch) if self.repeating is None else self.repeating.forward(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass. A step that does not fit into memory is repeated in smaller
        parts."""
        if self.repeating is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.repeating.backward(loss)

    def loss_of(self, batch: dict[str, Any], share: float = 1.0) -> Tensor:
        """Return the loss of a micro-batch, or of a part with this share of its rows, and add to
        the step's sums."""
        if self.penalty is not None:
            self.penalty.open(real_tokens(batch))
        summed, sums = self.loss(batch)
        for key in (*self.counted, "offsets"):
            if key in sums:
                self.sums[key] = self.sums.get(key, 0.0) + sums[key]
        self.sums["processed"] += batch["tokens"]
        self.sums["sequences"] += batch["sequences"]
        loss = summed * (self.accumulate * self.trainer.world_size / (batch["window_tokens"] or 1))
        if self.penalty is not None:
            term, densities, tokens_seen = self.penalty.term()
            self.sums["density"] = self.sums.get("density", 0.0) + torch.stack(
                [densities * tokens_seen, tokens_seen]
            )
            if self.trainer.world_size > 1:
                # DDP takes the mean over ranks. Weighted like this each token counts the same,
                # whichever rank it is on.
                tokens = torch.stack([side.sum() for side in real_tokens(batch)]).sum()
                all_tokens = self.trainer.strategy.reduce(tokens.float(), reduce_op="sum")
                term = term * (tokens * self.trainer.world_size / all_tokens.clamp(min=1))
            loss = loss + term
        penalty = self.adapter.penalty(self.model)
        return loss if penalty is None else loss + penalty * share

    def on_after_backward(self) -> None:
        if not self.gradients_checked:
            self.gradients_checked = warn_of_untrained(self.model)
        if self.penalty is not None:
            self.penalty.close()

    def calibrate(self, batches: Iterable[dict[str, Any]]) -> None:
        """Measure the penalty's thresholds on the run's first micro-batches, before training."""
        if self.penalty is None:
            return
        was_training = self.model.training
        self.model.eval()
        self.penalty.calibrate(self.loss, ((batch, real_tokens(batch)) for batch in batches))
        self.model.train(was_training)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # first, so that all ranks judge the step by the same loss and skip the same steps
        if self.trainer.world_size > 1:
            self._sum_over_ranks()
        densities = self._step_densities()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.adapter.before_step(self.model, scaler.get_scale() if scaler is not None else 1.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(self.trainer.strategy, Sharded):
            average_unsharded_grads(parameters)
        self.part_norms = part_norms(self.parts) if len(self.parts) > 1 else {}
        self.grad_norm, clipped = clip_gradients(parameters, self.drafter, self.max_grad_norm)
        finite = torch.isfinite(self.grad_norm) & torch.isfinite(
            torch.as_tensor(self.sums["loss"], device=self.grad_norm.device)
        )
        if self.late:
            late.skip_if(self.trainer.optimizers, finite)
            return
        if finite:  # on a GPU this waits for the step
            self.skipped_in_a_row = 0
            self.adapter.after_clipping(self.model, clipped)
            if self.penalty is not None:
                self.penalty.update(densities)
            return
        # An optimiser changes neither weights nor moments of parameters without a gradient.
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.skipped_in_a_row += 1

    def _sum_over_ranks(self) -> None:
        """Sum the step's counts over all ranks."""
        reduce = self.trainer.strategy.reduce
        names = (*self.counted, "processed")
        counts = torch.tensor([float(self.sums[name]) for name in names], device=self.device)
        self.sums |= dict(zip(names, reduce(counts, reduce_op="sum").unbind(), strict=True))
        for name in ("offsets", "density"):
            if name in self.sums:
                self.sums[name] = reduce(self.sums[name], reduce_op="sum")

    def _step_densities(self) -> list[float]:
        """Return the density of each penalised layer in the step, NaN if it saw no token."""
        if self.penalty is None:
            return []
        sums, tokens = self.sums["density"].tolist()
        densities = [
            total / count if count else float("nan")
            for total, count in zip(sums, tokens, strict=True)
        ]
        finite = [density for density in densities if density == density]
        self.density = sum(finite) / len(finite) if finite else None
        self.densities = {
            name: density
            for (name, _), density in zip(self.penalty.layers, densities, strict=True)
            if density == density
        }
        return densities

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.step += 1
        self.step_done = True
        self.news = self.adapter.after_step(self.model, self.step) or {}
        self.tokens += int(self.sums["processed"])
        norm = 0.0 if self.grad_norm is None else self.grad_norm
        numbers = {"loss": self.sums["loss"], "grad_norm": norm}
        if not self.late:
            if self.skipped_in_a_row >= self.nonfinite_limit:
                late.end_run(self.skipped_in_a_row, self.step, self.sums["sequences"], numbers)
            return
        self.settle()
        self.unread = late.Unread(self.step, self.sums["sequences"], late.Copy(numbers))

    def settle(self) -> None:
        """Read the last step if it was not read: count it, and write its rows of the journal.

        Raises:
            NonFinite: it is the last of `nonfinite_limit` in a row.
        """
        unread, self.unread = self.unread, None
        if unread is None:
            return
        numbers = unread.numbers.read()
        if all(math.isfinite(float(number)) for number in numbers.values()):
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        ends = self.skipped_in_a_row >= self.nonfinite_limit
        if unread.write is not None:
            unread.write(ends)
        if ends:
            late.end_run(self.skipped_in_a_row, unread.step, unread.sequences, numbers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.settle()
        checkpoint["state_dict"] = {}  # Lightning's copy would hold the frozen base
        checkpoint["adapter"] = self.adapter.state(self.model)
        if self.penalty is not None:
            checkpoint["penalty"] = self.penalty.state()
        if self.drafter is not None:
            checkpoint["drafter"] = self.drafter.state()
        if self.runtime_cooldown is not None:
            checkpoint["cooling"] = asdict(self.runtime_cooldown)
        checkpoint["counters"] = {
            k: getattr(self, k)
            for k in ("step", "tokens", "skipped", "skipped_in_a_row", "rows_at_once")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["adapter"]
        if isinstance(self.trainer.strategy, Sharded):
            live = self.adapter.state(self.model)["tensors"]
            saved = saved | {
                "tensors": {
                    name: shard_like(live.get(name), tensor)
                    for name, tensor in saved["tensors"].items()
                }
            }
        self.adapter.load_state(self.model, saved)
        if self.penalty is not None:
            self.penalty.load_state(checkpoint["penalty"])
        if self.drafter is not None:
            self.drafter.load_state(checkpoint["drafter"])
        if self.runtime_cooldown is None and "cooling" in checkpoint and not self.drop_cooldown:
            self.runtime_cooldown = RuntimeCooldown(**checkpoint["cooling"])
        for key, value in checkpoint["counters"].items():
            setattr(self, key, value)
        # In a finished run that was extended, the recorded last micro-batch is no longer the last.
        # Lightning would end the epoch after it.
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        progress["is_last_batch"] = self.step >= self.steps
        if self.step < self.steps:
            # A step may have another number of micro-batches now (trainer.session.same_step).
            for part in ("total", "current"):
                progress[part] |= dict.fromkeys(progress[part], self.step * self.accumulate)


def real_tokens(batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return masks (B, T), True at the tokens of rows, False at padding: one of the sequences, or
    one of what the encoder reads and one of what the decoder writes."""
    sides = [("input_ids", "lengths"), ("decoder_input_ids", "decoder_lengths")]
    return tuple(
        torch.arange(batch[ids].shape[1], device=batch[ids].device)
        < batch[lengths].to(batch[ids].device).unsqueeze(1)
        for ids, lengths in sides
        if ids in batch
    )


def reseed(seed: int, rank: int, step: int, micro: int) -> None:
    """Seed all random generators for this micro-batch, so that a resumed run draws the same
    numbers."""
    mixed = int(np.random.SeedSequence([seed, rank, step, micro]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
