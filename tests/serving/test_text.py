"""Text grows by whole characters, ends before a stop string, and never shows a part of one."""

from __future__ import annotations

import random

import pytest

from trainer.models.tiny import byte_tokenizer
from trainer.serving.text import Text, TokenTexts

TOKENIZER = byte_tokenizer()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def grown(ids, ends=()):
    """The text, and what a reader sees after each token."""
    text, seen = Text(TOKENIZER, ends), []
    for token in ids:
        text.add(token)
        seen.append(text.text[: text.sure])
        if text.ended:
            break
    text.close()
    return text, seen


def test_a_character_comes_with_its_last_byte():
    text, seen = grown(ids_of("aé🙂"))
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé🙂"]
    assert text.text == "aé🙂"


def test_bytes_that_are_no_character_come_at_the_end():
    text, seen = grown(ids_of("aé")[:-1])
    assert seen == ["a", "a"]
    assert text.text == "a�"


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_the_text_of_one_decoding(seed):
    draw = random.Random(seed)
    ids = [draw.randrange(len(TOKENIZER)) for _ in range(60)]
    assert grown(ids)[0].text == TOKENIZER.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "ends", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one END two", ["two", "END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("ab abc", ["abc"], "ab "),
        ("aaab", ["aab"], "a"),
        ("é🙂x", ["🙂"], "é"),
        ("END", ["END"], ""),
    ],
)
def test_it_ends_before_the_first_stop_string(text, ends, expected):
    whole, seen = grown(ids_of(text), ends)
    assert whole.text == expected
    assert whole.ended == (expected != text)
    # what was shown once is never taken back
    assert all(expected.startswith(part) for part in seen)


def test_special_tokens_are_left_out():
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert grown([*ids_of("a"), end, *ids_of("b")])[0].text == "ab"


def test_a_token_has_its_own_bytes():
    texts = TokenTexts(TOKENIZER)
    parts = ids_of("é")
    assert b"".join(bytes(texts(token)[1]) for token in parts) == "é".encode()
    assert texts(parts[0])[0] == "�"
    assert texts(ids_of("a")[0]) == ("a", [97])
    assert texts(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))[0] == "<|im_end|>"
    every = {bytes(texts(token)[1]) for token in range(3, len(TOKENIZER))}
    assert every == {bytes([byte]) for byte in range(256)}
