"""Long prompts without their activations: what comes before a window runs without a gradient.

    row       x_1 … x_s | x_{s+1} … x_f | x_{f+1} … x_T       x_{f+1} is the first trained token
    context   x_1 … x_s runs first and keeps its keys and values (k, v) of each layer, nothing else
    rest      x_{s+1} … x_T attends to those and to itself, with a gradient; s = max(0, f - window)

The loss is exact. Its gradient is that of the same loss with the context's k and v as constants:
the path through them into the adapter is left out. With s = 0 nothing is left out. Memory for the
backward pass is that of T - s tokens, and k and v of all.

The contexts of a batch are padded on the left, so that the rest follows directly: positions, masks
and sliding windows are then those of a row that runs alone. The idea is LeMo's (arXiv 2501.09767),
which leaves out other tokens and learns which.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trainer.models.base import Base, BaseError
from trainer.models.cache_argument import cache_argument, cache_of, model_with_cache
from trainer.models.heads import captured_hidden
from trainer.models.on_host import host_of, sent, supervised_positions

LENGTH, FIRST = 12, (1, 5, 9)  # the probe's tokens, and the first trained one of each of its rows


def starts(labels: Int[Tensor, "B T"], window: int) -> tuple[Tensor, Tensor]:
    """Return (first token that has a gradient, end of the last trained token) of each row, both
    (B,). A row without a trained token has (0, 1)."""
    trained = labels[:, 1:] != -100
    some, positions = trained.any(1), torch.arange(trained.shape[1], device=labels.device)
    first = trained.int().argmax(1)  # the position that predicts the first trained token
    last = (trained * positions).amax(1)
    start = (first + 1 - window).clamp(min=0)
    return torch.where(some, start, 0), torch.where(some, last + 2, 1)


def split(batch: dict[str, Any], window: int) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Return (context, rest) of a batch of trainer.data.batches.Collate that is not packed; None
    if no row has a context.

    context  input_ids and position_ids (B, S), padded on the left
    rest     input_ids, position_ids, labels and, if the batch has them, weights (B, R);
             trainer.models.on_host.supervised (n,)
    both     attention_mask (B, S) or (B, S + R), only if the contexts differ in length
    """
    ids, labels = batch["input_ids"], host_of(batch).labels
    start, end = (side.unsqueeze(1) for side in starts(labels, window))
    S, R = int(start.max()), int((end - start).max())
    if S == 0:
        return None
    before = start - S + torch.arange(S)
    after = start + torch.arange(R)
    inside = after.clamp(max=ids.shape[1] - 1)  # padding keeps within the position embeddings
    context = {"position_ids": before.clamp(min=0)}
    rest = {"position_ids": inside}
    rest["labels"] = labels.gather(1, inside).masked_fill(after >= end, -100)
    rest["supervised"] = supervised_positions(rest["labels"])
    if bool((start != S).any()):
        seen = (before >= 0).long()
        context["attention_mask"] = seen
        rest["attention_mask"] = torch.cat([seen, torch.ones_like(inside)], 1)
    for part in (context, rest):
        part.update({name: sent(tensor, ids.device) for name, tensor in part.items()})
        part["input_ids"] = ids.gather(1, part["position_ids"])
    if "weights" in batch:
        rest["weights"] = batch["weights"].gather(1, rest["position_ids"])
    return context, rest


def after_context(
    batch: dict[str, Any], window: int, model: Any, output: nn.Module | None
) -> dict[str, Any]:
    """Run the contexts of a batch, and return what is left of it: `rest` of `split`, with
    `arguments` for the model that hand it the context. `output` is the output layer, which then
    computes no logits. A batch without a context is returned as it is.

    Raises:
        BaseError: the model returns no cache.
    """
    parts = split(batch, window)
    if parts is None:
        return batch
    context, rest = parts
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        for part in parts:  # the model counts positions itself, by its mask
            del part["position_ids"]
    with torch.no_grad():
        if output is None:
            values = model(**context, use_cache=True)
        else:
            with captured_hidden(output):
                values = model(**context, use_cache=True)
    # Autocast of older torch would keep the copies of trained weights that it has made without a
    # gradient; 2.13 does not.
    torch.clear_autocast_cache()
    cache = cache_of(values)
    if cache is None:
        raise BaseError(
            f"{type(inner).__name__} returns no cache: set objective.context_window=null"
        )
    names = [name for name in ("attention_mask", "position_ids") if name in rest]
    arguments = {name: rest[name] for name in names} | model_with_cache(model, cache)
    return {**rest, "arguments": arguments | {"use_cache": True}}


def check_context(model: Any, base: Base) -> None:
    """Check on a few tokens that a model with its contexts run before gives the logits of whole
    rows, and lets a gradient through.

    Raises:
        BaseError: it does not. Layers that carry a state, or caches that are changed in place, are
            reasons.
    """
    was_training = model.training
    model.eval()
    try:
        fault = _fault(model)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, BaseError) as error:
        fault = str(error).strip().partition("\n")[0] or type(error).__name__
    model.train(was_training)
    if fault is not None:
        kind = getattr(base.config, "model_type", type(model).__name__)
        raise BaseError(
            f"objective.context_window: {base.path} ({kind}) cannot continue after a context:"
            f" {fault}. Set objective.context_window=null, and, if memory is short,"
            " objective.gradient_checkpointing=true"
        )


def _fault(model: Any) -> str | None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if cache_argument(inner.forward) is None:
        return "it takes no cache"
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(3, 3 + len(FIRST) * LENGTH, device=device) % vocabulary).view(-1, LENGTH)
    labels = ids.clone()
    for row, first in enumerate(FIRST):
        labels[row, :first] = -100
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.float()
    rest = after_context({"input_ids": ids, "labels": labels}, 1, model, None)
    logits = model(input_ids=rest["input_ids"], **rest["arguments"]).logits.float()
    scale = max(float(whole.abs().max()), 1e-6)
    difference = max(
        float((logits[row, : LENGTH + 1 - first].detach() - whole[row, first - 1 :]).abs().max())
        for row, first in enumerate(FIRST)
    )
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not difference <= (0.05 if half else 1e-3) * scale:
        return f"its logits differ by {difference:.3g} of {scale:.3g} from those of whole rows"
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return None
