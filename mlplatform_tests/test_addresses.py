"""Addresses with a password: asked with it, shown without it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlplatform.addresses import with_credentials_apart, without_password
from mlplatform.clients.registry import Registry
from mlplatform.queries import fetch


@pytest.fixture
def guarded() -> Iterator[str]:
    """The host and port of a server that answers 200 to `me` with the password `p@ss`, and 401 to others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers.get("authorization") == "Basic bWU6cEBzcw==" else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_user_and_password_of_an_address_are_sent_and_are_no_part_of_the_host(guarded) -> None:
    assert fetch(f"http://{guarded}/x")[0] == 401
    assert fetch(f"http://me:p%40ss@{guarded}/x")[0] == 200
    Registry(f"http://me:p%40ss@{guarded}").check()


def test_an_address_is_taken_apart_and_shown_without_its_secrets() -> None:
    assert with_credentials_apart("http://host:1/x?y=1") == ("http://host:1/x?y=1", {})
    assert with_credentials_apart("http://me:p@host/x?y=1")[0] == "http://host/x?y=1"
    assert without_password("http://me:p@host:1/x?token=secret") == "http://host:1/x"
