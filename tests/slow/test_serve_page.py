"""The chat page in a headless Chromium: a question is typed, a button is clicked, and both answers
are there, with drafted tokens coloured. Skipped where there is no Chromium."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import time

import pytest

from tests.serving.test_server import perturbed
from tests.toys.serving import RUNS, loaded, running

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page:
    """A tab, driven through the DevTools protocol on a pipe."""

    def __init__(self, write, read):
        self.write, self.read, self.count, self.session = write, read, 0, None
        self.rest, self.events = b"", []

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def next(self):
        while b"\0" not in self.rest:
            part = os.read(self.read, 1 << 16)
            assert part, "Chromium has ended"
            self.rest += part
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def run(self, script):
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script, seconds=60):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.1)

    def click(self, selector):
        place = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left",
                clickCount=1,
            )  # fmt: skip


@contextlib.contextmanager
def opened(url, folder):
    """A Chromium with a page."""
    there, write = os.pipe()
    read, back = os.pipe()

    def fds():  # Chromium reads commands from 3 and answers on 4
        os.dup2(there, 13)
        os.dup2(back, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    process = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
         "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}", "about:blank"],
        preexec_fn=fds, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(there)
    os.close(back)
    page = Page(write, read)
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        yield page
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_question_is_answered_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(RUNS.parent)
    models = perturbed(loaded("lora", drafter="lookup"))
    with running(models) as up, opened(f"{up.url}/", tmp_path / "profile") as page:
        page.until("document.querySelectorAll('.pane select').length === 2")
        chosen = "[...document.querySelectorAll('.pane select')].map((each) => each.value)"
        assert page.run(chosen) == ["base", "lora"]
        page.run("document.getElementById('tokens').value = 60")
        page.run("document.getElementById('prompt').focus()")
        page.call("Input.insertText", text="<b>1+1=</b>" + "ab" * 20)
        page.click("#send")
        page.until("document.getElementById('send').disabled === false")
        turns = page.run(
            "[...document.querySelectorAll('.pane')]"
            ".map((pane) => pane.querySelectorAll('.turn')[1].textContent)"
        )
        for name, text in zip(("base", "lora"), turns, strict=True):
            messages = [{"role": "user", "content": "<b>1+1=</b>" + "ab" * 20}]
            answer = up.client().chat.completions.create(
                model=name, messages=messages, temperature=0, max_tokens=60, seed=0,
                extra_body={"graft_tokens": True},
            )  # fmt: skip
            assert text == answer.choices[0].message.content.replace("\r\n", "\n")
            marked = any(token["drafted"] for token in answer.graft["answer"])
            shown = page.run(
                f"document.querySelectorAll('.pane')[{['base', 'lora'].index(name)}]"
                ".querySelectorAll('.drafted').length"
            )
            assert (shown > 0) == marked
        assert page.run("document.querySelectorAll('.pane b, .error').length") == 0
        facts = page.run("[...document.querySelectorAll('.facts')].map((each) => each.textContent)")
        assert all("60 tokens, " in fact and "tokens/s" in fact for fact in facts)
        picture = page.call("Page.captureScreenshot")["data"]
        (tmp_path / "page.png").write_bytes(base64.b64decode(picture))
        assert (tmp_path / "page.png").stat().st_size > 10_000
        urls = {
            event["params"]["request"]["url"]
            for event in page.events
            if event.get("method") == "Network.requestWillBeSent"
        }
        assert all(url.startswith(up.url) for url in urls)
        refused = [
            event["params"]["entry"]["text"]
            for event in page.events
            if event.get("method") == "Log.entryAdded"
            and "Content Security Policy" in event["params"]["entry"]["text"]
        ]
        assert refused == []


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_notices_runs_that_come_and_go(tmp_path, monkeypatch):
    monkeypatch.chdir(RUNS.parent)
    models = perturbed(loaded("lora", drafter="lookup"))
    with running(models) as up, opened(f"{up.url}/", tmp_path / "profile") as page:
        page.until("document.querySelectorAll('.pane select').length === 2")
        listed = (
            "[...document.querySelectorAll('.pane select')[1].options].map((each) => each.value)"
        )
        assert page.run(listed) == ["base", "lora"]
        models["newer"] = dataclasses.replace(models["lora"], name="newer")
        page.run("window.dispatchEvent(new Event('focus'))")
        page.until(f"{listed}.length === 3")
        assert page.run(listed) == ["base", "lora", "newer"]
        assert page.run("document.querySelectorAll('.pane select')[1].value") == "lora"
        del models["newer"], models["lora"]
        page.run("document.querySelectorAll('.pane select')[0].focus()")
        page.until(f"{listed}.length === 1")
        assert page.run("document.querySelectorAll('.pane select')[1].value") == "base"
