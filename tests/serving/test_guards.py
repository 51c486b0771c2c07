"""Requests of other pages and under other names are refused before any route."""

from __future__ import annotations

import socket

import pytest

from trainer.serving.errors import ApiError
from trainer.serving.guards import Guards


def status(headers, api_key=None, path="/v1/models"):
    """The status of the refusal, None if the request is allowed."""
    pairs = [(name.encode(), text.encode("latin-1")) for name, text in headers.items()]
    try:
        Guards(None, "127.0.0.1", api_key).check({"path": path, "headers": pairs})
    except ApiError as error:
        return error.status
    return None


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.0.7:8000", True),  # an address cannot be rebound
        (socket.gethostname(), True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@127.0.0.1x", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_a_host_names_this_server(host, allowed):
    assert status({"host": host}) == (None if allowed else 403)
    assert status({}) == 403


def test_a_named_host_is_allowed():
    assert Guards(None, "box.lan", None).allows("box.lan:80")
    assert not Guards(None, "box.lan", None).allows("lan")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8000", None),
        ("http://evil.example", 403),
        ("http://localhost:9000", 403),  # another server of this machine
        ("null", 403),
    ],
)
def test_another_pages_origin_is_refused(origin, expected):
    assert status({"host": "localhost:8000", "origin": origin}) == expected


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({}, 401),
        ({"authorization": "Bearer secret"}, None),
        ({"authorization": "bearer secret"}, None),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Bearer secretx"}, 401),
        ({"authorization": "secret"}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer \xe9"}, 401),
    ],
)
def test_a_key_is_needed_where_one_is_set(sent, expected):
    headers = {"host": "localhost"} | sent
    assert status(headers, "secret") == expected
    assert status(headers) is None
    assert status(headers, "secret", "/") is None  # the page, which asks for the key
    assert status(headers, "secret", "/health") is None
