"""The hot route on the wire: what it takes over from uvicorn and FastAPI has to look as theirs does, also where callers misbehave."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import redis

from serving_app.hot import HotRequest, HotRoute
from serving_app.predictor import Predictor

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"


@pytest.fixture
def hot_requests(monkeypatch) -> list[HotRequest]:
    """Every request that the hot route took."""
    taken: list[HotRequest] = []
    init = HotRequest.__init__

    def noted(self: HotRequest, *arguments: Any) -> None:
        taken.append(self)
        init(self, *arguments)

    monkeypatch.setattr(HotRequest, "__init__", noted)
    return taken


@pytest.fixture
def start(make_model, open_service, tmp_path) -> Callable[..., httpx.Client]:
    def start(**settings: Any) -> httpx.Client:
        make_model().into_cache(tmp_path)
        client: httpx.Client = open_service(**settings)
        return client

    return start


def request(path: str = PATH, body: Any = None, **fields: str) -> bytes:
    content = json.dumps({"inputs": [ROW]} if body is None else body).encode()
    head = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content))} | fields
    return "\r\n".join([f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]).encode() + content


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), 10)


def answers(connection: socket.socket) -> Iterator[tuple[int, dict[str, str], Any]]:
    """(status, header fields, body) of each answer, until the connection is closed."""
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            fields = dict(iter(lambda: tuple(stream.readline().decode().strip().lower().split(": ", 1)), ("",)))
            yield int(line.split()[1]), fields, json.loads(stream.read(int(fields["content-length"])))


def counted(client: httpx.Client, status: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("mlplatform_requests_total")]
    return sum(float(line.split()[-1]) for line in lines if f'status="{status}"' in line)


def test_plain_requests_are_taken_and_all_others_left_to_the_application(start, hot_requests) -> None:
    client = start()
    assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200
    assert len(hot_requests) == 1
    content = json.dumps({"inputs": [ROW]}).encode()
    left: list[dict[str, Any]] = [
        {"url": PATH + "?features=true", "content": content},
        {"url": PATH, "content": content, "headers": {"content-type": "application/json; charset=utf-8"}},
        {"url": PATH, "content": iter([content])},  # chunked
        {"url": PATH, "content": content, "headers": {"origin": "http://localhost"}},
        {"url": PATH.replace("basket", "b%61sket"), "content": content},
        {"url": PATH, "content": b" " * 65_536 + content},
    ]
    for each in left:
        headers = {"content-type": "application/json"} | each.pop("headers", {})
        assert client.post(**each, headers=headers).status_code == 200, each
    other = {"content-type": "application/json; charset=latin-1"}
    assert client.post(PATH, content=content, headers=other).json()["detail"] == "only UTF-8 is read"
    assert client.get(PATH).status_code == 405
    assert len(hot_requests) == 1


def test_both_ways_answer_with_the_same_header_fields(start, hot_requests) -> None:
    client = start()
    for body in ({"inputs": [ROW]}, {"inputs": []}):
        both = [client.post(PATH + query, json=body).headers for query in ("", "?")]
        hot, behind = ({k: v for k, v in fields.items() if k not in ("x-request-id", "date")} for fields in both)
        assert hot == behind
        assert both[0]["x-request-id"] != both[1]["x-request-id"]
    assert len(hot_requests) == 2


def test_requests_sent_without_waiting_are_answered_in_their_order(start) -> None:
    client = start()
    inputs = [{"inputs": [ROW | {"items": i}]} for i in range(1, 9)]
    with connect(client) as connection:
        # Every second one goes the long way.
        connection.sendall(b"".join(request(PATH + ("?features=true" if i % 2 else ""), body) for i, body in enumerate(inputs)))
        told = answers(connection)
        got = [next(told) for _ in inputs]
    alone = [client.post(PATH, json=body).json()["predictions"][0]["prediction"] for body in inputs]
    assert [body["predictions"][0]["prediction"] for _, _, body in got] == alone


def test_a_connection_that_is_to_be_closed_is_closed_after_its_answer(start) -> None:
    with connect(start()) as connection:
        connection.sendall(request(Connection="close"))
        ((status, fields, _),) = answers(connection)
    assert (status, fields["connection"]) == (200, "close")


def test_an_answer_that_takes_too_long_is_504_and_its_place_is_free_again(start, redis_url) -> None:
    client = start(serving_request_timeout_s=0.2, serving_body_timeout_s=0.2, serving_redis_timeout_s=5)
    assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200
    with redis.Redis.from_url(redis_url) as store:
        store.execute_command("CLIENT", "PAUSE", "800", "ALL")
    late = client.post(PATH, json={"inputs": [ROW]})
    assert (late.status_code, late.json()["type"]) == (504, "urn:mlplatform:problem:too-slow")
    deadline = time.monotonic() + 10
    while client.post(PATH, json={"inputs": [ROW]}).status_code != 200:
        assert time.monotonic() < deadline
    assert counted(client, "504") >= 1
    assert "mlplatform_requests_in_work 0.0" in client.get("/metrics").text  # the one that asks takes no place


def test_a_body_that_does_not_come_is_408_and_a_caller_who_leaves_before_its_end_is_counted(start) -> None:
    client = start(serving_body_timeout_s=0.2)
    with connect(client) as connection:
        connection.sendall(request()[:-10])
        ((status, fields, body),) = answers(connection)
    assert (status, fields["connection"], body["type"]) == (408, "close", "urn:mlplatform:problem:body-too-slow")
    with connect(client) as connection:
        connection.sendall(request()[:-10])
    deadline = time.monotonic() + 10
    while counted(client, "499") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert counted(client, "408") == 1


def test_what_nobody_foresaw_is_500_with_an_id_and_the_connection_goes_on(start, monkeypatch) -> None:
    client = start()
    answered = Predictor.answered

    def broken(*arguments: Any) -> Any:
        monkeypatch.setattr(Predictor, "answered", answered)
        raise KeyError("a secret")

    monkeypatch.setattr(Predictor, "answered", broken)
    with connect(client) as connection:
        connection.sendall(request() + request())
        told = answers(connection)
        (status, fields, body), (after, _, _) = next(told), next(told)
    assert (status, after) == (500, 200)
    assert body["request_id"] == fields["x-request-id"]
    assert "secret" not in json.dumps(body)


def test_a_caller_who_leaves_with_requests_behind_the_one_in_work_is_no_fault_of_the_services(start, capfd) -> None:
    client = start()
    large, get = request(body={"inputs": [ROW] * 300}), b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for after in range(16):
        with connect(client) as connection:
            connection.sendall((request() + get + large) * 12)
            time.sleep(0.02 * after)
    deadline = time.monotonic() + 10
    while "mlplatform_requests_in_work 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline
    assert "request_failed" not in capfd.readouterr().out


def test_a_caller_who_reads_no_answer_is_not_answered_without_end(start) -> None:
    """Answers pile up in the service until its own limit for a connection, then it reads no more of this caller."""
    client = start()
    rows = request(body={"inputs": [ROW] * 100})
    with connect(client) as connection:
        connection.settimeout(0.5)
        sent = 0
        try:
            while sent < 20_000:  # some 60 MB of answers
                connection.sendall(rows)
                sent += 1
        except TimeoutError:
            pass
        assert sent < 20_000
        assert client.post(PATH, json={"inputs": [ROW]}).status_code == 200


def test_a_connection_without_a_request_is_closed_after_the_declared_time(make_model, run_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    process = run_service(MLPLATFORM_SERVING_KEEP_ALIVE_S="1")
    process.wait_ready()
    url = httpx.URL(process.url)
    with socket.create_connection((url.host, url.port or 80), 20) as connection:
        connection.sendall(request())
        ((status, _, _),) = answers(connection)  # ends when the service closes
    assert status == 200


@pytest.fixture
def heads_read(monkeypatch) -> list[HotRoute]:
    """The route, once for each head that it was told as it was read."""
    read: list[HotRoute] = []
    begin = HotRoute.begin

    def noted(self: HotRoute, connection: Any, url: bytes, *others: Any) -> HotRequest | None:
        read.append(self)
        return begin(self, connection, url, *others)

    monkeypatch.setattr(HotRoute, "begin", noted)
    return read


def at_hour(hour: int, **others: Any) -> dict[str, Any]:
    """A body for which the model answers by the hour."""
    return {"inputs": [ROW | others | {"placed_at": f"2013-09-01T{hour:02d}:30:00Z"}]}


def predicted(connection: socket.socket, told: Iterator[tuple[int, dict[str, str], Any]], *pieces: bytes) -> float:
    """The prediction for what is sent in these pieces, each in a packet of its own."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(0.002)
    status, _, body = next(told)
    assert status == 200, body
    prediction: float = body["predictions"][0]["prediction"]
    return prediction


def test_a_head_that_came_before_is_not_read_again_on_any_connection(start, heads_read) -> None:
    client = start()
    bodies = [at_hour(0), at_hour(1, price=9.5), at_hour(9, price=9.5), at_hour(22)]
    wanted = [client.post(PATH, json=body, headers={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-00"}) for body in bodies]
    assert len(heads_read) == 4  # with a field that is another one each time nothing is remembered
    heads_read.clear()
    for _ in range(3):
        with connect(client) as connection:
            told = answers(connection)
            got = [predicted(connection, told, request(body=body)) for body in bodies]
            assert got == [answer.json()["predictions"][0]["prediction"] for answer in wanted]
    assert len(heads_read) == 2  # two of the bodies are shorter by a digit


def test_a_known_head_in_pieces_and_in_company_is_answered_like_any_other(start, heads_read) -> None:
    client = start()
    first, second = (at_hour(0), at_hour(22))
    wanted = [client.post(PATH, json=body).json()["predictions"][0]["prediction"] for body in (first, second)]
    assert wanted[0] != wanted[1]
    whole = request(body=first)
    with connect(client) as connection:
        told = answers(connection)
        predicted(connection, told, whole)
        heads_read.clear()
        assert predicted(connection, told, whole) == wanted[0]
        assert not heads_read
        for cut in range(1, len(whole), 7):
            assert predicted(connection, told, whole[:cut], whole[cut:]) == wanted[0], cut
            assert predicted(connection, told, whole) == wanted[0], cut
        # A whole one and the begin of the next; the rest of it, and another.
        connection.sendall(whole + request(body=second)[:40])
        time.sleep(0.01)
        connection.sendall(request(body=second)[40:] + whole)
        assert [next(told)[2]["predictions"][0]["prediction"] for _ in range(3)] == [wanted[0], wanted[1], wanted[0]]
        assert predicted(connection, told, request(body=second)) == wanted[1]


def test_a_known_head_says_nothing_of_what_stands_behind_it(start) -> None:
    client = start()
    good = request()
    with connect(client) as connection:
        told = answers(connection)
        predicted(connection, told, good)
        head, _, body = good.partition(b"\r\n\r\n")
        for wrong, status in ((b"{" + b" " * (len(body) - 1), 422), (body.replace(b'"s1"', b"0.25", 1), 422)):
            connection.sendall(head + b"\r\n\r\n" + wrong)
            assert next(told)[0] == status
        connection.sendall(head + b"\r" + b"x" * (len(body) + 3))  # no end of a head at all
        assert next(told)[0] == 400


@pytest.mark.parametrize("before", [b"\n", b"\r\n", b"x"])
def test_nothing_but_a_head_is_remembered_as_one(start, before: bytes) -> None:
    """Who is let in may send line ends after a request, which begin none; they must not stand for his head from then on."""
    client = start()
    body = request().partition(b"\r\n\r\n")[2]
    with connect(client) as connection:
        told = answers(connection)
        predicted(connection, told, request())
        connection.sendall(before + b"\r\n\r\n" + (b"\r\n" * len(body))[: len(body)])
        time.sleep(0.05)
    with connect(client) as connection:
        connection.settimeout(1)
        connection.sendall(before + b"\r\n\r\n" + body)
        assert not connection.recv(65_536).startswith(b"HTTP/1.1 200")


UPGRADE = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"}


def test_a_wish_for_another_protocol_is_passed_over(start, heads_read) -> None:
    """Java's own client has it in its first request, and sends the body with it."""
    client = start()
    wanted = [client.post(PATH, json=at_hour(hour)).json()["predictions"][0]["prediction"] for hour in (0, 22)]
    upgrading, plain = request(body=at_hour(0), **UPGRADE), request(body=at_hour(22))
    head, _, body = upgrading.partition(b"\r\n\r\n")
    with connect(client) as connection:
        told = answers(connection)
        for cuts in ((), (head + b"\r\n\r\n", body), (head[:30], head[30:] + b"\r\n\r\n" + body[:7], body[7:])):
            assert predicted(connection, told, *(cuts or (upgrading,))) == wanted[0], cuts
        connection.sendall(upgrading + plain + upgrading)
        assert [next(told)[2]["predictions"][0]["prediction"] for _ in range(3)] == [wanted[0], wanted[1], wanted[0]]
        assert predicted(connection, told, request(body=at_hour(22), Upgrade="websocket", Connection="keep-alive, Upgrade")) == wanted[1]
        # What stands in a body is no request.
        smuggled = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        wishes = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        connection.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{wishes}Content-Length: {len(smuggled)}\r\n\r\n".encode() + smuggled
        )
        assert next(told)[0] == 422
        assert predicted(connection, told, plain) == wanted[1]
        connection.sendall(upgrading.replace(b"HTTP/1.1", b"HTTP/1.0"))
        status, fields, _ = next(told)
        assert (status, fields["connection"], list(told)) == (200, "close", [])
    with connect(client) as connection:
        connection.sendall(upgrading * 100)
        assert [status for status, _, _ in answers(connection)][-1] == 400
    with connect(client) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        ((status, _, body),) = answers(connection)
    assert (status, body["detail"]) == (400, "this is no HTTP request: this is no proxy")


def test_what_is_remembered_of_heads_has_an_end(start, heads_read) -> None:
    client = start()
    many = [client.post(PATH, json={"inputs": [ROW]}, headers={"x-caller": f"{i}" * 100}) for i in range(600)]
    assert {answer.status_code for answer in many} == {200}
    assert len(heads_read) == 600
    assert 0 < len(heads_read[0]._heads) <= 256
