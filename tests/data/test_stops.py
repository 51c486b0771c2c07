"""Texts that end an answer, where no single token does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import StopStringCriteria

from tests.toys import other_end
from trainer.data import ends
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.evaluation.streamed_answer import _Streamer

PIECES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def words():
    return other_end.tokenizer()


def ids_of(words, text):
    return words(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("yes</end>", 9),
        ("yes</end></end>", 9),
        ("größe 🦙</end> and on", 18),
        ("yes</en d>", None),
        ("</end", None),
        ("yes<|endoftext|></end>", 4),
        ("", None),
    ],
)
def test_an_answer_ends_with_the_first_text_or_token(words, text, end):
    stops = Stops([other_end.SPECIALS.index("<|endoftext|>")], ["</end>"], words)
    ids = ids_of(words, text)
    assert stops.end(ids) == end
    if end is not None:
        assert stops.end(ids[: end - 1]) is None
        assert stops.end(ids, end - 1) == end
    # as transformers' own criterion, token by token
    if "<|" not in text:
        criterion = StopStringCriteria(words, ["</end>"])
        naive = (
            count
            for count in range(1, len(ids) + 1)
            if criterion(torch.tensor([ids[:count]]), None).item()
        )
        assert next(naive, None) == end


def test_it_is_a_list_of_ids_for_everything_that_knows_no_texts(words):
    assert Stops([2, 5]) == [2, 5]
    assert Stops([2]).arguments() == {}
    assert Stops([2]).without_end("a</end>b") == "a</end>b"
    stops = Stops([2], ["</end>"], words)
    assert stops.arguments() == {"stop_strings": ["</end>"], "tokenizer": words}
    assert stops.without_end("a</end>b") == "a"
    assert stops.without_end("a</en") == "a</en"
    assert Stops.of(stops) is stops
    assert Stops.of([1]).texts == ()


def renderer(words, tmp_path, source):
    (tmp_path / "t.jinja").write_text(source)
    task = SimpleNamespace(
        kind="conversation", chat_template=str(tmp_path / "t.jinja"), train_on="all"
    )
    return Renderer(words, task)


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        (PIECES, ["</end>"]),
        (PIECES.replace("</end>", "<|im_end|>\n"), []),  # an id ends it
        (PIECES.replace("</end>", "</end><|eom|>"), []),
        (PIECES.replace("</end>", "\n"), []),
    ],
)
def test_the_text_is_that_which_the_template_writes(words, tmp_path, source, texts):
    assert ends.of_pieces(renderer(words, tmp_path, source)) == texts
    stops = ends.stop_set(words, None, [2], renderer(words, tmp_path, source))
    assert (stops.texts, stops[0]) == (tuple(texts), 2)


def test_no_template_has_no_end_in_pieces(words):
    task = SimpleNamespace(kind="conversation", chat_template="none", train_on="all")
    assert ends.of_pieces(Renderer(words, task)) == []


@pytest.mark.parametrize("text", ["yes</end>", "a < b</ </end>", "yes", "no </en"])
def test_a_streamed_answer_does_not_show_its_end(words, text):
    shown = []
    streamer = _Streamer(words, shown.append, ["</end>"])
    streamer.put(torch.tensor([[7]]))  # the prompt
    for token in ids_of(words, text):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(shown) == text.removesuffix("</end>")


def test_an_answer_ends_at_the_first_of_several_texts():
    stops = Stops([], ["<b>", "<a>", "<c>"])
    assert stops.without_end("x<a>y<b>z") == "x"
    assert stops.without_end("x<b>y<a>z") == "x"
    assert stops.without_end("x") == "x"
