"""The thread that decodes, one request after another, and the queue before it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trainer.data.stops import Stops
from trainer.decoding.streaming import Pass, Streaming, Token
from trainer.serving import echo
from trainer.serving.errors import ApiError
from trainer.serving.events import Done, End, Event, Piece, Placed, Usage
from trainer.serving.models import Served
from trainer.serving.prompts import Prompt
from trainer.serving.text import Text
from trainer.session import failures
from trainer.training.out_of_memory import out_of_memory

log = logging.getLogger("trainer")

CLOSED = "the server is shutting down"
JOIN_SECONDS = 10.0


class _Ended(Exception):
    """The answer needs no further pass."""


@dataclass(eq=False)
class Job:
    """A request in the queue. `emit` takes its events, in the worker's thread; the last one is an
    End or an ApiError, unless it was cancelled."""

    model: Served
    prompt: Prompt
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Decode the answer."""
        Answering(self).decode()

    def explained(self, error: BaseException) -> ApiError:
        """Return an error as a response."""
        return explained(error)


@dataclass(eq=False)
class Task:
    """Work between two requests, while no other thread uses the models. Its last event is Done or
    an ApiError; an error with an explanation is the client's, with status 400."""

    do: Callable[[], Any]
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Run the task, and emit its result."""
        self.emit(Done(self.do()))

    def explained(self, error: BaseException) -> ApiError:
        """Return an error as a response."""
        if isinstance(error, ApiError) or out_of_memory(error):
            return explained(error)
        known = failures.explained(error, {}, command=True)
        return ApiError(400, known[0]) if known else explained(error)


class Worker:
    """Decodes jobs and does tasks in their order, in a thread of its own."""

    def __init__(self, most_waiting: int):
        self.most_waiting = most_waiting
        self.waiting: deque[Job | Task] = deque()
        self.current: Job | Task | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def submit(self, *jobs: Job | Task) -> None:
        """Put jobs into the queue, all or none.

        Raises:
            ApiError: the queue is full, or the server stops.
        """
        with self.changed:
            if self.closed:
                raise ApiError(503, CLOSED)
            if len(self.waiting) + len(jobs) > self.most_waiting:
                raise ApiError(
                    429,
                    f"{len(self.waiting)} requests are waiting, which is the most: send the request"
                    " again later, or start the server with a larger queue=",
                    code="queue_full",
                )
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, job: Job | Task) -> None:
        """Take a job out of the queue, or stop its decoding before the next pass."""
        job.cancelled.set()
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self) -> None:
        """Refuse all jobs, and end the thread after its current pass."""
        with self.changed:
            self.closed = True
            refused, self.waiting = [*self.waiting], deque()
            if self.current is not None:
                self.current.cancelled.set()
                refused.append(self.current)
            self.changed.notify()
        for job in refused:
            job.emit(ApiError(503, CLOSED))

    def join(self) -> None:
        """Wait for the end of the thread, at most JOIN_SECONDS."""
        self.thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting)
                if self.closed:
                    return
                job = self.current = self.waiting.popleft()
            try:
                if not job.cancelled.is_set():
                    job.work()
            except BaseException as error:  # whatever it is, the next request is answered
                job.emit(job.explained(error))
            finally:
                with self.changed:
                    self.current = None


class Answering:
    """One job while it is decoded."""

    def __init__(self, job: Job):
        self.job, self.prompt, self.model = job, job.prompt, job.model
        # a continued text keeps the space before its first token
        before = self.prompt.ids if self.prompt.continues else ()
        self.text = Text(self.model.tokenizer, self.prompt.ends, before=before)
        self.usage = Usage(len(self.prompt.ids))
        self.placed: list[Placed] = []  # tokens whose text was not sent yet
        self.sent = 0  # characters
        self.shift = 0  # characters of the prompt before the answer
        self.reason = "length"
        self.started = 0.0

    def decode(self) -> None:
        """Decode the answer and emit its events."""
        stops = Stops([*self.model.stops])
        ids = torch.tensor(self.prompt.ids, device=self.model.device)
        decoder = Streaming(
            self.model.target,
            self.model.drafter(self.prompt.repeats),
            self.prompt.max_tokens,
            stops,
            self.prompt.sampling,
            self.model.strategy,
            self.take,
            self.prompt.top,
            self.take_prompt if self.prompt.echo else None,
        )
        self.started = time.perf_counter()
        try:
            if self.prompt.max_tokens:
                decoder.decode([ids])
            else:
                decoder.read(ids)
        except _Ended:
            if self.job.cancelled.is_set():
                return
        self.text.close()
        if self.reason == "length" and self.text.ended:
            self.reason = "stop"
        self.send(len(self.text.text), last=True)
        self.job.emit(End(self.reason, self.usage))

    def take_prompt(self, tokens: list[Token]) -> None:
        """Emit the prompt's own text and tokens, and end there if no answer is to follow."""
        text, offsets = echo.text_and_offsets(self.model.tokenizer, self.prompt)
        placed = [Placed(*pair) for pair in zip(tokens, offsets, strict=True)]
        self.shift = len(text)
        if not self.prompt.max_tokens:
            self.usage = replace(self.usage, passes=1)
        self.job.emit(Piece(text, placed, self.usage, echo=True))
        if not self.prompt.max_tokens:
            raise _Ended

    def take(self, done: Pass) -> None:
        """Take a pass's tokens, and emit the text that is sure."""
        if self.job.cancelled.is_set():
            raise _Ended
        accepted = sum(token.drafted for token in done.tokens)
        before = self.usage
        self.usage = Usage(
            before.prompt_tokens,
            before.tokens + len(done.tokens),
            before.passes + 1,
            before.drafted + done.drafted,
            before.accepted + accepted,
            time.perf_counter() - self.started,
        )
        for token in done.tokens:
            if token.id in self.model.stops:
                self.reason = "stop"
                break
            self.placed.append(Placed(token, len(self.text.text)))
            self.text.add(token.id)
            if self.text.ended:
                self.reason = "stop"
                raise _Ended
        self.send(self.text.sure)

    def send(self, end: int, last: bool = False) -> None:
        """Emit the text up to `end`, with the tokens that begin before it; the `last` time with all
        but those that a stop string cut off."""
        whole = last and not self.text.ended
        ready = [placed for placed in self.placed if whole or placed.offset < end]
        text = self.text.text[self.sent : end]
        if text or ready:
            self.placed = self.placed[len(ready) :]
            self.sent = end
            moved = [replace(placed, offset=placed.offset + self.shift) for placed in ready]
            self.job.emit(Piece(text, moved, self.usage))


def explained(error: BaseException) -> ApiError:
    """Return an error of the worker as a response. One without an explanation is logged."""
    if isinstance(error, ApiError):
        return error
    if out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ApiError(
            503, "out of memory: shorten the prompt, or lower max_tokens", code="out_of_memory"
        )
    known = failures.explained(error, {}, command=True)
    if known is None:
        log.error("a request failed", exc_info=error)
    return ApiError(500, f"the request failed: {known[0] if known else type(error).__name__}")
