"""Edit look-up follows the text that is rewritten."""

from __future__ import annotations

import random

import pytest
import torch

from tests.toys import adapters as toys
from trainer.decoding.speculative import generate_batch
from trainer.drafters import Target, TargetUpdate
from trainer.drafters.edit import EditLookup, Memory, follow

WORDS = 400


def replay(source, answer):
    """Return (passes, for each pass how many drafted tokens were right), of a target that writes
    `answer` after the prompt `source`."""
    drafter, nothing = EditLookup(), torch.zeros(1, 0)
    memory = drafter.start(None)
    update = TargetUpdate(
        nothing, nothing, torch.tensor([*source[1:], answer[0]]), torch.tensor(source[0])
    )
    position, taken = 1, []
    while position < len(answer):
        draft = drafter.propose(memory, None, update, None).tokens.tolist()
        right = 0
        while right < len(draft) and answer[position + right : position + right + 1] == [
            draft[right]
        ]:
            right += 1
        step = answer[position : position + right + 1]
        taken.append(right)
        position += len(step)
        update = TargetUpdate(nothing, nothing, torch.tensor(step))
    return len(taken), taken


def text(length, seed=0):
    return random.Random(seed).sample(range(WORDS), length)  # no word twice


def test_an_unedited_text_takes_few_passes():
    passes, taken = replay(text(300), text(300))
    assert passes <= 5
    assert taken[0] == 32  # the first draft starts at the second word


@pytest.mark.parametrize("kind", ["replaced", "inserted", "deleted"])
def test_copying_goes_on_within_three_words_of_an_edit(kind):
    source = text(200)
    answer = list(source)
    place = 90
    new = {"replaced": [WORDS + 1], "inserted": [WORDS + 1, source[place]], "deleted": []}[kind]
    answer[place : place + 1] = new
    passes, taken = replay(source, answer)
    # One pass ends at the edit; at most three are needed until copying is full again.
    assert passes <= 10
    assert sum(taken) + passes >= len(answer) - 1
    after = [right for right in taken if right >= 16]
    assert sum(after) > 150


def test_a_repeated_line_goes_on_at_the_nearest_place():
    line = [1, 2, 3, 4]
    memory = Memory(source=line * 6, cursor=8)
    memory.ends = {(2, 3, 4): [4, 8, 12, 16, 20, 24]}
    memory.answer = [9, 2, 3]
    follow(memory, [4])
    assert memory.cursor == 8


def test_a_source_that_does_not_help_costs_short_drafts():
    memory = Memory(source=list(range(50)))
    follow(memory, [60])
    for token in range(61, 67):
        follow(memory, [token])
    assert memory.count == 4


def test_the_decoders_text_stays():
    target = Target(toys.llama(torch.float32))
    prompts = [torch.tensor([5, 9, 13, 7, 5, 9]), torch.tensor([40, 41])]
    plain = generate_batch(target, None, prompts, 30, [])
    result = generate_batch(target, EditLookup(), prompts, 30, [])
    assert [each.tokens for each in result] == [each.tokens for each in plain]
