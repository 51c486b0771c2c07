"""transformers' settings of generate, one accepted token after the other.

A pass of assisted decoding accepts several tokens, and transformers checks its stopping criteria
once for all of them. Here they are checked for each token in order, as if it were the newest. The
text ends at the first token that a criterion stops at.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from trainer.drafters import DrafterError

# transformers' processors whose scores depend on more than the text and its logits: on earlier
# calls, on passes of their own, or on a second half of the batch.
STATEFUL = {
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WhisperNoSpeechDetection",
    "WhisperTimeStampLogitsProcessor",
}
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def refusal(config: Any, processors: Any, ids: Int[Tensor, "B n"]) -> str | None:
    """Return why drafted tokens cannot be verified under these settings, or None."""
    if config.num_beams > 1:
        return f"num_beams={config.num_beams}: a drafter drafts one text at a time, set num_beams=1"
    if config.guidance_scale not in (None, 1):
        return (
            f"guidance_scale={config.guidance_scale} reads a second text with passes of its own,"
            " which drafted tokens would enter: leave it out, or decode without a drafter"
        )
    if (mode := config.get_generation_mode()) not in _MODES:
        return (
            f"these settings choose {mode.value.replace('_', ' ')}, and a drafter drafts for greedy"
            " search and sampling: leave them out"
        )
    for processor in processors:
        name = type(processor).__name__
        if STATEFUL & {kind.__name__ for kind in type(processor).__mro__} or _changes(
            processor, ids, config
        ):
            return (
                f"{name} depends on more than the text and its logits, and drafted tokens that are"
                " refused would enter what it remembers: leave it out, or decode without a drafter"
            )
    return None


def _changes(processor: Any, ids: Int[Tensor, "B n"], config: Any) -> bool:
    """Return whether a processor that is not transformers' own changes itself when it is called."""
    if type(processor).__module__.startswith("transformers.") or not vars(processor):
        return False
    try:
        trial, before = copy.deepcopy(processor), pickle.dumps(vars(processor))
        trial(ids, torch.zeros(len(ids), int(ids.max()) + 1, device=ids.device))
        return pickle.dumps(vars(trial)) != before
    except Exception:  # what cannot be copied or tried on its own is the caller's responsibility
        return False


def with_stop_strings(model: Any, tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return generate's settings with stop_strings as a stopping criterion.

    Raises:
        DrafterError: there are stop strings and no tokenizer.
    """
    config = settings.get("generation_config")
    strings = settings.get("stop_strings")
    if strings is None:
        source = config if config is not None else model.generation_config
        strings = getattr(source, "stop_strings", None)
    if strings is None:
        return settings
    if tokenizer is None:
        raise DrafterError(
            f"stop_strings={strings!r} are compared with texts: give generate(tokenizer=...) too"
        )
    config = copy.deepcopy(config if config is not None else model.generation_config)
    config.stop_strings = None
    stopping = StoppingCriteriaList(settings.get("stopping_criteria") or [])
    stopping.append(StopStringCriteria(tokenizer, strings))
    more = {key: value for key, value in settings.items() if key != "stop_strings"}
    return more | {"generation_config": config, "stopping_criteria": stopping}


class HeldStreamer(BaseStreamer):
    """A streamer that passes tokens on when it is known that the text contains them."""

    def __init__(self, streamer: Any):
        self.streamer = streamer
        self.waiting: list[int] = []

    def put(self, value: Tensor) -> None:
        self.waiting += value.flatten().tolist()

    def release(self, count: int) -> None:
        """Pass on the first `count` tokens, one at a time as generate does, and drop the rest."""
        for token in self.waiting[:count]:
            self.streamer.put(torch.tensor([token]))
        self.waiting.clear()

    def end(self) -> None:
        self.streamer.end()


class AfterEachToken(StoppingCriteria):
    """Stopping criteria, checked after each token that is new since the last call. `length` is that
    of the text, up to the token that they stopped at."""

    def __init__(self, inner: Any, length: int, streamer: HeldStreamer | None):
        self.inner, self.length, self.streamer = inner, length, streamer

    def __call__(self, input_ids: Int[Tensor, "1 n"], scores: Any, **more: Any) -> Any:
        start, total, done = self.length, input_ids.shape[1], None
        for length in range(start + 1, total + 1):
            # Scores are those of the new tokens up to this one.
            some = scores[: len(scores) - (total - length)] if scores else scores
            done, self.length = self.inner(input_ids[:, :length], some, **more), length
            if bool(done.all()):
                break
        if self.streamer is not None:
            self.streamer.release(self.length - start)
        return done


def cut(out: Any, prompt: int, length: int) -> Any:
    """Return generate's output up to `length` tokens of the text; `prompt` are those before it."""
    if isinstance(out, Tensor):
        return out[:, :length]
    extra = out.sequences.shape[1] - length
    if not extra:
        return out
    out.sequences = out.sequences[:, :length]
    for name in ("scores", "logits", "attentions", "hidden_states"):
        if (values := getattr(out, name, None)) is not None:
            setattr(out, name, values[: length - prompt])
    if out.past_key_values is not None:
        out.past_key_values.crop(-extra)
    return out
