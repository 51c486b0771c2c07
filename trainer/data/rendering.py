"""Examples rendered in their order, by this process or by several worker processes."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tasks.reading import Bad, DataError
from tasks.task import Conversation, Example
from trainer.data.chat_template import Refused
from trainer.data.render import Rendered, Renderer

TOGETHER = 256  # examples whose texts are tokenised in one call
TOO_DEEP = "its values are nested too deeply"
# A worker process keeps its renderer between chunks: pickling it with each chunk would take longer
# than tokenising.
_renderer: Renderer | None = None


def _start_worker(renderer: Renderer) -> None:
    global _renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _renderer = renderer


def _render_chunk(chunk: list[Example | Bad]) -> list[tuple[str, Rendered | str]]:
    assert _renderer is not None
    _renderer.prepare(chunk)
    return [render_one(example, _renderer) for example in chunk]


def render_one(example: Example | Bad, renderer: Renderer) -> tuple[str, Rendered | str]:
    """Return (where, what the row became), or (where, the reason why it cannot be used)."""
    if isinstance(example, Bad):
        return example.where, example.reason
    try:
        row = renderer.render(example)
    except Refused as refusal:
        return example.where, str(refusal)
    except RecursionError:
        return example.where, TOO_DEEP
    for sequence in row.sequences:
        if not sequence.ids:
            return example.where, "it has no tokens"
        if renderer.kind != "label" and not any(sequence.trained[1:]):
            return example.where, "it has no trained token"
    return example.where, row


def rendered(
    examples: Iterable[Example | Bad], renderer: Renderer, processes: int
) -> Iterator[tuple[str, Rendered | str]]:
    """Yield `render_one` of each example, in their order. With `processes` above 1, that many
    worker processes render them.

    Raises:
        DataError: a worker process was killed.
    """
    if processes <= 1:
        for chunk in chunks(examples, TOGETHER):
            renderer.prepare(chunk)
            for example in chunk:
                yield render_one(example, renderer)
        return
    # Not multiprocessing.Pool: it waits forever for the results of a process that was killed.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_worker, (renderer,)
    )
    shares: deque[Future[list[tuple[str, Rendered | str]]]] = deque()
    try:
        for chunk in chunks(examples, TOGETHER):
            shares.append(pool.submit(_render_chunk, chunk))
            if len(shares) > 2 * processes:
                yield from shares.popleft().result()
        while shares:
            yield from shares.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of the {processes} processes that tokenise the rows was killed from outside, most"
            " likely out of memory: set tokenise_processes=1, or give the job more memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Split items into lists of `size`; the last one may be shorter."""
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def special_text(examples: Iterable[Example | Bad], tokenizer: Any) -> int:
    """Return the number of conversations whose messages contain the text of a special token, which
    the tokenizer reads as that token."""
    pattern = re.compile(
        "|".join(re.escape(token) for token in tokenizer.all_special_tokens if token.strip())
        or "(?!)"
    )
    return sum(
        isinstance(example, Conversation)
        and any(pattern.search(message["content"]) for message in example.messages)
        for example in examples
    )
