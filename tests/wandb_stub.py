"""W&B's server on the loopback interface, as far as wandb-core asks for it: a run's life, its
files, its resuming and `wandb sync`.

    with Stub() as server:
        ... WANDB_BASE_URL=server.url ...
        server.history("RUN_ID")

`server.mode` is how it answers from then on: well, refuse (no connection), error (500), hang (the
connection is taken, and no answer ever comes). What it was sent is kept: `received` holds every
body, `runs` what they amount to. Artifacts, and whatever else of the schema wandb-core asks for,
are answered with an error, as an older server would.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Run:
    """What the server knows of a run."""

    display: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    lines: dict[str, list[str]] = field(default_factory=dict)  # of each streamed file, by its name
    files: dict[str, bytes] = field(default_factory=dict)  # uploaded whole
    summary: dict[str, Any] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    starts: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, allow_reuse_address = True, False, True

    def handle_error(self, *_: Any) -> None:
        pass  # clients end without a farewell


class Stub:
    """The server, in a thread of this process."""

    def __init__(self) -> None:
        self.mode = "well"
        self.dies_after: int | None = None  # requests, after which it refuses
        self.runs: dict[str, Run] = {}
        self.received: list[bytes] = []
        self.operations: list[str] = []
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = self._listen(0)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if self.mode != "refuse":
            self._close()

    def become(self, mode: str) -> None:
        """Answer so from now on."""
        if mode == "refuse" and self.mode != "refuse":
            self._close()
        if self.mode == "refuse" and mode != "refuse":
            self._server = self._listen(self.port)
        if mode != "hang":
            self._released.set()
            self._released = threading.Event()
        self.mode = mode

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows that a run has logged."""
        return [json.loads(line) for line in self.runs[run].lines.get("wandb-history.jsonl", [])]

    def _listen(self, port: int) -> ThreadingHTTPServer:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                stub._answer(self)

            do_GET = do_PUT = do_POST

        server = self._bound(port, Handler)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return server

    def _bound(self, port: int, handler: type[BaseHTTPRequestHandler]) -> _Server:
        """Return a server on a port, which another process's connection may hold for a moment."""
        for _ in range(100):
            try:
                return _Server(("127.0.0.1", port), handler)
            except OSError:
                time.sleep(0.1)
        return _Server(("127.0.0.1", port), handler)

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self._lock:
            dies = (
                self.dies_after is not None
                and len(self.received) >= self.dies_after
                and self.mode == "well"
            )
            if dies:
                self.mode = "error"  # before the thread, which ends with another mode
        if dies:
            threading.Thread(target=self.become, args=("refuse",)).start()
        if self.mode == "hang":
            self._released.wait()
            request.close_connection = True
            return
        # a connection from before outlives the listening socket
        if self.mode in ("error", "refuse"):
            return self._send(request, 500, {"error": "out of order"}, close=self.mode == "refuse")
        with self._lock:
            self.received.append(body)
            status, answer = 200, {}
            if request.path == "/graphql":
                asked = json.loads(body)
                answer = self._graphql(asked.get("query", ""), asked.get("variables") or {})
            elif actual := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", request.path):
                self._stream(self.runs[actual[1]], json.loads(body))
            elif actual := re.match(r"/upload/([^/]+)/(.+)", request.path):
                self.runs[actual[1]].files[actual[2]] = body
            elif actual := re.match(r"/artifact/(\d+)/(.+)", request.path):
                self.artifacts[int(actual[1])]["files"][actual[2]] = body
            else:
                status = 404
        return self._send(request, status, answer)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, answer: Any, close: bool = False
    ) -> None:
        text = json.dumps(answer).encode()
        try:
            request.send_response(status)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(text)))
            if close:
                request.send_header("Connection", "close")
            request.end_headers()
            request.wfile.write(text)
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
        if close:
            request.close_connection = True

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = named[1] if named else ""
        self.operations.append(name)
        if name == "Viewer":
            return {
                "data": {
                    "viewer": {
                        "id": "v",
                        "entity": "me",
                        "username": "me",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            }
        if name == "ServerFeaturesQuery":
            return {"data": {"serverInfo": {"features": []}}}
        if name == "RunResumeStatus":
            return {
                "data": {
                    "model": {
                        "id": "p",
                        "name": "graft",
                        "entity": {"id": "e", "name": "me"},
                        "bucket": self._bucket(variables),
                    }
                }
            }
        if name == "UpsertBucket":
            return {"data": {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}}
        if name == "CreateRunFiles":
            run = variables.get("run") or variables.get("runName")
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{run}/{file}"}
                for file in variables["files"]
            ]
            return {"data": {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}}
        if name in (
            "ArtifactType",
            "CreateArtifact",
            "CreateArtifactManifest",
            "CreateArtifactFiles",
            "UpdateArtifactManifest",
            "CommitArtifact",
        ):
            return {"data": self._artifact(name, variables)}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"data": {"notifyScriptableRunAlert": {"success": True}}}
        return {"errors": [{"message": f"this server does not know {name}"}]}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], Run())
        run.starts += 1
        for ours, theirs in (
            ("display", "displayName"),
            ("group", "groupName"),
            ("job_type", "jobType"),
            ("notes", "notes"),
            ("commit", "commit"),
        ):
            setattr(run, ours, variables.get(theirs) or getattr(run, ours))
        run.tags = variables.get("tags") or run.tags
        run.config |= json.loads(variables.get("config") or "{}")
        return {
            "id": base64.b64encode(variables["name"].encode()).decode(),
            "name": variables["name"],
            "displayName": run.display,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "historyLineCount": self._count(run, "wandb-history.jsonl"),
            "project": {
                "id": "p",
                "name": variables.get("project") or "graft",
                "entity": {"id": "e", "name": "me"},
            },
        }

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        if run is None:
            return None
        history, events = (
            run.lines.get("wandb-history.jsonl", []),
            run.lines.get("wandb-events.jsonl", []),
        )
        return {
            "id": variables["name"],
            "name": variables["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.display,
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "config": json.dumps(run.config),
            "tags": run.tags,
            "wandbConfig": '{"t": 1}',
            "stopped": False,
        }

    def _artifact(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables.get("input") or variables
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            number = str(len(self.artifacts))
            made = {
                "name": asked["artifactCollectionName"],
                "type": asked["artifactTypeName"],
                "run": asked["runName"],
            }
            self.artifacts.append(made | {"files": {}, "committed": False})
            latest = {
                "id": number,
                "state": "PENDING",
                "artifactSequence": {"latestArtifact": None},
            }
            return {"createArtifact": {"artifact": latest}}
        if name in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            number = asked.get("artifactID") or asked["artifactManifestID"]
            kind = name[0].lower() + name[1:]
            file = {
                "id": number,
                "uploadUrl": f"{self.url}/artifact/{number}/manifest.json",
                "uploadHeaders": [],
            }
            return {kind: {"artifactManifest": {"id": number, "file": file}}}
        if name == "CommitArtifact":
            self.artifacts[int(asked["artifactID"])]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}
        files = [
            {
                "node": {
                    "storagePath": None,
                    "uploadUrl": f"{self.url}/artifact/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in asked["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": files}}}

    @staticmethod
    def _count(run: Run, name: str) -> int:
        return len(run.lines.get(name, []))

    @staticmethod
    def _stream(run: Run, posted: dict[str, Any]) -> None:
        for name, part in (posted.get("files") or {}).items():
            if name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
                continue
            lines = run.lines.setdefault(name, [])
            lines[part["offset"] :] = part["content"]
        if "exitcode" in posted:
            run.exits.append(posted["exitcode"])
