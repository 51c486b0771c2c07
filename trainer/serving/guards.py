"""Checks of who may send a request, before any route.

A web page that a user visits can send requests to this machine. With DNS rebinding its own name
leads here, so a Host that is neither an address nor a name of this server is refused, and an Origin
that is another page's. An address cannot be rebound.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from trainer.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/health")  # need no key; the page asks for it
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guards:
    """Refuses requests of strangers, and adds headers to each response."""

    def __init__(self, app: Any, host: str, api_key: str | None):
        self.app, self.api_key = app, api_key
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)  # type: ignore[no-any-return]

        async def sends(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            response = JSONResponse(error.body, error.status, error.headers)
            return await response(scope, receive, sends)
        await self.app(scope, receive, sends)

    def check(self, scope: Scope) -> None:
        """Check the Host, the Origin and the key of a request.

        Raises:
            ApiError: one of them is not allowed.
        """
        headers = {key.decode("latin-1"): v.decode("latin-1") for key, v in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.allows(host):
            raise ApiError(
                403,
                f"Host: {host[:100]!r} is no name of this server. Known: an address,"
                f" {', '.join(sorted(self.names))}",
                code="host",
            )
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                403, f"Origin: {origin[:100]!r}: pages of other servers may not", code="origin"
            )
        if self.api_key is None or scope["path"] in OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode(), self.api_key.encode()
        ):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def allows(self, host: str) -> bool:
        """Return whether a Host header, with or without a port, names this server."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True
