"""A server on loopback that keeps what is posted to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Posts:
    """What was posted as JSON, by path, in its order; `status` is what the server answers."""

    url: str
    received: list[tuple[str, Any]] = field(default_factory=list)
    status: int = 200


@contextmanager
def kept_posts() -> Iterator[Posts]:
    class Keep(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if posts.status < 300:
                posts.received.append((self.path, body))
            self.send_response(posts.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as http:
        posts = Posts(f"http://127.0.0.1:{http.server_port}")
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield posts
        finally:
            http.shutdown()
