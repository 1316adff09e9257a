"""A hub on this machine: the few paths of huggingface.co that dsquant asks for, with range requests, and a record."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server serves and what it was asked for."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.endpoint = ""
        self.bytes_sent: dict[str, int] = {}
        """File name -> bytes of content sent."""


@contextmanager
def served(hub: Any, handler: type[BaseHTTPRequestHandler]) -> Iterator[Any]:
    """Serves requests with a handler, whose `hub` is this one, until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_of(models: dict[str, Path]) -> Iterator[Hub]:
    """Serves folders as models until the end of the block."""
    with served(Hub(models), _Handler) as hub:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = info or tree or file
        if found is None or found[1] not in self.hub.models:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_content)
            return
        folder = self.hub.models[found[1]]
        names = sorted(entry.name for entry in folder.iterdir())
        json_type = {"Content-Type": "application/json"}
        if info:
            siblings = [{"rfilename": name} for name in names]
            content = {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings, "private": False}
            self._send(200, json.dumps(content).encode(), json_type, with_content)
        elif tree:
            sizes = {name: (folder / name).stat().st_size for name in names}
            entries = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self._send(200, json.dumps(entries).encode(), json_type, with_content)
        elif found[2] not in names:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_content)
        else:
            self._send_file(folder / found[2], with_content)

    def _send_file(self, path: Path, with_content: bool) -> None:
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status = 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if with_content:
            self.hub.bytes_sent[path.name] = self.hub.bytes_sent.get(path.name, 0) + len(content)
        self._send(status, content, headers, with_content)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_content: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)
