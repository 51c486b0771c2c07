"""A small model that reads a part of a long text: the part, its drafts, and the text that stays."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from tests.drafters.test_small import after, update
from tests.toys import adapters as toys
from trainer.config.decoding_options import DrafterOptions
from trainer.decoding import trees
from trainer.decoding.speculative import Strategy, generate_batch
from trainer.drafters import Target
from trainer.drafters.contexts import Context, bm25
from trainer.drafters.small import SmallModel


def naive_bm25(chunks, question):
    """Okapi BM25 of each chunk, by its formula."""
    mean = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk in chunks:
        score = 0.0
        for word in set(question):
            f, holders = chunk.count(word), sum(word in other for other in chunks)
            idf = math.log(1 + (len(chunks) - holders + 0.5) / (holders + 0.5))
            score += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(chunk) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("seed", range(5))
def test_the_best_chunks_are_read_in_their_order(seed):
    draw = random.Random(seed)
    text = [draw.randrange(60) for _ in range(draw.randrange(65, 200))]
    size, tail = 64, 32
    before, question = text[:-tail], text[-tail:]
    chunks = [before[start : start + 4] for start in range(0, len(before), 4)]  # 32 / 8 tokens
    scores = naive_bm25(chunks, question)
    best = sorted(sorted(range(len(chunks)), key=lambda i: (-scores[i], -i))[:8])
    expected = [token for place in best for token in chunks[place]] + question
    assert Context(f"bm25:{size}").of(torch.tensor(text)).tolist() == expected
    assert len(expected) <= size
    short = torch.tensor(text[:size])
    assert Context(f"bm25:{size}").of(short) is short


def test_scores_of_chunks_of_different_lengths():
    draw = random.Random(0)
    chunks = [[draw.randrange(9) for _ in range(length)] for length in (3, 9, 1, 5)]
    actual = bm25([Counter(chunk) for chunk in chunks], {1, 2, 3, 50})
    assert actual == pytest.approx(naive_bm25(chunks, [1, 2, 3, 50, 1]))


def test_a_chunk_that_the_question_names_is_read():
    text = torch.tensor([*range(100, 300), 7, 8, 9, *range(300, 500), *[7, 9, 8, 1, 2] * 4])
    assert {7, 8, 9} <= set(Context("bm25:32").of(text)[:16].tolist())
    assert Context("last:32").of(text).tolist() == text[-32:].tolist()


@pytest.mark.parametrize("setting", ["last:16", "bm25:24"])
def test_drafts_are_those_of_the_part_and_the_cache_stays_bounded(setting):
    target = Target(toys.llama(torch.float32))
    small = toys.llama(torch.float32, num_hidden_layers=1, hidden_size=32)
    drafter, context = SmallModel(small, 3, setting), Context(setting)
    draw = random.Random(0)
    text = [draw.randrange(64) for _ in range(41)]
    memory, part = drafter.start(target), context.of(torch.tensor(text)).tolist()
    for step in range(40):
        fresh = text[1:] if step == 0 else [draw.randrange(64) for _ in range(draw.randrange(1, 5))]
        if step:
            text += fresh
            part += fresh
            if len(part) > 2 * context.size:
                part = context.of(torch.tensor(text)).tolist()
        growth = drafter.grow(memory, target, update(fresh, None if step else text[0]))
        torch.testing.assert_close(growth.first(), after(small, part), rtol=1e-4, atol=1e-4)
        below = growth.extend(torch.tensor([3]), torch.tensor([-1]))
        torch.testing.assert_close(below[0], after(small, [*part, 3]), rtol=1e-4, atol=1e-4)
        assert memory.length == len(part) <= 2 * context.size
        assert memory.cache.get_seq_length() <= 2 * context.size + 3
    assert len(text) > 4 * context.size


@pytest.mark.parametrize("shape", [None, trees.eagle2(3, 4, 9)])
def test_the_text_stays(shape):
    target = Target(toys.llama(torch.float32))
    prompts = [torch.arange(60) % 50 + 3, torch.tensor([40, 41])]
    plain = generate_batch(target, None, prompts, 30, [])
    for setting in ("last:16", "bm25:32"):
        drafter = SmallModel(target.model, 4, setting)
        actual = generate_batch(target, drafter, prompts, 30, [], strategy=Strategy(shape))
        assert [each.tokens for each in actual] == [each.tokens for each in plain]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "last:512"}, "context=last:512 has no effect without drafter=small"),
        ({"context": "last:8"}, "expected all, last:N or bm25:N, with N of 16 tokens or more"),
        ({"context": "first:99"}, "context=first:99: expected all, last:N or bm25:N"),
    ],
)
def test_a_context_that_cannot_be_read_is_refused(options, message):
    assert any(message in fault for fault in DrafterOptions(**options).faults())
    assert not list(DrafterOptions(drafter="small", small="there", context="bm25:512").faults())
