"""A Hugging Face hub on loopback that keeps repositories of models in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """What the hub holds. tokens: what each may do. repos: the files of each repository. refuses: commits."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_write_0123456789": "write"})
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    refuses: bool = False

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer to a request."""
        if method == "HEAD":
            return 200, {}
        if path.startswith("/objects/"):  # as of a storage with signed addresses
            return self._store(path.removeprefix("/objects/"), body)
        if token not in self.tokens:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "auth": {"accessToken": {"role": self.tokens[token]}}}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(**json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._action(o) for o in json.loads(body)["objects"]],
            }
        _, _, _, user, name, action, *_ = path.split("/")
        files = self.repos[f"{user}/{name}"]
        if action == "preupload":
            return 200, {"files": [self._mode(files, file["path"]) for file in json.loads(body)["files"]]}
        if action == "revision":
            return 200, {"id": f"{user}/{name}", "sha": "0" * 40, "siblings": [], "tags": []}
        assert action == "commit", path
        return self._commit(f"{user}/{name}", [json.loads(line) for line in body.splitlines()])

    def _create(self, name: str, organization: str, visibility: str = "public") -> tuple[int, dict[str, str]]:
        repo = f"{organization}/{name}"
        answer = {"url": f"{self.url}/{repo}"}
        if repo in self.repos:
            return 409, {**answer, "error": "You already created this model repo"}
        self.repos[repo], self.private[repo] = {}, visibility == "private"
        return 200, answer

    def _mode(self, files: dict[str, bytes], path: str) -> dict[str, Any]:
        """How a file is to be sent, and the hash of the one that the repository has."""
        is_large, known = path.endswith(".safetensors"), files.get(path)
        oid = None
        if known is not None:
            blob = known if is_large else b"blob %d\0" % len(known) + known
            oid = hashlib.new("sha256" if is_large else "sha1", blob).hexdigest()
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _action(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}}

    def _store(self, oid: str, content: bytes) -> tuple[int, dict[str, str]]:
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "the content has another hash"}
        self.objects[oid] = content
        return 200, {}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, str]]:
        if self.refuses:
            return 403, {"error": "the storage limit is reached"}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.objects[value["oid"]]
        self.commits.append(lines[0]["value"]["summary"])
        oid = f"{len(self.commits):040}"
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Start a hub without repositories."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, value = hub.answer(self.command, path, token, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET = do_POST = do_PUT = _handle  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
