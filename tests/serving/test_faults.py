"""Whatever clients send or do, each request gets its answer or a clear refusal, and the server goes
on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.serving.test_server import QUESTION
from tests.toys.serving import RUNS, loaded, running
from trainer.decoding.streaming import Streaming
from trainer.serving.events import Piece

CHAT = {"model": "lora", "messages": QUESTION, "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def models():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RUNS.parent)
        yield loaded("lora")


@pytest.fixture(scope="module")
def server(models):
    with running(models) as up:
        yield up


def post(server, body, path="chat/completions", **headers):
    """The response to a body: JSON, or bytes as they are."""
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"} | headers
    return httpx.post(f"{server.url}/v1/{path}", headers=headers, timeout=60, **content)


def until(condition, seconds=20.0):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "x"}, 404, "model='x': there is no such model. Known: base, lora"),
        ({"temperature": 3}, 400, "temperature=3"),
        ({"messages": [{"role": "boss", "content": "a"}]}, 400, "message 1 has the role 'boss'"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "content must be text, and is int"),
        ({"messages": [{"role": "user"}]}, 400, "content must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "a part of type 'image_url'",
        ),
        ({"tools": [{"type": "x"}]}, 400, "tool 1 must describe a function"),
        ({"max_tokens": 600}, 400, "takes 512 tokens of prompt and answer together"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, 400, "shorten the prompt"),
        ({"messages": [{"role": "user", "content": "a" * 3_000_000}]}, 413, "2,097,152 bytes"),
    ],
    ids=range(10),
)
def test_a_request_is_refused(server, change, status, message):
    response = post(server, CHAT | change)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert post(server, CHAT).status_code == 200


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([999], "prompt has the token 999, expected ids below"),
        ([["a"]], "prompt"),
        ("a" * 600, "shorten the prompt"),
        (["a"] * 65, "prompt has 65 texts, expected at most 64"),
        (["a", ""], "the prompt is empty"),
    ],
)
def test_a_prompt_is_refused(server, prompt, message):
    body = {"model": "lora", "prompt": prompt}
    response = post(server, body, "completions")
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"].partition(".")[0] == "prompt"


def test_other_methods_addresses_and_types(server):
    assert (
        httpx.get(f"{server.url}/v1/nothing")
        .json()["error"]["message"]
        .startswith("GET /v1/nothing: there is no such address")
    )
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    form = post(server, b"x", **{"content-type": "text/plain"})
    assert form.status_code == 415
    assert "expected application/json" in form.json()["error"]["message"]
    assert post(server, CHAT, host="evil.example").status_code == 403
    assert post(server, CHAT, origin="http://evil.example").status_code == 403
    assert post(server, CHAT, origin=server.url).status_code == 200


def test_a_key_is_checked(models):
    with running(models, api_key="secret") as up:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            up.client().models.list()
        assert len(up.client(api_key="secret").models.list().data) == 2
        assert httpx.get(f"{up.url}/").status_code == 200


@contextlib.contextmanager
def held(monkeypatch):
    """Decoding waits until the context ends, or `.set()` is called."""
    gate, decode = threading.Event(), Streaming.decode

    def waits(self, prompts):
        assert gate.wait(30)
        return decode(self, prompts)

    monkeypatch.setattr(Streaming, "decode", waits)
    try:
        yield gate
    finally:
        gate.set()


def test_more_requests_than_may_wait_are_refused(models, monkeypatch):
    with running(models, queue=2) as up, held(monkeypatch) as gate:
        worker = up.server.worker
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            first = pool.submit(post, up, CHAT)
            until(lambda: worker.current is not None)
            waiting = [pool.submit(post, up, CHAT) for _ in range(2)]
            until(lambda: len(worker.waiting) == 2)
            refused = post(up, CHAT)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert "2 requests are waiting" in refused.json()["error"]["message"]
            gate.set()
            assert [each.result().status_code for each in (first, *waiting)] == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(models, monkeypatch, stream):
    with running(models) as up, held(monkeypatch) as gate:
        worker = up.server.worker
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(post, up, CHAT)
            until(lambda: worker.current is not None)
            with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=0.3) as client:
                client.post(f"{up.url}/v1/chat/completions", json=CHAT | {"stream": stream})
            until(lambda: not worker.waiting)
            gate.set()
            assert first.result().status_code == 200


def test_decoding_ends_when_the_client_goes(server, monkeypatch):
    worker, events = server.server.worker, []
    submit = worker.submit

    def recorded(job):
        emit = job.emit
        job.emit = lambda event: (events.append(event), emit(event))
        submit(job)

    monkeypatch.setattr(worker, "submit", recorded)
    body = CHAT | {"max_tokens": 450, "stream": True, "temperature": 1.0, "seed": 1}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60):
        until(lambda: events)
    until(lambda: worker.current is None)
    assert all(isinstance(event, Piece) for event in events), "it was decoded to its end"
    assert post(server, CHAT).status_code == 200


def test_a_failure_in_decoding_is_an_answer(server, monkeypatch):
    def fails(self, prompts):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(Streaming, "decode", fails)
        response = post(server, CHAT)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret detail" not in response.text
        with pytest.raises(openai.APIError, match="the request failed"):
            list(server.client().chat.completions.create(**CHAT, stream=True))
    assert post(server, CHAT).status_code == 200


def test_the_end_of_the_server_is_an_answer(models, monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(2) as pool, held(monkeypatch) as gate:
        with running(models) as up:
            requests = [pool.submit(post, up, CHAT) for _ in range(2)]
            worker = up.server.worker
            until(lambda: worker.current is not None and len(worker.waiting) == 1)
            up.server.should_exit = True
            responses = [request.result() for request in requests]
            gate.set()
        assert [response.status_code for response in responses] == [503, 503]
        assert "shutting down" in responses[0].json()["error"]["message"]


def test_twenty_clients_at_once(server):
    """Every second one behaves badly; all others get the text that they get alone."""
    worker = server.server.worker
    expected = {
        seed: post(server, CHAT | {"seed": seed, "temperature": 1.0}).json()["choices"]
        for seed in range(10)
    }

    def good(seed):
        body = CHAT | {"seed": seed, "temperature": 1.0}
        return post(server, body).json()["choices"] == expected[seed]

    def streams(seed):
        parts = server.client().chat.completions.create(
            **CHAT | {"seed": seed, "temperature": 1.0}, stream=True
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        return text == expected[seed][0]["message"]["content"]

    def goes(seed):
        body = CHAT | {"max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60):
            return True

    def broken(seed):
        return post(server, b'{"model": "lora", "messages": [').status_code == 400

    def large(seed):
        return post(server, b" " * 3_000_000).status_code == 413

    def half(seed):
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        return True

    def no_http(seed):
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"\x16\x03\x01 no http\r\n\r\n")
            return b"400" in line.recv(100)

    kinds = [good, goes, good, broken, streams, large, good, half, streams, no_http]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        jobs = [pool.submit(kinds[i % 10], i // 2) for i in range(20)]
        assert [job.result(60) for job in jobs] == [True] * 20
    until(lambda: worker.current is None and not worker.waiting)
    assert good(0)
