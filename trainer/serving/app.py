"""The routes of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from trainer.serving import prompts, requests
from trainer.serving.answers import Answer, event, listed
from trainer.serving.errors import ApiError
from trainer.serving.events import Done, End, Event, Piece
from trainer.serving.guards import Guards
from trainer.serving.models import Served
from trainer.serving.prompts import Prompt
from trainer.serving.registry import Registry
from trainer.serving.requests import (
    ChatSettings,
    LoadSettings,
    Settings,
    TextSettings,
    UnloadSettings,
)
from trainer.serving.worker import Job, Task, Worker

MOST_BYTES = 2 << 20  # of a request's body
BODY_SECONDS = 60  # for a client to send it
WAITING_SECONDS = 15  # between signs of life of a stream that waits
PAGE = Path(__file__).with_name("page.html")
GONE = Response(status_code=499)  # nobody reads it: the client has gone


class Service:
    """The models, the worker, and the handlers of the routes."""

    def __init__(self, registry: Registry, worker: Worker, default_tokens: int):
        self.registry, self.worker, self.default_tokens = registry, worker, default_tokens
        self.created = int(time.time())
        self.page = PAGE.read_text("utf-8")

    def app(self, host: str, api_key: str | None) -> Starlette:
        """Return the application."""
        routes = [
            Route("/", self.show),
            Route("/health", self.health),
            Route("/v1/models", self.list),
            Route("/v1/models/{name:path}", self.one),
            Route("/v1/chat/completions", self.complete_chat, methods=["POST"]),
            Route("/v1/completions", self.complete_text, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]
        handlers: Any = {ApiError: _refused, HTTPException: _no_route, Exception: _failed}
        guards = Middleware(Guards, host=host, api_key=api_key)
        return Starlette(routes=routes, middleware=[guards], exception_handlers=handlers)

    async def show(self, request: Request) -> Response:
        """Return the chat page."""
        return HTMLResponse(self.page, headers={"content-security-policy": policy(self.page)})

    async def health(self, request: Request) -> Response:
        """Return the number of requests that wait."""
        return JSONResponse({"status": "ok", "waiting": len(self.worker.waiting)})

    async def list(self, request: Request) -> Response:
        """Return the models."""
        return JSONResponse({"object": "list", "data": listed(self.registry.models, self.created)})

    async def one(self, request: Request) -> Response:
        """Return one model."""
        model = prompts.find(self.registry.models, request.path_params["name"])
        return JSONResponse(listed({model.name: model}, self.created)[0])

    async def complete_chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self.answer(request, ChatSettings)

    async def complete_text(self, request: Request) -> Response:
        """Continue a text."""
        return await self.answer(request, TextSettings)

    async def answer(self, request: Request, kind: type[Settings]) -> Response:
        """Put a request into the queue and return its answer, whole or as a stream."""
        settings = requests.parse(kind, await _body(request))
        model = prompts.find(self.registry.models, settings.model)
        answer = Answer(model, settings)
        jobs = []
        for prompt in self._prompts(model, settings):
            events = Events()
            jobs.append((Job(model, prompt, events.put), events))
        self.worker.submit(*(job for job, _ in jobs))
        if settings.stream:
            return Stream(self.worker, jobs, answer)
        answers = []
        try:
            for job, events in jobs:
                pieces = [item async for item in _each(self.worker, job, events, request.receive)]
                end = pieces.pop() if pieces else None
                if isinstance(end, ApiError):
                    raise end
                if not isinstance(end, End):
                    return GONE
                answers.append(([item for item in pieces if isinstance(item, Piece)], end))
        finally:
            for job, _ in jobs:
                self.worker.cancel(job)
        return JSONResponse(answer.whole(answers))

    def _prompts(self, model: Served, settings: Settings) -> Sequence[Prompt]:
        read = prompts.prompts(model, settings, self.default_tokens)
        if len(read) > self.worker.most_waiting:
            raise ApiError(
                400,
                f"prompt has {len(read)} texts, expected at most {self.worker.most_waiting}: send"
                " them in several requests, or start the server with a larger queue=",
                "prompt",
            )
        return read

    async def load(self, request: Request) -> Response:
        """Load a run, between two requests."""
        settings = requests.parse_plain(LoadSettings, await _body(request))
        self.registry.check(settings.lora_name, settings.lora_path, settings.load_inplace)
        events = Events()
        task = Task(
            lambda: self.registry.load(
                settings.lora_name, settings.lora_path, settings.load_inplace
            ),
            events.put,
        )
        self.worker.submit(task)
        async for item in _each(self.worker, task, events, request.receive):
            if isinstance(item, ApiError):
                raise item
            if isinstance(item, Done):
                return PlainTextResponse(str(item.result))
        return GONE

    async def unload(self, request: Request) -> Response:
        """Take a run out of the list. Requests that it has already got are answered."""
        settings = requests.parse_plain(UnloadSettings, await _body(request))
        return PlainTextResponse(self.registry.unload(settings.lora_name))


class Events:
    """A job's events, from the worker's thread to the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.get = self.queue.get

    def put(self, item: Event) -> None:
        """Hand an event to the loop. A loop that has ended needs none."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            return


class Stream(Response):
    """An answer as server-sent events, one choice after another. Its decoding ends when the client
    goes."""

    def __init__(self, worker: Worker, jobs: Sequence[tuple[Job, Events]], answer: Answer):
        super().__init__()
        self.worker, self.jobs, self.answer = worker, jobs, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for part in self._parts(receive):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:  # the client has gone
            pass
        finally:
            for job, _ in self.jobs:
                self.worker.cancel(job)

    async def _parts(self, receive: Any) -> AsyncIterator[bytes]:
        for chunk in self.answer.first():
            yield event(chunk)
        ends: list[End] = []
        for index, (job, events) in enumerate(self.jobs):
            async for item in _each(self.worker, job, events, receive):
                if item is None:
                    yield b": waiting\n\n"
                elif isinstance(item, Piece):
                    yield event(self.answer.piece(item, index))
                elif isinstance(item, End):
                    ends.append(item)
                    for chunk in self.answer.last(item, index):
                        yield event(chunk)
                elif isinstance(item, ApiError):
                    yield event(item.body)
            if len(ends) == index:  # it failed, or the client has gone
                return
        for chunk in self.answer.cost(ends):
            yield event(chunk)
        yield event("[DONE]")


async def _each(
    worker: Worker, job: Job | Task, events: Events, receive: Any
) -> AsyncIterator[Event | None]:
    """Yield a job's events up to the last one, and None after each WAITING_SECONDS without any. It
    ends early if the client goes, and then the job is cancelled."""
    gone = asyncio.ensure_future(_disconnected(receive))
    waiting: asyncio.Future[Event] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(events.get())
            both: set[asyncio.Future[Any]] = {gone, waiting}
            done, _ = await asyncio.wait(
                both, timeout=WAITING_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if waiting in done:
                item, waiting = waiting.result(), None
                yield item
                if not isinstance(item, Piece):
                    return
            elif gone in done:
                return
            else:
                yield None
    finally:
        worker.cancel(job)
        gone.cancel()
        if waiting is not None:
            waiting.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: it is not JSON by its type, too large, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of a stranger's page cannot send this type
        raise ApiError(415, f"Content-Type: {kind[:60]!r}, expected application/json")
    length = request.headers.get("content-length", "")
    parts, size = [], int(length) if re.fullmatch(r"\d{1,18}", length) else 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if size <= MOST_BYTES:
                size = 0
                async for part in request.stream():
                    size += len(part)
                    if size > MOST_BYTES:
                        break
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    if size > MOST_BYTES:
        raise ApiError(
            413,
            f"the body has more than {MOST_BYTES:,} bytes: shorten the prompt",
            code="too_large",
        )
    return b"".join(parts)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    # Starlette raises the error again afterwards, and uvicorn logs it
    return JSONResponse(ApiError(500, f"the request failed: {type(error).__name__}").body, 500)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}"
    message = (
        f"{what}: there is no such address. Known: /v1/models, /v1/chat/completions,"
        " /v1/completions, /v1/load_lora_adapter, /v1/unload_lora_adapter"
        if error.status_code == 404
        else f"{what}: {error.detail}"
    )
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


def policy(page: str) -> str:
    """Return the page's Content-Security-Policy: its own script and style, and this server."""

    def digest(tag: str) -> str:
        body = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')};"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
