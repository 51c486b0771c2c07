"""A check that a model sees no later token: an encoder that is loaded as a causal language model
would learn to copy the next token from its input."""

from __future__ import annotations

import torch
from torch import nn

from trainer.models.base import Base, BaseError

LENGTH = 12  # tokens of the probe
SHARED = 8  # of them the same in both texts


@torch.no_grad()
def check_causality(model: nn.Module, base: Base) -> None:
    """Compare the logits of two texts that begin alike: up to the first different token they must
    be the same. Both are of one length and in one batch, so that rounding is the same too, but for
    routing that depends on the whole batch. So there is a tolerance.

    Raises:
        BaseError: the model sees later tokens.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = base.config.get_text_config().vocab_size
    one = torch.arange(3, 3 + LENGTH, device=device) % vocabulary
    other = torch.cat([one[:SHARED], (one[SHARED:] + LENGTH) % vocabulary])
    logits = model(input_ids=torch.stack([one, other]), use_cache=False).logits.float()
    model.train(was_training)
    shared = logits[:, :SHARED]
    scale = max(float(shared.std()), 1e-6)
    difference = float((shared[0] - shared[1]).abs().max())
    half = next(model.parameters()).dtype != torch.float32
    if difference > (0.2 if half else 1e-3) * scale:
        kind = getattr(base.config, "model_type", type(model).__name__)
        raise BaseError(
            f"{base.path} ({kind}) sees later tokens (logits of a text's first tokens change by"
            f" {difference:.3g} of {scale:.3g} with its last ones), so it would learn to copy the"
            " next token. Train an encoder with task=classification, or take a causal base; if"
            " this one is a decoder, its config.json lacks is_decoder=true"
        )
