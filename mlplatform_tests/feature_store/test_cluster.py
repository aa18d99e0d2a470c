"""The online store on a real Valkey in cluster mode, where no command may span two slots, and over TLS."""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import ResponseError

from mlplatform.feature_store.codec import generation_of
from mlplatform.feature_store.commands import open_async_client, open_client
from mlplatform.feature_store.generations import build_generation, restore
from mlplatform.feature_store.reader import OnlineReader, SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import reclaim
from mlplatform.feature_store.writer import WriteCounts, write_frame

T0 = datetime(2013, 9, 1, tzinfo=UTC)
LAYOUT = ViewLayout.declare("v", ["who"], ["a"], None)
ENTITIES = 1_500


def rows(value: float, minute: int = 0, entities: int = ENTITIES) -> pl.DataFrame:
    at = [T0 + timedelta(minutes=minute)] * entities
    return pl.DataFrame({"who": [f"n{i}" for i in range(entities)], "a": [value] * entities, "event_timestamp": at, "created": at})


@pytest.fixture(scope="module")
def cluster_url(start_cluster: Any) -> Iterator[str]:
    """Two nodes, half of the slots each."""
    with start_cluster(primaries=2) as ports:
        yield f"redis://127.0.0.1:{ports[0]}"


@pytest.fixture
def cluster(cluster_url: str) -> Iterator[RedisCluster]:
    client = open_client(cluster_url, cluster=True)
    assert isinstance(client, RedisCluster)
    client.flushall()
    yield client
    client.close()


def build(client: Any, value: float, **options: Any) -> Any:
    return build_generation(client, "p", "v", ["who"], ["a"], lambda: rows(value, minute=int(value)), at=T0, by="a test", **options)


def read(client: Any, entities: int = ENTITIES) -> list[float | None]:
    found = SyncOnlineReader(client, "p").read([(LAYOUT, (f"n{i}",)) for i in range(entities)])
    return [None if f is None else float(f.values[0]) for f in found]


def test_the_cluster_refuses_what_spans_slots(cluster: RedisCluster) -> None:
    node: Any = cluster.get_redis_connection(cluster.get_primaries()[0])
    with pytest.raises(ResponseError, match="same slot"):
        node.execute_command("MGET", "a", "b")


def test_pushes_keep_their_order_on_a_cluster(cluster: RedisCluster) -> None:
    def push(value: float, minute: int) -> WriteCounts:
        return write_frame(cluster, "p", "v", ["who"], ["a"], rows(value, minute))

    assert push(1.0, 5) == WriteCounts(ENTITIES, 0)
    assert push(2.0, 4) == WriteCounts(0, ENTITIES)
    assert read(cluster) == [1.0] * ENTITIES
    keys = [key for key in cluster.scan_iter(match=b"fs{*") if generation_of(key)]
    assert len(keys) == ENTITIES
    nodes = {cluster.get_node_from_key(key.decode()).port for key in keys}
    assert len(nodes) == 2


def test_generations_are_built_carried_over_restored_and_reclaimed_on_a_cluster(cluster: RedisCluster) -> None:
    build(cluster, 1.0)
    write_frame(cluster, "p", "v", ["who"], ["a"], rows(9.0, minute=9, entities=1))
    built = build(cluster, 2.0, carry_over=True)
    assert (built.entities, built.overtaken) == (ENTITIES, 1)
    assert read(cluster) == [9.0] + [2.0] * (ENTITIES - 1)
    restore(cluster, "p", "v", at=T0, by="a test")
    assert read(cluster) == [9.0] + [1.0] * (ENTITIES - 1)
    build(cluster, 3.0)
    build(cluster, 4.0)
    assert reclaim(cluster).retiring == 2
    for key in list(cluster.scan_iter(match=b"fs#*")):
        if cluster.ttl(key) > 0:
            cluster.delete(key)
    assert reclaim(cluster).keys == ENTITIES * 2
    assert read(cluster) == [4.0] * ENTITIES


def test_the_services_reader_reads_a_cluster(cluster: RedisCluster, cluster_url: str) -> None:
    build(cluster, 1.0)

    async def run() -> list[Any]:
        client = open_async_client(cluster_url, cluster=True)
        try:
            return await OnlineReader(client, "p").read([(LAYOUT, (f"n{i}",)) for i in (3, ENTITIES, 5)])
        finally:
            await client.aclose()

    found = asyncio.run(run())
    assert [None if f is None else f.values.tolist() for f in found] == [[1.0], None, [1.0]]


def test_feast_works_on_a_cluster_by_configuration(new_repo: Any, cluster: RedisCluster, cluster_url: str, tmp_path: Path) -> None:
    repo = new_repo(tmp_path, str(tmp_path / "lake"), cluster_url, online={"cluster": True})
    at = T0 + timedelta(hours=47)
    times = {"event_timestamp": [at], "created": [at]}
    repo.write("weather", pl.DataFrame({"origin": ["EWR"], "temp": [1.0], "n": [2.0], **times}))
    repo.store.materialize(T0, at, feature_views=["weather"])
    later = pl.DataFrame({"origin": ["JFK"], "temp": [3.0], "n": [4.0], **times}).to_pandas()
    repo.store.write_to_online_store("weather", later)
    answer = repo.store.get_online_features(["weather:n"], [{"origin": o} for o in ("EWR", "JFK", "LGA")]).to_dict()
    assert answer["n"] == [2.0, 4.0, None]
    repo.store.teardown()
    asyncio.run(repo.store.close())
    assert [key for key in cluster.scan_iter() if generation_of(key)] == []


def test_a_closed_client_leaves_no_connection_behind(cluster: RedisCluster, cluster_url: str) -> None:
    def connected() -> int:
        return sum(len(clients) for clients in cluster.client_list(target_nodes=RedisCluster.PRIMARIES).values())

    before = connected()
    other = open_client(cluster_url, cluster=True)
    write_frame(other, "p", "v", ["who"], ["a"], rows(1.0))
    assert connected() > before
    other.close()
    deadline = time.monotonic() + 5
    while connected() != before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one file."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "valkey of the tests")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path = tmp_path / "server.pem"
    path.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def tls_port(valkey_url: str, certificate: Path) -> Iterator[int]:
    """TLS before the real server, which is built without: what comes in encrypted goes on in the clear."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    port = int(valkey_url.rsplit(":", 1)[1].removesuffix("/0"))
    loop = asyncio.new_event_loop()
    listening: list[asyncio.Server] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, inner[1]), pump(inner[0], writer))

    async def start() -> None:
        listening.append(await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield listening[0].sockets[0].getsockname()[1]

    async def end() -> None:
        listening[0].close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


def test_rediss_addresses_are_encrypted_and_the_certificate_is_checked(redis_client: Redis, tls_port: int, certificate: Path) -> None:
    from redis.exceptions import ConnectionError as RefusedError

    address = f"rediss://127.0.0.1:{tls_port}/0"
    with contextlib.closing(open_client(f"{address}?ssl_ca_certs={certificate}")) as client:
        build(client, 1.0)
        assert read(client, 3) == [1.0] * 3
    with contextlib.closing(open_client(address)) as stranger, pytest.raises(RefusedError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.execute_command("PING")


def test_the_service_s_connection_is_encrypted_likewise(redis_client: Redis, tls_port: int, certificate: Path) -> None:
    from redis.exceptions import ConnectionError as RefusedError

    from mlplatform.feature_store.pipe import Pipe

    async def run() -> None:
        address = f"rediss://127.0.0.1:{tls_port}/0"
        async with contextlib.aclosing(Pipe(f"{address}?ssl_ca_certs={certificate}", 5.0)) as pipe:
            assert await pipe.ping()
        async with contextlib.aclosing(Pipe(address, 5.0)) as stranger:
            with pytest.raises(RefusedError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.ping()

    asyncio.run(run())
