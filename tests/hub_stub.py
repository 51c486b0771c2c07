"""The Hub's API on the loopback interface, as far as huggingface_hub asks for it to create a
repository and to commit files, weights through LFS.

    with Hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)

`repos` holds what arrived: {name: {"private": bool, "files": {path: bytes}}}. `status` other than
200 is what every request gets.
"""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """The server, in a thread of this process."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}  # of LFS, by digest
        self.requests: list[str] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            """Answers one request."""

            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def body(self) -> bytes:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    parts = []
                    while size := int(self.rfile.readline().strip(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self) -> None:
                body = self.body()
                hub.requests.append(f"{self.command} {self.path}")
                status, content = hub.answer(self.command, self.path, body)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, command: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return (status, content) of a request."""
        if self.status != 200:
            return self.status, {"error": "as the test wants"}
        if command == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/validate-yaml":  # of a card
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos.setdefault(name, {"private": private, "files": {}})
            return 200, {"url": f"{self.url}/{name}", "id": name}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2]).removesuffix(".git")
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in files
            ]  # fmt: skip
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return 200, self.commit(name, body)
        if command == "GET" and path.startswith("/api/models/"):
            return 200, {"id": name, "sha": "0" * 40, "siblings": []}
        return 404, {"error": f"no such address: {path}"}

    def commit(self, name: str, body: bytes) -> dict[str, Any]:
        """Store the files of a commit."""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[name]["files"][value["path"]] = self.stored[value["oid"]]
        address = f"{self.url}/{name}"
        return {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40,
                "success": True, "pullRequestUrl": None}  # fmt: skip
