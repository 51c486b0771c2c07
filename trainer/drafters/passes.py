"""Passes of the target that a drafter runs itself, over a cache of its own, with positions that see
chosen others.

A pass of N positions after S cached ones takes a mask (B, N, S + N). transformers' models pass 4-D
masks on unchanged: True where attention is allowed, or added to the scores for eager.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate
from trainer.models.cache_argument import model_with_cache, rolls_back
from trainer.models.heads import captured_hidden
from trainer.speed.attention import BLOCKED

_KINDS = {"full_attention", "sliding_attention"}


def inner_model(model: Any) -> Any:
    """Return transformers' model within PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class Block:
    """Further positions after each of some anchors of a row. Those of A anchors follow each other,
    W of each, N = A W in all."""

    inputs: dict[str, Tensor]  # input_ids or inputs_embeds of all N
    ahead: Int[Tensor, " W"]  # how far each is behind its anchor's position
    sees: Bool[Tensor, "N N"]  # which see which, besides the text up to their anchor


def run(
    target: Target, cache: DynamicCache, ids: Int[Tensor, "B N"] | None = None, **inputs: Any
) -> Float[Tensor, "B N d"]:
    """Return the states that the output head reads, and add the positions to the cache."""
    if ids is not None:
        inputs["input_ids"] = ids
    with captured_hidden(target.model.get_output_embeddings()) as captured:
        target.model(use_cache=True, **model_with_cache(target.model, cache), **inputs)
    return captured[0]


def after_anchors(
    target: Target,
    output: TargetOutput,
    at: Int[Tensor, "B A"],
    block: Block,
    around: contextlib.AbstractContextManager[Any],
) -> Float[Tensor, "B N d"]:
    """Return the states of further positions after the anchors `at` of the target's rows, which see
    their own row up to the anchor. The rows' own positions run first, without a gradient; `around`
    is open while the further ones run."""
    places = torch.arange(output.ids.shape[1], device=at.device)
    start = places - output.positions  # of each position's row
    dtype, cache = output.hidden.dtype, DynamicCache()
    with torch.no_grad():
        sees = (start.unsqueeze(1) == start.unsqueeze(2)) & (places <= places.unsqueeze(1))
        mask = masks(target, sees, output.positions, output.positions, dtype)
        run(target, cache, output.ids, position_ids=output.positions, attention_mask=mask)
    own = (start.gather(1, at).unsqueeze(2) == start.unsqueeze(1)) & (places <= at.unsqueeze(2))
    own = own.repeat_interleave(len(block.ahead), 1)
    sees = torch.cat([own, block.sees.expand(len(at), -1, -1)], dim=2)
    # No position with a target is behind the longest row.
    positions = (output.positions.gather(1, at).unsqueeze(2) + block.ahead).flatten(1)
    positions = positions.clamp_max(int(output.on_host().positions.max()))
    keys = torch.cat([output.positions, positions], dim=1)
    mask = masks(target, sees, positions, keys, dtype)
    with around:
        return run(target, cache, position_ids=positions, attention_mask=mask, **block.inputs)


def masks(
    target: Target,
    sees: Bool[Tensor, "B N M"],
    queries: Int[Tensor, "B N"],
    keys: Int[Tensor, "B M"],
    dtype: torch.dtype,
) -> Any:
    """Return a model's attention_mask, given which positions see which and where all of them are: a
    tensor, or one for each kind of attention."""
    result: dict[str, Tensor] = {}
    for kind in kinds(target.config):
        within = sees
        if kind == "sliding_attention":
            distance = queries.unsqueeze(2) - keys.unsqueeze(1)
            within = sees & (distance < target.config.sliding_window)
        mask = within.unsqueeze(1)
        if target.config._attn_implementation == "eager":
            low = torch.finfo(dtype).min
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, low)
        result[kind] = mask
    return result if len(result) > 1 else next(iter(result.values()))


def kinds(config: Any) -> list[str]:
    """Return the layers' kinds of attention, as transformers' `layer_types` calls them, each
    once."""
    if several := getattr(config, "layer_types", None):
        return sorted(set(several))
    if getattr(config, "sliding_window", None):
        return ["sliding_attention"]
    chunked = getattr(config, "attention_chunk_size", None)
    return ["chunked_attention" if chunked else "full_attention"]


def room(config: Any, length: int) -> int | None:
    """Return how many positions may follow `length` ones before a table of positions ends, or
    before it changes with the length; None for no limit."""
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    limits = [table.get("original_max_position_embeddings") for table in tables]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((limit - length for limit in limits if limit and limit >= length), default=None)


def refuse(model: Any, name: str) -> None:
    """Refuse a model whose config shows that the passes of drafter=`name` cannot run on it. The
    model may have weights or only shapes.

    Raises:
        DrafterError: its attention takes no 4-D mask, its layers keep other state than keys and
        values, or it takes no position_ids.
    """
    refuse_mask_and_positions(model, name)
    config, kind = model.config.get_text_config(), type(model).__name__
    if other := set(kinds(config)) - _KINDS:
        raise DrafterError(
            f"drafter={name} runs the target's own layers over further positions, and {kind} has"
            f" layers of the kind {', '.join(sorted(other))}: train another drafter, such as eagle3"
        )
    if not rolls_back(model) or not DynamicCache(config=config).is_croppable:
        raise DrafterError(
            f"drafter={name} needs a state that can be rolled back, which {kind}'s layers do not"
            " have: set drafter=none"
        )


def refuse_mask_and_positions(model: Any, name: str) -> None:
    """Refuse a model that takes no 4-D mask or no position_ids.

    Raises:
        DrafterError: drafter=`name` cannot say which of its positions see which, or where they are.
    """
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ("sdpa", "eager", BLOCKED):
        raise DrafterError(
            f"drafter={name} needs a 4-D mask, which attn_implementation={attention} does not take:"
            " set base.attn_implementation=sdpa"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise DrafterError(
            f"drafter={name} sets the positions of its tokens, and {type(model).__name__} takes no"
            " position_ids: set drafter=none, or another drafter, such as eagle3"
        )


def refuse_virtual_tokens(model: Any, name: str) -> None:
    """Refuse an adapter that puts virtual tokens before the text.

    Raises:
        DrafterError: the model has one.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise DrafterError(
            f"drafter={name} runs the target over the text alone, and PEFT's {kind} puts virtual"
            " tokens before it: set another drafter, such as eagle3, or an adapter such as lora"
        )


def cropped(cache: DynamicCache, length: int) -> None:
    """Drop what follows the first `length` positions."""
    if length:
        cache.crop(length - cache.get_seq_length())


def text_of(update: TargetUpdate) -> Int[Tensor, " n"]:
    """Return the tokens of an update that a cache of the whole text has not read."""
    return update.ids if update.first is None else torch.cat([update.first.view(1), update.ids])
