"""The outputs of an export against those of the run."""

from __future__ import annotations

import torch
from torch import nn

from trainer.assembly.trained import Trained
from trainer.storage.checkpoints import CheckpointError

TOLERANCE = (
    # root mean square of the logits' difference over their spread; summing in another order makes
    # some 1e-5 in fp32
    1e-3
)


class Mismatch(CheckpointError):
    """What was exported answers differently from the run's own model."""


def _outputs(model: nn.Module, found: Trained) -> list[torch.Tensor]:
    """Hidden states after each layer, then the logits, of `_rows`."""
    ids = _rows(model, found)
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        output_hidden_states=True,
        use_cache=False,
    )
    return [*(state.float() for state in output.hidden_states), output.logits.float()]


def _rows(model: nn.Module, found: Trained) -> torch.Tensor:
    """Four rows of random tokens."""
    draw = torch.Generator().manual_seed(0)
    text = found.base.config.get_text_config()
    ids = torch.randint(3, text.vocab_size, (4, min(32, found.base.longest)), generator=draw)
    return ids.to(next(model.parameters()).device)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    # Its root mean square: at single positions rounding alone grows a thousandfold on its way
    # through the layers.
    return (
        float((a - b).square().mean().sqrt() / a.std().clamp_min(1e-6))
        if a.shape == b.shape
        else float("inf")
    )


def _compare(wanted: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    difference = _distance(wanted[-1], got[-1])
    if difference <= TOLERANCE:
        return difference
    layers = [_distance(a, b) for a, b in zip(wanted[:-1], got[:-1], strict=True)]
    first = next((i for i, value in enumerate(layers) if value > TOLERANCE), None)
    where = (
        "only the logits do"
        if first is None
        else (
            "the first to do so is"
            f" {'the embedding' if first == 0 else f'decoder layer {first - 1}'} (by"
            f" {layers[first]:.3g})"
        )
    )
    raise Mismatch(
        f"the export, loaded back, differs from the run's model by {difference:.3g} of the logits'"
        f" spread (at most {TOLERANCE:g}); {where}"
    )
