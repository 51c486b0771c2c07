"""The check of the pins against a database of advisories."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from scripts import audit
from tests.conftest import ROOT


@pytest.fixture
def database(monkeypatch):
    """A database on this machine that knows one advisory; set `answer` to another function."""

    class Server(BaseHTTPRequestHandler):
        answer = staticmethod(
            lambda queries: [
                {"vulns": [{"id": "PYSEC-1"}]} if query["package"]["name"] == "torch" else {}
                for query in queries
            ]
        )

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"results": Server.answer(content["queries"])}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("GRAFT_OSV", f"http://127.0.0.1:{server.server_port}/")
    yield Server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.long
def test_every_pin_is_asked_about(database, capsys):
    count = len(audit.pins((ROOT / "constraints.txt").read_text()))
    assert audit.main([]) == 1
    output = capsys.readouterr().out
    assert ": PYSEC-1\n" in output
    assert f"{count} pins asked, 1 with advisories" in output
    database.answer = staticmethod(lambda queries: [{}] * len(queries))
    assert audit.main([]) == 0


@pytest.mark.long
def test_what_was_not_asked_is_not_green(database, monkeypatch, capsys):
    database.answer = staticmethod(lambda queries: [])
    assert audit.main([]) == audit.NOT_ASKED
    monkeypatch.setenv("GRAFT_OSV", "http://127.0.0.1:9/")
    assert audit.main([]) == audit.NOT_ASKED
    assert audit.main(["--offline-ok"]) == 0
    assert "This says nothing about" in capsys.readouterr().out


def test_a_line_that_pins_nothing():
    assert audit.pins("# x\ntorch==2.13.0+cpu  # why\n\na.b==1!2\n") == {
        "torch": "2.13.0",
        "a.b": "1!2",
    }
    with pytest.raises(ValueError, match="'torch>=2' is no pin"):
        audit.pins("torch>=2")
