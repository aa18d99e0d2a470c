"""What the protection's tests share: a server of one JSON document."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest


@pytest.fixture
def served_json() -> Iterator[Callable[[Any], str]]:
    """`served_json(document)`: an address that answers with it."""
    running: list[tuple[HTTPServer, threading.Thread]] = []

    def serve(document: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/jwks.json" else 404)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, *_: Any) -> None:
                """Not into the test's output."""

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/jwks.json"

    yield serve
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()
