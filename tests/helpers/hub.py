"""A stand-in for the Hugging Face hub over HTTP on loopback: repositories in memory, made, committed to and read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the hub holds and what it was asked.

    repos: the files of each repository by path. private: which were made private. asked: each request's line and its
    Authorization header. token: the one that may write.
    """

    token: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def answer(
        self, method: str, path: str, body: bytes, authorization: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Answer a request: status, headers, body."""
        self.asked.append((f"{method} {path}", authorization))
        if method == "POST" and authorization != f"Bearer {self.token}":
            return 401, {}, b'{"error": "Invalid username or password."}'
        if method == "POST":
            return 200, {}, json.dumps(self.post(path, body)).encode()
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = self.repos.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        return 200, headers, content

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(repo, {})
            self.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return {"url": f"{self.url}/{repo}", "id": repo, "name": repo}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        matched = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert matched, path
        repo, act = matched.groups()
        if act == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.messages.append(entry["value"]["summary"])
            else:
                self.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return {"commitUrl": f"{self.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40, "pullRequestUrl": None}


@contextmanager
def serving(token: str) -> Iterator[Hub]:
    """Serve a hub until the context ends."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(self.command, self.path, body, self.headers.get("Authorization"))
            self.send_response(status)
            plain = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in {**plain, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = reply

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
