"""The drafter that a command line names."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from trainer.assembly.trained import Trained
from trainer.drafters import Drafter, DrafterError
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.recycling import TokenRecycling
from trainer.drafters.small import small_model


def sampling(options: dict[str, Any], stops: list[int], pad: int, **more: Any) -> GenerationConfig:
    """transformers' settings for a verb's temperature, top_p and max_new_tokens."""
    sampled = options["temperature"] > 0
    # transformers would draw from the 50 likeliest tokens only.
    chances = (
        {"temperature": options["temperature"], "top_p": options["top_p"], "top_k": 0}
        if sampled
        else {}
    )
    return GenerationConfig(
        do_sample=sampled,
        max_new_tokens=options["max_new_tokens"],
        eos_token_id=stops,
        pad_token_id=pad,
        **chances,
        **more,
    )


def check_drafter(config: dict[str, Any], options: dict[str, Any]) -> None:
    """Before a run's model is loaded, whether it has the drafter that is asked for.

    Raises:
        DrafterError: it has none.
    """
    if options["drafter"] == "run" and not config.get("drafter"):
        raise DrafterError(
            f"run={options['run']} has no drafter. Train one with the adapter, python -m trainer"
            " ... drafter=mtp_shared, or give one that needs no training, drafter=lookup or"
            " drafter=recycling"
        )


def drafter_of(trained: Trained, options: dict[str, Any]) -> Drafter | None:
    """What a verb's options drafter and small ask for; None where the run has no drafter that
    proposes.

    Raises:
        BaseError, DrafterError: the small model cannot be loaded, or has other tokens.
    """
    model: Any = trained.model
    if options["drafter"] == "run":
        if trained.drafter is None or not trained.drafter.proposes:
            return None
        # In the target's dtype: autocast would convert fp32 weights again for every draft.
        return trained.drafter.to(model.get_input_embeddings().weight.dtype)
    if options["drafter"] == "lookup":
        return PromptLookup()
    if options["drafter"] == "recycling":
        return TokenRecycling(model.config.get_text_config().vocab_size)
    weight = next(trained.model.parameters())
    return small_model(options["small"], trained.base, weight.dtype, weight.device)
