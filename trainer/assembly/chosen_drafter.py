"""The drafter that a command line names."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from trainer.assembly.trained import Trained
from trainer.config.decoding_options import DrafterOptions
from trainer.decoding.fused import Fused
from trainer.drafters import Drafter, DrafterError
from trainer.drafters.edit import EditLookup
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.recycling import TokenRecycling
from trainer.drafters.small import small_model


def generation_config(
    temperature: float, top_p: float, max_new_tokens: int, stops: list[int], pad: int, **more: Any
) -> GenerationConfig:
    """Return transformers' settings for a command's options. A temperature of 0 is greedy."""
    # top_k=0: by default transformers draws from the 50 likeliest tokens only.
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=[*stops],
        pad_token_id=pad,
        **drawing,
        **more,
    )


def check_drafter(config: dict[str, Any], run: str, options: DrafterOptions) -> None:
    """Check that a run has the requested drafter, by its config, before its model is loaded.

    Raises:
        DrafterError: it has none.
    """
    if options.drafter.startswith("run") and not config.get("drafter"):
        raise DrafterError(
            f"run={run} has no drafter. Train one with the adapter, graft ... drafter=mtp_shared,"
            " or give one that needs no training, drafter=lookup or drafter=recycling"
        )


def drafter_of(trained: Trained, options: DrafterOptions) -> Drafter | None:
    """Return the requested drafter; None if it is the run's, which has none that proposes tokens.

    Raises:
        BaseError, DrafterError: the small model cannot be loaded, or has other tokens.
    """
    name, _, copying = options.drafter.partition("+")
    drafter = _drafter_of(trained, name, options)
    if drafter is None or not copying:
        return drafter
    second = _drafter_of(trained, copying, options)
    assert second is not None
    return Fused(drafter, second)


def _drafter_of(trained: Trained, name: str, options: DrafterOptions) -> Drafter | None:
    model: Any = trained.model
    if name == "run":
        if trained.drafter is None or not trained.drafter.proposes:
            return None
        # In the target's dtype: autocast would convert fp32 weights again for every draft.
        return trained.drafter.to(model.get_input_embeddings().weight.dtype)
    if name == "lookup":
        return PromptLookup()
    if name == "edit":
        return EditLookup()
    if name == "recycling":
        return TokenRecycling(model.config.get_text_config().vocab_size)
    weight = next(trained.model.parameters())
    assert options.small is not None  # DrafterOptions.faults
    return small_model(
        options.small, trained.base, weight.dtype, weight.device, context=options.context
    )
