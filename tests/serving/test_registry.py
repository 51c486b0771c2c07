"""Runs are loaded and unloaded while the server runs, by vLLM's requests."""

from __future__ import annotations

import concurrent.futures

import httpx
import openai
import pytest

from tests.serving.test_faults import held, until
from tests.serving.test_server import QUESTION
from tests.toys.serving import RUNS, running
from trainer.config.decoding_options import DrafterOptions
from trainer.decoding.speculative import Strategy
from trainer.serving import models
from trainer.serving.errors import ApiError
from trainer.serving.models import Loader
from trainer.serving.registry import Registry

ASK = {"messages": QUESTION, "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def loader():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RUNS.parent)
        made = Loader(DrafterOptions(drafter="run"), Strategy())
        yield made, made.start([str(RUNS / "lora")])


@pytest.fixture
def server(loader, monkeypatch):
    monkeypatch.chdir(RUNS.parent)
    with running(loader[1], queue=4, loader=loader[0]) as up:
        yield up


def post(server, verb, **body):
    return httpx.post(f"{server.url}/v1/{verb}_lora_adapter", json=body, timeout=60)


def names(server):
    return [model.id for model in server.client().models.list()]


def test_a_run_is_loaded_asked_and_unloaded(server):
    client = server.client()
    response = post(server, "load", lora_name="more", lora_path=str(RUNS / "rosa"))
    assert response.status_code == 200, response.text
    assert response.text == f"loaded more: step 3 of {RUNS / 'rosa'}"
    assert names(server) == ["base", "lora", "more"]
    alone = Loader(None, Strategy()).start([str(RUNS / "rosa")])["rosa"]
    assert client.models.retrieve("more").graft["step"] == 3
    text = client.chat.completions.create(model="more", **ASK).choices[0].message.content
    with running({"rosa": alone}) as other:
        expected = other.client().chat.completions.create(model="rosa", **ASK)
    assert text == expected.choices[0].message.content
    before = client.chat.completions.create(model="lora", **ASK).choices
    again = post(server, "load", lora_name="more", lora_path=str(RUNS / "rosa"))
    assert again.status_code == 400
    assert "lora_name=more is loaded already" in again.json()["error"]["message"]
    replaced = post(
        server, "load", lora_name="more", lora_path=str(RUNS / "lora"), load_inplace=True
    )
    assert replaced.status_code == 200
    assert client.chat.completions.create(model="more", **ASK).choices == before
    assert post(server, "unload", lora_name="more", lora_int_id=1).text == "unloaded more"
    assert names(server) == ["base", "lora"]
    with pytest.raises(openai.NotFoundError, match="Known: base, lora"):
        client.chat.completions.create(model="more", **ASK)
    assert client.chat.completions.create(model="lora", **ASK).choices == before


@pytest.mark.parametrize(
    ("verb", "body", "status", "message"),
    [
        ("load", {"lora_name": "x"}, 400, "lora_path: missing"),
        ("load", {"lora_path": "x"}, 400, "lora_name: missing"),
        ("load", {"lora_name": "", "lora_path": "x"}, 400, "lora_name=''"),
        ("load", {"lora_name": "a\nb", "lora_path": "x"}, 400, "lora_name='a\\nb'"),
        ("load", {"lora_name": "x" * 300, "lora_path": "x"}, 400, "lora_name="),
        ("load", {"lora_name": "base", "lora_path": "x"}, 400, "lora_name=base is the base"),
        ("load", {"lora_name": "lora", "lora_path": "x"}, 400, "lora_name=lora is loaded already"),
        ("load", {"lora_name": "x", "lora_path": "nowhere"}, 400, "it has no run.yaml"),
        ("load", {"lora_name": "x", "lora_path": f"{RUNS}/lorra"}, 400, "Did you mean"),
        ("load", {"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path='a\\x00b'"),
        ("load", {"lora_name": "x", "lora_path": "a" * 5000}, 400, "lora_path='aaa"),
        ("load", {"lora_name": "x", "lora_path": "a/" * 2000}, 400, "lora_path='a/a/"),
        ("load", {"lora_name": "x", "lora_path": f"{RUNS}/lora@99"}, 400, "99"),
        ("load", {"lora_name": "x", "lora_path": "x", "rank": 8}, 400, "rank: there is no such"),
        ("unload", {"lora_name": "x"}, 404, "lora_name='x': there is no such run. Loaded: lora"),
        ("unload", {"lora_name": "base"}, 400, "lora_name=base: the base stays"),
        ("unload", {}, 400, "lora_name: missing"),
        ("unload", {"lora_name": 5}, 400, "lora_name=5"),
    ],
    ids=range(18),
)
def test_what_is_refused(server, verb, body, status, message):
    response = post(server, verb, **body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    assert names(server) == ["base", "lora"]


def test_a_run_of_another_base_is_refused(server, loader, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(loader[0].shared.key, "precision", "bfloat16")
        response = post(server, "load", lora_name="x", lora_path=str(RUNS / "rosa"))
    assert response.status_code == 400, response.text
    expected = "the runs do not have one base: precision is bfloat16 for the first and float32"
    assert response.json()["error"]["message"].startswith(expected)
    assert names(server) == ["base", "lora"]
    assert server.client().chat.completions.create(model="lora", **ASK).choices


def test_a_request_that_runs_outlives_its_model(server, monkeypatch):
    client = server.client()
    expected = client.chat.completions.create(model="lora", **ASK).choices
    post(server, "load", lora_name="more", lora_path=str(RUNS / "lora"))
    worker = server.server.worker
    with held(monkeypatch) as gate, concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.chat.completions.create, model="more", **ASK) for _ in "ab"]
        until(lambda: worker.current is not None and len(worker.waiting) == 1)
        assert post(server, "unload", lora_name="more").status_code == 200
        assert post(server, "unload", lora_name="more").status_code == 404
        gate.set()
        assert [job.result().choices for job in asked] == [expected] * 2


def test_loading_waits_for_its_turn_and_the_queue_has_an_end(server, monkeypatch):
    """A base is never copied while a request reads it."""
    worker, loads = server.server.worker, []
    load = Loader.load

    def counted(self, path, name):
        loads.append(worker.current)
        return load(self, path, name)

    monkeypatch.setattr(models.Loader, "load", counted)
    with held(monkeypatch) as gate, concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = pool.submit(server.client().chat.completions.create, model="lora", **ASK)
        until(lambda: worker.current is not None)
        several = [
            pool.submit(post, server, "load", lora_name="same", lora_path=str(RUNS / "lora"))
            for _ in range(5)
        ]
        until(lambda: len(worker.waiting) == 4 and sum(job.done() for job in several) == 1)
        assert not loads
        gate.set()
        codes = sorted(job.result().status_code for job in several)
    assert codes == [200, 400, 400, 400, 429]  # one of them was first
    assert len(loads) == 1
    assert asked.result().choices


def test_a_server_that_others_reach_loads_nothing(loader):
    registry = Registry(loader[1], None)
    for change in (
        lambda: registry.check("x", str(RUNS / "lora"), False),
        lambda: registry.load("x", str(RUNS / "lora"), False),
        lambda: registry.unload("lora"),
    ):
        with pytest.raises(ApiError, match="this server loads no runs") as refusal:
            change()
        assert refusal.value.status == 403


def test_pages_of_other_sites_cannot_load(server):
    response = httpx.post(
        f"{server.url}/v1/unload_lora_adapter",
        json={"lora_name": "lora"},
        headers={"origin": "http://evil.example"},
    )
    assert response.status_code == 403
    assert names(server) == ["base", "lora"]
