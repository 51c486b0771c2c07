"""OpenAI's own client gets what the models write, by the same numbers."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from tests.toys.serving import RUNS, loaded, running
from trainer.config.decoding_options import SamplingOptions
from trainer.decoding import speculative
from trainer.decoding.sampling import Sampling
from trainer.evaluation import streamed_answer

QUESTION = [{"role": "user", "content": "12+34="}]
NAMES = ("base", "lora", "rosa")


def perturbed(models):
    """The models with larger weights and other adapters: each writes a text of its own, of many
    tokens. Tensors that models share are changed once."""
    draw, seen = torch.Generator().manual_seed(3), set()
    for model in models.values():
        for name, parameter in model.target.model.named_parameters():
            if parameter.data_ptr() in seen:
                continue
            seen.add(parameter.data_ptr())
            if ".delta." in name:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.data += 0.3 * noise.to(parameter)
            elif parameter.dim() > 1:
                parameter.data *= 12
    return models


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RUNS.parent)  # the runs' rows are there
        models = perturbed(loaded("lora", "rosa", drafter="lookup", merges=False))
        with running(models) as up:
            yield up


def naive(model, ids, settings, count=24):
    """The tokens that `graft generate` writes, and its text."""
    pieces = []
    stops = model.stops
    streamed_answer.answer(
        model.target.model, ids, model.tokenizer, stops, settings, count, pieces.append
    )
    target, prompt = model.target, torch.tensor(ids)
    sampling = Sampling(settings.temperature, settings.top_p, seed=settings.seed)
    plain = speculative.generate(target, None, prompt, count, stops, sampling)
    return plain.tokens, "".join(pieces)


def chat_ids(model):
    return model.renderer.chat(QUESTION)


def streamed(client, **settings):
    """A stream's text, its tokens, and its last chunk of a choice."""
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION, stream=True, extra_body={"graft_tokens": True}, **settings
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    tokens = [
        token
        for chunk in chunks
        for token in (chunk.model_extra.get("graft") or {}).get("answer", [])
    ]
    return text, tokens, chunks


def test_the_models_are_listed(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == list(NAMES)
    one = client.models.retrieve("rosa")
    assert (one.parent, one.graft) == ("base", {"kind": "chat", "step": 3, "drafts": True})
    with pytest.raises(openai.NotFoundError, match="Known: base, lora, rosa"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_what_generate_writes(server, name):
    model, client = server.models[name], server.client()
    tokens, text = naive(model, chat_ids(model), SamplingOptions())
    settings = {"model": name, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(
        messages=QUESTION, **settings, extra_body={"graft_tokens": True}
    )
    assert [token["id"] for token in whole.graft["answer"]] == tokens
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == len(chat_ids(model))
    assert whole.usage.completion_tokens == 24
    parts, drawn, chunks = streamed(client, **settings, stream_options={"include_usage": True})
    assert parts == text
    assert [token["id"] for token in drawn] == tokens
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 24
    assert len(set(tokens)) > 3, "the text is too plain to show a difference"


def test_the_models_write_different_texts(server):
    client = server.client()
    texts = [streamed(client, model=name, temperature=0, max_tokens=24)[0] for name in NAMES]
    assert len(set(texts)) == 3


def test_a_text_is_continued(server):
    model, client = server.models["lora"], server.client()
    ids = model.tokenizer("abc")["input_ids"]
    _, text = naive(model, ids, SamplingOptions(), 16)
    for prompt in ("abc", ids, ["abc"]):
        answer = client.completions.create(
            model="lora", prompt=prompt, temperature=0, max_tokens=16
        )
        assert answer.choices[0].text == text
    chunks = client.completions.create(
        model="lora", prompt="abc", temperature=0, max_tokens=16, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_drafted_tokens_change_no_text(server):
    """The drafter copies from the prompt, which repeats what the model will write."""
    model, client = server.models["rosa"], server.client()
    ids = model.tokenizer("abcabc")["input_ids"]
    tokens, _ = naive(model, ids, SamplingOptions(), 40)
    prompt = [*ids, *tokens, *ids]
    tokens, _ = naive(model, prompt, SamplingOptions(), 40)
    answer = client.completions.create(
        model="rosa", prompt=prompt, temperature=0, max_tokens=40, extra_body={"graft_tokens": True}
    )
    assert [token["id"] for token in answer.graft["answer"]] == tokens
    marked = sum(token["drafted"] for token in answer.graft["answer"])
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == answer.graft["accepted"] == marked > 0
    # each pass adds a token of the model's own, but the last one has no room for it
    assert answer.graft["passes"] + marked in (40, 41)
    assert details.rejected_prediction_tokens == answer.graft["drafted"] - marked


def test_log_probabilities_are_those_of_a_naive_forward_pass(server):
    model, client = server.models["lora"], server.client()
    ids = chat_ids(model)
    answer = client.chat.completions.create(
        model="lora", messages=QUESTION, temperature=0.7, top_p=0.9, seed=5, max_tokens=12,
        logprobs=True, top_logprobs=3, extra_body={"graft_tokens": True},
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    tokens = [token["id"] for token in answer.graft["answer"]]
    with torch.no_grad():
        logits = model.target.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    assert len(content) == len(tokens) == 12
    for row, token, entry in zip(expected, tokens, content, strict=True):
        # another batch of positions: matrix products add in another order
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        texts = [bytes(model.texts(int(i))[1]) for i in best.indices]
        assert [bytes(top.bytes) for top in entry.top_logprobs] == texts
    # special tokens are no text
    joined = b"".join(
        bytes(entry.bytes)
        for entry, token in zip(content, tokens, strict=True)
        if token not in model.tokenizer.all_special_ids
    ).decode("utf-8", "replace")
    assert joined == answer.choices[0].message.content
    old = client.completions.create(
        model="lora", prompt=ids, temperature=0, max_tokens=4, logprobs=2
    )
    assert len(old.choices[0].logprobs.token_logprobs) == 4
    assert all(len(top) == 2 for top in old.choices[0].logprobs.top_logprobs)
    assert old.choices[0].logprobs.text_offset[0] == 0


def test_streamed_log_probabilities_are_the_same(server):
    client = server.client()
    settings = {"model": "lora", "temperature": 0, "max_tokens": 9, "logprobs": True}
    whole = client.chat.completions.create(messages=QUESTION, **settings)
    _, _, chunks = streamed(client, **settings)
    parts = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert parts == whole.choices[0].logprobs.content


def test_a_seed_repeats_its_text(server):
    client = server.client()
    settings = {"model": "lora", "temperature": 1.0, "max_tokens": 20}
    texts = {seed: streamed(client, seed=seed, **settings)[0] for seed in (1, 2, -3)}
    assert len(set(texts.values())) == 3
    streamed(client, **settings)  # another request's draws in between
    for seed, text in texts.items():
        assert streamed(client, seed=seed, **settings)[0] == text
    assert len({streamed(client, **settings)[0] for _ in range(3)}) == 3  # without one


def test_a_text_ends_before_a_stop_string(server):
    model, client = server.models["lora"], server.client()
    _, text = naive(model, chat_ids(model), SamplingOptions(), 24)
    for start, end in ((5, 7), (9, 10), (12, 15)):
        stop = text[start:end]
        expected = text[: text.find(stop)]
        settings = {"model": "lora", "temperature": 0, "max_tokens": 24, "stop": [stop, "never"]}
        whole = client.chat.completions.create(messages=QUESTION, **settings, logprobs=True)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "stop"
        tokens = b"".join(bytes(entry.bytes) for entry in whole.choices[0].logprobs.content)
        assert tokens.decode("utf-8", "replace").startswith(expected)
        assert whole.usage.completion_tokens < 24
        parts, _, chunks = streamed(client, **settings)
        assert parts == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_end_token_ends_the_answer(server):
    model, client = server.models["base"], server.client()
    tokens, _ = naive(model, chat_ids(model), SamplingOptions(), 24)
    place = next(i for i in range(3, 24) if tokens[i] not in tokens[:i])
    before, model.stops[:] = [*model.stops], [tokens[place]]
    try:
        answer = client.chat.completions.create(
            model="base", messages=QUESTION, temperature=0, max_tokens=24,
            extra_body={"graft_tokens": True},
        )  # fmt: skip
    finally:
        model.stops[:] = before
    assert answer.choices[0].finish_reason == "stop"
    assert [token["id"] for token in answer.graft["answer"]] == tokens[:place]
    assert answer.usage.completion_tokens == place + 1


def test_recycling_repeats_a_seed_too(monkeypatch):
    """It remembers earlier texts, on which draws would depend."""
    monkeypatch.chdir(RUNS.parent)
    models = perturbed(loaded("lora", drafter="recycling", merges=False))
    with running(models) as up:
        client = up.client()
        settings = {"model": "lora", "temperature": 1.0, "max_tokens": 20, "seed": 4}
        first = streamed(client, **settings)[0]
        for seed in range(3):
            streamed(client, **settings | {"seed": seed, "max_tokens": 40})
        assert streamed(client, **settings)[0] == first


def test_the_page_and_the_health_are_served(server):
    import httpx

    page = httpx.get(f"{server.url}/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert json.loads(httpx.get(f"{server.url}/health").text) == {"status": "ok", "waiting": 0}
