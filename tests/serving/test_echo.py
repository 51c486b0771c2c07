"""A response of /v1/completions that begins with the prompt, as `echo` asks for."""

from __future__ import annotations

import httpx
import openai
import pytest
import torch

from tests.serving.test_server import naive, perturbed
from tests.toys.serving import RUNS, loaded, running
from trainer.config.decoding_options import SamplingOptions
from trainer.decoding.sampling import Sampling
from trainer.models import losses
from trainer.serving import echo
from trainer.serving.prompts import Prompt

TEXT = "abc 12+34= <|im_end|> é日 x"


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RUNS.parent)
        with running(perturbed(loaded("lora", drafter="lookup", merges=False)), queue=3) as up:
            yield up


def log_probabilities(model, ids):
    """The log-probability of each token after the first, by one naive pass."""
    with torch.no_grad():
        rows = model.target.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return rows


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_prompt_is_scored(server, monkeypatch, chunk):
    if chunk:  # logits of a long prompt are computed in parts
        monkeypatch.setattr(losses, "positions", lambda *_: chunk)
    model, client = server.models["lora"], server.client()
    ids = model.tokenizer(TEXT)["input_ids"]
    for prompt in (TEXT, ids, [TEXT], [ids]):
        answer = client.completions.create(
            model="lora", prompt=prompt, echo=True, logprobs=2, max_tokens=0
        )
        (choice,) = answer.choices
        assert choice.text == TEXT
        assert choice.finish_reason == "length"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids)
        assert answer.graft["passes"] == 1
        scores = choice.logprobs
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        rows = log_probabilities(model, ids)
        own = rows[torch.arange(len(rows)), ids[1:]].tolist()
        # another batch of positions: matrix products add in another order
        assert scores.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
        for row, actual, top in zip(rows, own, scores.top_logprobs[1:], strict=True):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
            assert len(top) in (2, 3)  # and the token itself, where it is none of them
            assert any(value == pytest.approx(actual, abs=1e-4) for value in top.values())
        ends = [*scores.text_offset[1:], len(TEXT)]
        parts = [TEXT[a:b] for a, b in zip(scores.text_offset, ends, strict=True)]
        assert "".join(parts) == TEXT
        assert "<|im_end|>" in parts
    assert len(scores.tokens) == len(ids)


def test_an_answer_follows_the_prompt(server):
    model, client = server.models["lora"], server.client()
    settings = {"model": "lora", "prompt": "abc", "temperature": 0, "max_tokens": 16, "logprobs": 1}
    ids = model.tokenizer("abc")["input_ids"]
    _, text = naive(model, ids, SamplingOptions(), 16)
    whole = client.completions.create(echo=True, extra_body={"graft_tokens": True}, **settings)
    alone = client.completions.create(**settings)
    assert whole.choices[0].text == f"abc{text}"
    assert alone.choices[0].text == text
    with_prompt, without = whole.choices[0].logprobs, alone.choices[0].logprobs
    assert with_prompt.token_logprobs[len(ids) :] == without.token_logprobs
    assert with_prompt.text_offset == [0, 1, 2, *(3 + place for place in without.text_offset)]
    assert len(whole.graft["answer"]) == whole.usage.completion_tokens == 16
    chunks = list(client.completions.create(echo=True, stream=True, **settings))
    assert chunks[0].choices[0].text == "abc"
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"abc{text}"
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [score for part in parts for score in part.token_logprobs] == with_prompt.token_logprobs


def test_each_prompt_has_a_choice(server):
    client = server.client()
    settings = {"model": "lora", "temperature": 0, "max_tokens": 5}
    prompts = ["abc", "12+34=", "x"]
    alone = [
        client.completions.create(prompt=prompt, **settings).choices[0].text for prompt in prompts
    ]
    together = client.completions.create(prompt=prompts, **settings)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == alone
    assert len(set(alone)) > 1
    assert together.usage.completion_tokens == 15
    chunks = list(
        client.completions.create(
            prompt=prompts, stream=True, stream_options={"include_usage": True}, **settings
        )
    )
    texts, ended = ["", "", ""], []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert choice.index == len(ended)  # one choice after another
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            ended.append(choice.finish_reason)
    assert texts == alone
    assert ended == ["length"] * 3
    assert (chunks[-1].choices, chunks[-1].usage) == ([], together.usage)
    with pytest.raises(openai.BadRequestError, match="prompt has 4 texts, expected at most 3"):
        client.completions.create(prompt=[*prompts, "y"], **settings)


def test_a_prompt_may_fill_the_model(server):
    """Scoring alone needs no room for an answer."""
    model, client = server.models["lora"], server.client()
    ids = [5 + i % 50 for i in range(model.longest)]
    settings = {"model": "lora", "echo": True, "logprobs": 0}
    answer = client.completions.create(prompt=ids, max_tokens=0, **settings)
    assert len(answer.choices[0].logprobs.tokens) == len(ids)
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(prompt=ids, max_tokens=1, **settings)
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(prompt=[*ids, 5], max_tokens=0, **settings)


def test_lm_eval_scores_by_this_endpoint(server):
    """Its client of servers gives what its own wrapper of transformers' models gives."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI as Client

    model = server.models["lora"]
    pairs = [("abc", " x"), ("12+34=", "46"), ("x", "yz")]
    encode = model.tokenizer.encode
    contexts, tokens = [], []
    for context, continuation in pairs:
        contexts.append(len(encode(context)))
        tokens.append(encode(context) + encode(continuation))
    with torch.no_grad():
        best = model.target.model(torch.tensor([tokens[0]])).logits[0, contexts[0] - 1 : -1]
    tokens[0][contexts[0] :] = best.argmax(-1).tolist()[: len(tokens[0]) - contexts[0]]
    tokens[0] = tokens[0][: contexts[0] + 1]  # greedy by construction
    body = Client._create_payload(type("Named", (), {"model": "lora"}), tokens)
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    results = Client.parse_logprobs(response.json(), ctxlens=contexts)
    for ids, start, (score, greedy) in zip(tokens, contexts, results, strict=True):
        rows = log_probabilities(model, ids)[start - 1 :]
        own = rows[torch.arange(len(rows)), ids[start:]]
        assert score == pytest.approx(float(own.sum()), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == torch.tensor(ids[start:])).all())
    assert results[0][1]
    assert not all(greedy for _, greedy in results)


class Words:
    """A tokenizer of words that puts a token before each text, lower-cases it, and writes the space
    before a word but before no text's first, as SentencePiece does."""

    names = ("<s>", "one", "two", "three")

    def __call__(self, text, add_special_tokens=True):
        ids = [self.names.index(word) for word in text.lower().split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def decode(self, ids, skip_special_tokens):
        words = [self.names[i] for i in ids if i or not skip_special_tokens]
        return " ".join(words)


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ("one two", "one two", [0, 0, 3]),  # the token before the text has no character
        ("One  Two", "One  Two", [0, 0, 3]),  # the text as it came
        ("two", "two", [0, 0]),
        (None, "<s> one two", [0, 3, 7]),  # ids: the client wrote all of them
    ],
)
def test_the_places_of_a_prompts_tokens(prompt, text, offsets):
    ids = Words()(prompt or "one two")["input_ids"]
    made = Prompt(ids, 0, Sampling(), False, (), None, True, True, prompt)
    assert echo.text_and_offsets(Words(), made) == (text, offsets)


def test_a_continued_text_keeps_its_first_space():
    from trainer.serving.text import Text

    continued, fresh = Text(Words(), (), before=[0, 1]), Text(Words(), ())
    for text in (continued, fresh):
        text.add(2)
        text.add(3)
    assert (continued.text, fresh.text) == (" two three", "two three")
