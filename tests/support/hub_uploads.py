"""A hub on this machine that takes commits: the paths of huggingface.co that an upload of small files asks for."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from hub_server import served

OID = "0123456789abcdef0123456789abcdef01234567"


class UploadHub:
    """What was uploaded, and who may do so."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.writable = True
        self.repositories: dict[str, bool] = {}
        """Name -> whether it is private."""
        self.files: dict[str, bytes] = {}
        """Path in the repository -> content."""


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Serves until the end of the block."""
    with served(UploadHub(), _Handler) as hub:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self.path.endswith("/auth-check/write"):
            self._send(200 if self.hub.writable else 403, {} if self.hub.writable else {"error": "no right to write"})
        else:
            self._send(200, {"id": "someone/small", "sha": OID, "siblings": [], "private": True})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/api/repos/create"):
            asked = json.loads(raw)
            name = f"{asked.get('organization')}/{asked['name']}"
            self.hub.repositories[name] = asked.get("private", asked.get("visibility") == "private")
            self._send(200, {"url": f"{self.hub.endpoint}/{name}"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(raw)["files"]]
            self._send(
                200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in raw.splitlines()]
            parts = [line["value"] for line in lines if line["key"] == "file"]
            self.hub.files |= {part["path"]: base64.b64decode(part["content"]) for part in parts}
            self._send(200, {"commitUrl": f"{self.hub.endpoint}/someone/small/commit/{OID}", "commitOid": OID})
        else:
            self._send(200, {"errors": [], "warnings": []})

    def _send(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
