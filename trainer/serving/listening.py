"""The socket, and the server's life: it listens until Ctrl-C."""

from __future__ import annotations

import errno
import socket
from typing import Any

import uvicorn

from trainer.config.errors import ConfigError
from trainer.serving.app import Service
from trainer.serving.models import Loader, Served
from trainer.serving.registry import Registry
from trainer.serving.worker import Worker


class Server(uvicorn.Server):
    """uvicorn's server. Requests in progress end before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, as uvicorn does."""
        self.worker.close()
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket with an address, which does not listen yet: a port that is taken is reported
    before a model is loaded.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host={host}: {error.strerror or error}") from None
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            fix = "another program uses it. Choose another port=, or port=0 for any that is free"
        else:
            fix = f"{error.strerror}. Choose another host= or port="
        raise ConfigError(f"host={host} port={port}: {fix}") from None
    return opened


def make_server(
    models: dict[str, Served],
    host: str,
    api_key: str | None,
    default_tokens: int,
    most_waiting: int,
    loader: Loader | None = None,
) -> Server:
    """Return a server with a worker, both not started. Without a loader it loads no further
    runs."""
    worker = Worker(most_waiting)
    app: Any = Service(Registry(models, loader), worker, default_tokens).app(host, api_key)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config, worker)


def serve(server: Server, opened: socket.socket) -> None:
    """Answer requests until the process is asked to stop."""
    server.worker.start()
    try:
        server.run(sockets=[opened])
    finally:
        server.worker.close()
        server.worker.join()
        opened.close()
