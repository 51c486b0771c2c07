"""The outputs of an export compared with those of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.assembly.trained import Trained
from trainer.models.heads import probe
from trainer.storage.checkpoints import CheckpointError

# Root mean square of the logits' difference over their spread. Summing in another order gives some
# 1e-5 in fp32.
TOLERANCE = 1e-3
# An adapter that moves the logits by less than that must still be in its export: the share of its
# own effect that may be missing, in addition to what rounding takes.
LOST = 0.02
ROUNDING = 5e-5


class Mismatch(CheckpointError):
    """The export answers differently from the run's own model."""


def outputs(model: nn.Module, run: Trained) -> list[torch.Tensor]:
    """Return the hidden states after each layer, then the logits, of `random_rows`."""
    ids = random_rows(model, run)
    output = model(
        **probe(model, ids),
        attention_mask=torch.ones_like(ids),
        output_hidden_states=True,
        **({} if run.task.kind == "label" else {"use_cache": False}),
    )
    states = [
        state.float()
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
        for state in getattr(output, name, None) or ()
    ]
    return [*states, output.logits.float()]


def random_rows(model: nn.Module, run: Trained) -> torch.Tensor:
    """Return four rows of random tokens."""
    draw = torch.Generator().manual_seed(0)
    config: Any = model.config  # with added tokens it has more than the base's own
    ids = torch.randint(
        3, config.get_text_config().vocab_size, (4, min(32, run.base.longest)), generator=draw
    )
    if run.task.kind == "label" and run.base.config.is_encoder_decoder:
        end = run.base.tokenizer.eos_token_id
        ids[ids == end] = end + 1  # they classify by the state at the only end token
        ids[:, -1] = end
    return ids.to(next(model.parameters()).device)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the root mean square of the difference, over the spread of `a`."""
    # Not the largest difference: at single positions rounding alone grows a thousandfold on its
    # way through the layers.
    return (
        float((a - b).square().mean().sqrt() / a.std().clamp_min(1e-6))
        if a.shape == b.shape
        else float("inf")
    )


def effect(expected: torch.Tensor, base: torch.Tensor) -> float:
    """Return how far the run's logits are from its base's, as `distance`. Virtual tokens come
    before the row's own."""
    return distance(expected[:, -base.shape[1] :], base)


def compare(
    expected: list[torch.Tensor], loaded: list[torch.Tensor], moved: float | None = None
) -> float:
    """Return the distance of the logits. `moved` is the adapter's own `effect` on them.

    Raises:
        Mismatch: it exceeds the tolerance, or the adapter's effect is not there; the message names
        the first layer that differs.
    """
    difference = distance(expected[-1], loaded[-1])
    allowed = TOLERANCE if moved is None else min(TOLERANCE, LOST * moved + ROUNDING)
    if difference <= allowed:
        return difference
    layers = [distance(a, b) for a, b in zip(expected[:-1], loaded[:-1], strict=True)]
    first = next((i for i, value in enumerate(layers) if value > allowed), None)
    if first is None:
        where = "only the logits do"
    else:
        layer = "the embedding" if first == 0 else f"decoder layer {first - 1}"
        where = f"the first to do so is {layer} (by {layers[first]:.3g})"
    limit = f"at most {allowed:.3g}"
    if moved is not None and allowed < TOLERANCE:
        limit += f", since the adapter itself moves them by {moved:.3g}"
    raise Mismatch(
        f"the export, loaded back, differs from the run's model by {difference:.3g} of the logits'"
        f" spread ({limit}); {where}"
    )
