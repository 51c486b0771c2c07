"""A server of `graft serve` in a thread of the test's process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from tests.conftest import ROOT
from trainer.config.decoding_options import DrafterOptions
from trainer.decoding.speculative import Strategy
from trainer.serving import listening, models

RUNS = ROOT / "tests" / "data" / "runs_0.1" / "runs"  # of one tiny base


@dataclass
class Running:
    """A server, its address and its models."""

    server: Any
    url: str
    models: dict[str, Any]

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)


def loaded(*names: str, drafter: str | None = "run", merges: bool = True) -> dict[str, Any]:
    """Models of runs of an earlier version, by the names of their folders. Without `merges` they
    keep their adapters, as on a GPU."""
    options = None if drafter is None else DrafterOptions(drafter=drafter)
    with pytest.MonkeyPatch.context() as patch:
        if not merges:
            patch.setattr(models, "merge_for_good", lambda model: 0)
        return models.Loader(options, Strategy()).start([str(RUNS / name) for name in names])


@contextlib.contextmanager
def running(
    served: dict[str, Any],
    api_key: str | None = None,
    queue: int = 64,
    loader: models.Loader | None = None,
) -> Iterator[Running]:
    """Serve models on a free port until the context ends."""
    opened = listening.bound("127.0.0.1", 0)
    server = listening.make_server(served, "127.0.0.1", api_key, 64, queue, loader)
    thread = threading.Thread(target=listening.serve, args=(server, opened), daemon=True)
    thread.start()
    try:
        yield Running(server, f"http://127.0.0.1:{opened.getsockname()[1]}", served)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
