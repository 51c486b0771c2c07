"""Heal: train an adapter on a smaller base, with the base that it was made from as a teacher.

A step's loss is FineTune's, of

    loss_t = (1 - w) CE(q_t, x_t) + w KL(p_t ‖ q_t)

    q_t  the model's distribution of the token at a trained position t, p_t the teacher's
    w    teacher_weight

Both have the same vocabulary. Logits are computed where tokens are trained, a chunk at a time,
those of the teacher too (trainer.drafters.distillation). Evaluation and the journal have CE alone,
so that they compare with other runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.drafters.distillation import Distillation, chunked_distillation
from trainer.models.base import Base, BaseError
from trainer.models.hub import from_hub
from trainer.models.losses import CausalLoss, chunked_cross_entropy, targets_at
from trainer.models.on_host import count, picked, supervised
from trainer.training.finetune import FineTune


def base_of(path: str) -> Base:
    """Return the teacher as a base, which holds no weights."""
    return from_hub(path, None, None, "auto", "auto", "none", True, False, ())


def parameters(path: str) -> int:
    """Return the number of a teacher's parameters."""
    return sum(p.numel() for p in base_of(path).skeleton().parameters())


def fault(base: Base, path: str, labelled: bool) -> str | None:
    """Return why a model cannot be the teacher of another one; None if it can."""
    where = f"objective.teacher={path}"
    if labelled:
        return (
            f"{where}: this task classifies, and a teacher is for next tokens: objective=finetune"
        )
    try:
        teacher = base_of(path)
        if base.config.is_encoder_decoder or teacher.config.is_encoder_decoder:
            return f"{where}: a teacher is for models that read and write one sequence"
        mine = base.config.get_text_config().vocab_size
        theirs = teacher.config.get_text_config().vocab_size
        if base.vocabulary != theirs:
            added = ", with base.add_tokens" if base.vocabulary != mine else ""
            return (
                f"{where} has {theirs} tokens, and {base.path} has {base.vocabulary}{added}: their"
                " distributions cannot be compared. Give the base that it was made from"
            )
        if teacher.tokenizer.get_vocab() != base.tokenizer.get_vocab():
            return (
                f"{where} has other tokens than {base.path}: their distributions cannot be"
                " compared. Give the base that it was made from"
            )
    except BaseError as error:
        return f"{where}: {error}"
    return None


class TeacherLoss(CausalLoss):
    """The loss of a batch with a teacher, which is in eval mode and gets no gradient."""

    def __init__(self, model: nn.Module, chunk: int | None, teacher: nn.Module, weight: float):
        super().__init__(model, chunk)
        self.taught = CausalLoss(teacher.eval().requires_grad_(False), chunk)
        self.weight = weight
        if self.head is None or self.taught.head is None:
            raise BaseError(
                "objective=heal: the logits of this model are not those of an output layer that is"
                " known, so they cannot be computed in chunks. Set objective=finetune"
            )

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (summed loss, {loss, tokens, right}), where `loss` is the cross-entropy alone."""
        if not torch.is_grad_enabled():
            return super().__call__(batch)
        assert self.taught.head is not None
        mine = self.windowed(batch)
        at = supervised(mine)
        targets, weights = targets_at(mine, at)
        hidden, head, parameters = self.readout(picked(self.forward(mine)[0], at))
        loss, right = chunked_cross_entropy(
            hidden, targets, head, self.chunk, parameters, weights, self.native
        )
        with torch.no_grad():
            self.taught.model.to(hidden.device)
            states = picked(self.taught.forward(batch)[0], supervised(batch))
        how = Distillation("kl", self.taught.head, (head,))
        scale = torch.ones_like(hidden[:, 0]) if weights is None else weights
        divergence, _ = chunked_distillation(
            hidden.unsqueeze(0), states, scale.unsqueeze(0), how, self.chunk, parameters
        )
        tokens = count(at) if weights is None else weights.sum()
        sums = {"loss": loss.detach(), "tokens": tokens, "right": right.detach()}
        return (1 - self.weight) * loss + self.weight * divergence, sums


class Heal(FineTune):
    """Trains what `adapter` added to `model`, with the model at `teacher`. Everything else is as in
    FineTune."""

    def __init__(self, *, teacher: str, teacher_weight: float, **settings: Any):
        self.teacher, self.teacher_weight = teacher, teacher_weight
        super().__init__(**settings)

    def make_loss(self, chunk: int | None) -> TeacherLoss:
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        teacher = base_of(self.teacher).load(embedding.weight.dtype)
        return TeacherLoss(self.model, chunk, teacher, self.teacher_weight)
