"""The settings that a base's generation_config.json may choose."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

from trainer.config.shown import shown

log = logging.getLogger("trainer")

# How tokens are chosen and where an answer ends. Other settings change how many answers there are,
# what `generate` returns, or take files and further models.
KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "use_cache",
    "transformers_version",
)


def keep_single_answers(model: Any, path: str) -> None:
    """Set what KEPT does not name in a model's generation config to transformers' defaults, with a
    warning: several sequences or beams, and other kinds of decoding. Evaluation and drafting decode
    one answer a prompt."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    plain = vars(GenerationConfig())
    changed = {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and name not in KEPT and value != plain.get(name)
    }
    for name in changed:
        setattr(config, name, plain.get(name))
    # False and 1 are what transformers takes without a setting: one sequence, one beam, no states.
    changed = {name: value for name, value in changed.items() if value not in (None, False, 1)}
    if changed:
        log.warning(
            "generation_config.json of %s sets %s, which is not used: one answer is decoded for"
            " each prompt",
            shown(path),
            shown(", ".join(changed)),
        )
