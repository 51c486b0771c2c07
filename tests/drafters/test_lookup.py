"""Prompt lookup copies what a plain search through the text finds."""

from __future__ import annotations

import random

import pytest
import torch

from tests.toys import adapters as toys
from trainer.decoding.speculative import generate_batch
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.drafters.lookup import PromptLookup


def update(ids, first=None):
    nothing = torch.zeros(len(ids), 0)
    return TargetUpdate(
        nothing,
        nothing,
        torch.tensor(ids, dtype=torch.long),
        None if first is None else torch.tensor(first),
    )


def searched(text, count, longest):
    """By looking at every place of the text."""
    for n in range(longest, 0, -1):
        places = [s for s in range(n, len(text)) if n < len(text) and text[s - n : s] == text[-n:]]
        if places:
            full = [s for s in places if s + count <= len(text)]
            place = full[-1] if full else places[0]
            return text[place : place + count]
    return []


@pytest.mark.parametrize(("count", "longest"), [(10, 3), (1, 1), (3, 2), (4, 5)])
def test_it_copies_what_a_plain_search_finds(count, longest):
    draw = random.Random(count)
    drafter = PromptLookup(count, longest)
    proposals = 0
    for symbols in (2, 4, 12):
        text = [draw.randrange(symbols) for _ in range(60)]
        memory, known = drafter.start(None), 5
        reported = update(text[1:known], text[0])
        while True:
            draft = drafter.propose(memory, None, reported, None)
            assert draft.tokens.tolist() == searched(text[:known], count, longest)
            assert draft.parents.tolist() == list(range(-1, len(draft.tokens) - 1))
            assert draft.probabilities is None
            proposals += len(draft.tokens) > 0
            step = draw.randint(1, 4)
            if known + step > len(text):
                break
            reported, known = update(text[known : known + step]), known + step
    assert proposals > 10


def test_two_sequences_do_not_mix():
    drafter = PromptLookup(3)
    one, other = drafter.start(None), drafter.start(None)
    assert drafter.propose(one, None, update([6, 7, 5], 5), None).tokens.tolist() == [6, 7, 5]
    assert drafter.propose(other, None, update([5], 9), None).tokens.tolist() == []


@pytest.mark.parametrize("settings", [{"count": 0}, {"longest": 0}])
def test_numbers_below_one_are_refused(settings):
    with pytest.raises(DrafterError, match=f"{next(iter(settings))}=0"):
        PromptLookup(**settings)


def test_it_is_not_trained():
    with pytest.raises(DrafterError, match="PromptLookup is not trained"):
        PromptLookup().states(None, None)


def test_the_decoders_text_stays():
    target = Target(toys.llama(torch.float32))
    prompts = [torch.tensor([5, 9, 13, 7, 5, 9]), torch.tensor([40, 41])]
    plain = generate_batch(target, None, prompts, 30, [])
    actual = generate_batch(target, PromptLookup(4), prompts, 30, [])
    assert [result.tokens for result in actual] == [result.tokens for result in plain]
    assert actual[0].steps < 29  # a random model with tied embeddings repeats itself
