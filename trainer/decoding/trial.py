"""A short text decoded with a drafter before it is trained.

Some targets compute from a cache what a drafter does not expect, such as keys of all earlier
tokens again, or keep a state that no cache holds. That shows when text is decoded, and training
would be wasted.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.decoding import speculative
from trainer.decoding.target_cache import CANNOT_ROLL_BACK
from trainer.drafters import Drafter, DrafterError, Target

PROMPT = 8  # tokens
TOKENS = 6  # decoded after them: several passes, in which most drafts are refused
NO_TOKEN = 1 << 30  # an end token that no text has


def check_decoding(model: Any, drafter: Drafter) -> None:
    """Decode a few tokens greedily with an untrained drafter, whose drafts are mostly refused, and
    without it. No random number is drawn. In bf16 rounding may change a text, so there the texts
    are not compared. A target whose state cannot be rolled back is not tried: engines decode it.

    Raises:
        DrafterError: it cannot decode, or the texts differ.
    """
    device = next(model.parameters()).device
    modes = model.training, drafter.training
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(3, 3 + PROMPT, device=device) % size
    try:
        model.eval()
        drafter.eval()
        target = Target(model)
        drafted = speculative.generate(target, drafter, ids, TOKENS, [NO_TOKEN]).tokens
        plain = speculative.generate(target, None, ids, TOKENS, [NO_TOKEN]).tokens
    except DrafterError as error:
        if CANNOT_ROLL_BACK in str(error):
            return
        raise
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise DrafterError(
            f"a drafter {type(drafter).__name__} cannot decode with {type(model).__name__}"
            f" ({type(error).__name__}: {reason}): set another drafter=, or drafter=none"
        ) from error
    finally:
        model.train(modes[0])
        drafter.train(modes[1])
    if drafted != plain and next(model.parameters()).dtype == torch.float32:
        raise DrafterError(
            f"{type(model).__name__} writes another text with a drafter than without one"
            f" ({drafted} for {plain}), so no draft of it can be trusted: set drafter=none"
        )
