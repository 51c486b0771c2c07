"""Models whose computation depends on how long a text has become, and their last position.

    dynamic NTK   beyond the trained length N, a pass rotates by a table made for its largest
                  position, and the table stays for the passes after it
    longrope      a pass whose largest position reaches N rotates by the long factors, others by the
                  short ones; Phi-3 then reads the whole text again

A pass over drafted tokens has larger positions than one over the newest token alone, so its numbers
would differ from those of plain decoding. Drafting therefore ends before N. With longrope it starts
again once the whole text has been read by the long factors; with dynamic NTK it does not.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trainer.drafters import DrafterError

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Boundary:
    """The text length N up to which a model's rotary table does not depend on the text, and the
    kind of table after it."""

    length: int
    kind: str  # dynamic or longrope

    def draft_limit(self, text: int, cached: int) -> int | None:
        """Return how many drafted tokens may follow one another after `text` tokens, of which the
        target has read `cached`; None for no limit."""
        if self.kind == "longrope" and cached > self.length:
            return None
        return max(0, self.length - text)

    def crossed(self, text: int, cached: int) -> bool:
        """Return whether the next pass is the first one by the long factors."""
        return self.kind == "longrope" and cached <= self.length < text


def boundary(config: Any) -> Boundary | None:
    """Return the boundary of a model, from its text config; None if no length changes its table."""
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [t for t in rope.values() if isinstance(t, dict)]
    boundaries = []
    for table in tables:
        kind = table.get("rope_type", "default")
        if "dynamic" in kind:
            boundaries.append(Boundary(config.max_position_embeddings, "dynamic"))
        elif kind == "longrope":
            length = table.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", config.max_position_embeddings
            )
            boundaries.append(Boundary(int(length), "longrope"))
    return min(boundaries, key=lambda boundary: boundary.length, default=None)


def warn(model: Any, limit: Boundary) -> None:
    """Log once for each model that drafting pauses at its boundary."""
    _warn(type(model).__name__, limit)


@functools.cache
def _warn(name: str, limit: Boundary) -> None:
    log.warning(
        "%s rotates by another table (%s) in texts of more than %d tokens. So that texts stay the"
        " same, nothing is drafted %s, and several sequences are decoded one at a time",
        name,
        limit.kind,
        limit.length,
        "across that length" if limit.kind == "longrope" else "beyond that length",
    )


def reset_tables(model: nn.Module) -> None:
    """Undo what longer texts have done to a dynamic table, so that a text does not depend on the
    texts before it."""
    module: Any
    for module in model.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for name in list(vars(module) | dict(module.named_buffers(recurse=False))):
            prefix, separator, _ = name.partition("original_inv_freq")
            if not separator or not hasattr(module, f"{prefix}inv_freq"):
                continue
            current, original = getattr(module, f"{prefix}inv_freq"), getattr(module, name)
            module.register_buffer(
                f"{prefix}inv_freq", original.to(current.device, copy=True), persistent=False
            )
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def reads_again(model: Any, ids: Int[Tensor, " n"], cache: Any) -> bool:
    """Return whether transformers' generate would drop the cache before the next pass, and read the
    whole text again."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = plain.prepare_inputs_for_generation(
        ids.unsqueeze(0),
        past_key_values=cache,
        attention_mask=torch.ones_like(ids).unsqueeze(0),
        use_cache=True,
        next_sequence_length=1,
        is_first_iteration=False,
    )
    return inputs.get("past_key_values") is None


def new_tokens(model: Any, prompt: int, limit: int) -> int:
    """Return how many tokens to write after a prompt of this length: `limit`, or what fits where
    the model has no position after its last one. A warning says if the text passes it.

    Raises:
        DrafterError: the model has no position for the first new token.
    """
    whole: Any = getattr(model, "config", None)
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else None
    if getattr(config, "is_encoder_decoder", False):
        prompt = 0  # the answer has positions of its own
    last = getattr(config, "max_position_embeddings", None)
    if last is None:
        return limit
    rope = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in str(rope.get("rope_type")):
        last = int(last * rope.get("factor", 1.0))
    if prompt + limit <= last:
        return limit
    name = type(model).__name__
    if not _learned_positions(model):
        _warn_last(name, last)
        return limit
    if prompt and prompt >= last:
        raise DrafterError(
            f"the prompt has {prompt} tokens, and {name} has {last} positions: shorten the prompt"
        )
    log.warning(
        "max_new_tokens=%d: after %d tokens %s has positions for %d more; the text ends there",
        limit,
        prompt,
        name,
        last - prompt,
    )
    return last - prompt


@functools.cache
def _warn_last(name: str, last: int) -> None:
    log.warning(
        "a text may become longer than the %d tokens that %s supports; what it writes after them is"
        " not what it was trained for",
        last,
        name,
    )


def _learned_positions(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    )
