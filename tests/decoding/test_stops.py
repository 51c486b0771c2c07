"""Stops, caps and processors of logits, with drafts that are right, wrong and copied: every text is
the one that transformers writes without a drafter."""

from __future__ import annotations

import itertools

import pytest

from tests.decoding.test_plugin import Scripted
from tests.toys.speculative import PROMPT, alone, tiny
from trainer.decoding.plugin import assist
from trainer.decoding.speculative import generate
from trainer.drafters import Target
from trainer.drafters.lookup import PromptLookup

KINDS = ("llama", "gpt2", "mistral, a window of 6", "gemma2, a cap and a window of 5")
LENGTH = 13
CAPS = (1, 2, 3, 5, 8, LENGTH)
PROCESSORS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [7, 9]]},
    {"suppress_tokens": [3, 5, 8]},
    {"begin_suppress_tokens": [3, 5, 8, 11]},
    {"sequence_bias": [[[4], 3.0], [[6, 2], 5.0]]},
    {"exponential_decay_length_penalty": (2, 1.5)},
    {"min_new_tokens": 6},
    {"forced_eos_token_id": 9},
    {"renormalize_logits": True, "remove_invalid_values": True},
]


def drafters(whole):
    return {
        "right": lambda: Scripted(whole),
        "wrong": lambda: Scripted(whole, lambda place: place % 3 == 1),
        "copied": PromptLookup,
    }


@pytest.fixture(autouse=True)
def no_layers(monkeypatch):
    monkeypatch.setattr(Scripted, "layers", ())


@pytest.mark.parametrize("kind", KINDS)
def test_each_stop_and_each_cap_ends_the_text_where_it_does_without_drafts(kind):
    model = tiny(kind, vocab_size=64)
    plain = alone(model, PROMPT, LENGTH)
    target, whole = Target(model), PROMPT.tolist() + plain
    tried = 0
    for (name, built), stop, cap in itertools.product(
        drafters(whole).items(), (None, plain[2], plain[7]), CAPS
    ):
        end = LENGTH if stop is None else plain.index(stop) + 1
        expected, stops = plain[: min(end, cap)], [] if stop is None else [stop]
        assert generate(target, built(), PROMPT, cap, stops).tokens == expected, (name, stop, cap)
        with assist(model, built()):
            assert alone(model, PROMPT, cap, stops) == expected, (name, stop, cap)
        tried += 2
    assert tried == 432 // len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_processor_writes_what_it_does_without_drafts(kind):
    model = tiny(kind, vocab_size=64)
    changed = 0
    plain = alone(model, PROMPT, LENGTH, [9])
    for settings in PROCESSORS:
        expected = alone(model, PROMPT, LENGTH, [9], **settings)
        changed += expected != plain
        for name, built in drafters(PROMPT.tolist() + expected).items():
            with assist(model, built()):
                assert alone(model, PROMPT, LENGTH, [9], **settings) == expected, (name, settings)
    assert changed >= 3
