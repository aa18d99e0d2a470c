"""Reading a window of a paged API that may be down, slow, cut short or speak nonsense: all of it, or a clear error."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mlplatform.ingestion.cast import schema_of
from mlplatform.ingestion.errors import SourceDownError, SourceNonsenseError, SourceRefusedError, SourceTruncatedError
from mlplatform.ingestion.http import HttpLimits, read_window
from mlplatform.specs import Contract, HttpReader

READER = HttpReader(connection="weather", path="/v1/things", page_size=10)
START, END = datetime(2013, 9, 1, tzinfo=UTC), datetime(2013, 9, 2, tzinfo=UTC)
# Short waits: the pauses are the library's, the tests only need them to be there.
QUICK = HttpLimits(connect_s=1, read_s=0.5, attempts=3, longest_pause_s=0.05, backoff_factor=0.01, deadline_s=20)


def items(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"i{k}",
            "n": k,
            "at": (START + timedelta(minutes=k)).isoformat().replace("+00:00", "Z"),
            "x": None,
            "ok": True,
            "day": "2013-09-01",
        }
        for k in range(count)
    ]


@pytest.fixture
def read(api: Any, contract: Contract) -> Callable[..., Any]:
    def call(limits: HttpLimits = QUICK) -> Any:
        return read_window(READER, api.url, contract, START, END, limits)

    return call


def test_all_pages_of_the_window_come_in_order(api: Any, read: Callable[..., Any], contract: Contract) -> None:
    api.items = items(2000)  # 33 hours: the last 560 lie outside
    reading = read()
    assert reading.rows.schema == schema_of(contract)
    assert reading.rows["n"].to_list() == list(range(1440))
    assert [q["page"] for q in api.asked] == [str(k) for k in range(1, 145)]
    assert api.asked[0] == {"from": "2013-09-01T00:00:00Z", "to": "2013-09-02T00:00:00Z", "page_size": "10", "page": "1"}


def test_an_empty_window_is_empty_and_typed(read: Callable[..., Any], contract: Contract) -> None:
    assert read().rows.schema == schema_of(contract)
    assert read().rows.is_empty()


def test_an_api_that_gives_smaller_pages_than_asked_for_is_read_whole(api: Any, read: Callable[..., Any]) -> None:
    everything = items(13)
    for k in range(3):
        api.script.append(lambda h, k=k: h.json({"items": everything[5 * k : 5 * k + 5], "page": k + 1, "total_pages": 3}))
    assert read().rows.height == 13


def test_fields_beyond_the_contract_are_dropped_and_named(api: Any, read: Callable[..., Any]) -> None:
    api.items = [{**i, "colour": "red"} for i in items(3)]
    assert read().dropped == ("colour",)


def test_a_passing_fault_is_asked_again(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(25)
    api.script = [
        lambda h: h.json({"error": "busy"}, 503),
        lambda h: h.text('{"items": [{"id": "i0", "n"', kind="application/json"),
        None,
        lambda h: h.text("x" * 10, announced=500),
    ]
    assert read().rows["n"].to_list() == list(range(25))


def test_a_service_that_is_not_there_is_down(api: Any, contract: Contract) -> None:
    with pytest.raises(SourceDownError, match=r"weather.*cannot be reached.*Check") as told:
        read_window(READER, "http://me:hush@127.0.0.1:1", contract, START, END, QUICK)
    assert told.value.retryable
    assert "hush" not in str(told.value)


def test_lasting_server_errors_are_down_after_bounded_attempts(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: h.json({}, 500)
    with pytest.raises(SourceDownError, match="500"):
        read()
    assert len(api.asked) == QUICK.attempts


def test_a_refusal_is_not_asked_again(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: h.json({}, 403)
    with pytest.raises(SourceRefusedError, match="403"):
        read()
    assert len(api.asked) == 1


def test_a_silent_service_is_down_after_its_time_outs(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: api.stopping.wait(30)
    started = time.monotonic()
    with pytest.raises(SourceDownError, match="did not answer in time"):
        read()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_service_that_drips_for_ever_is_cut_at_the_deadline(api: Any, read: Callable[..., Any], part: str) -> None:
    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X-Slow: " if part == "headers" else b"Content-Length: 100000\r\n\r\n"))
        while not api.stopping.wait(0.1):
            handler.wfile.write(b" ")

    api.always = drip
    started = time.monotonic()
    with pytest.raises(SourceDownError, match="within 1 s"):
        read(HttpLimits(connect_s=1, read_s=5, attempts=3, longest_pause_s=0.05, backoff_factor=0.01, deadline_s=1))
    assert time.monotonic() - started < 4


def test_the_deadline_holds_over_many_good_but_slow_pages(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(1440)

    def slow(handler: Any) -> None:
        time.sleep(0.1)
        handler.page(api.asked[-1])

    api.always = slow
    with pytest.raises(SourceDownError, match="within 1 s"):
        read(HttpLimits(connect_s=1, read_s=5, attempts=2, backoff_factor=0.01, deadline_s=1))


def test_json_that_stays_cut_off_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: h.text('{"items": [{"id": "i0", "n"', kind="application/json")
    with pytest.raises(SourceTruncatedError, match="middle of its JSON"):
        read()


def test_a_connection_that_stays_cut_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: h.text('{"items": []', announced=500)
    with pytest.raises(SourceTruncatedError, match="cut in the middle"):
        read()


def test_a_web_page_instead_of_json_is_nonsense(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: h.text("<html>please log in</html>")
    with pytest.raises(SourceNonsenseError, match=r"not JSON.*please log in"):
        read()


@pytest.mark.parametrize(
    "body", [[], {"items": []}, {"total_pages": 1}, {"items": {}, "total_pages": 1}, {"items": [], "total_pages": "1"}]
)
def test_json_of_another_shape_is_nonsense(api: Any, read: Callable[..., Any], body: Any) -> None:
    api.always = lambda h: h.json(body)
    with pytest.raises(SourceNonsenseError, match="without 'items'"):
        read()


def test_a_page_without_items_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(35)
    api.script = [None, lambda h: h.page(api.asked[-1], items=[])]
    with pytest.raises(SourceTruncatedError, match="page 2 of 4 has 0 items"):
        read()


def test_a_page_with_fewer_items_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(35)
    api.script = [None, lambda h: h.page(api.asked[-1], items=items(35)[10:17])]
    with pytest.raises(SourceTruncatedError, match="page 2 of 4 has 7 items where 10 were due"):
        read()


def test_an_empty_last_page_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(15)
    api.script = [None, lambda h: h.page(api.asked[-1], items=[])]
    with pytest.raises(SourceTruncatedError, match="page 2 of 2"):
        read()


def test_the_wrong_page_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(35)
    api.script = [None, lambda h: h.page(api.asked[-1], page=3)]
    with pytest.raises(SourceTruncatedError, match="sent page 3 where page 2"):
        read()


def test_fewer_items_than_announced_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.always = lambda h: h.json({"items": items(3), "page": 1, "total_pages": 1, "total_items": 4})
    with pytest.raises(SourceTruncatedError, match="3 of 4 announced"):
        read()


def test_a_page_count_that_changed_once_is_read_again_from_the_start(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(35)
    api.script = [None, lambda h: h.page(api.asked[-1], total_pages=3)]
    assert read().rows["n"].to_list() == list(range(35))
    assert [q["page"] for q in api.asked] == ["1", "2", "1", "2", "3", "4"]


def test_a_page_count_that_keeps_shrinking_is_truncated(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(35)
    api.always = lambda h: h.page(api.asked[-1], total_pages=5 - int(api.asked[-1]["page"]))
    with pytest.raises(SourceTruncatedError, match="4 pages at first, 3 on page 2"):
        read()


def test_an_item_that_is_no_object_is_nonsense(api: Any, read: Callable[..., Any]) -> None:
    api.items = items(3)
    api.always = lambda h: h.json({"items": ["i1"], "page": 1, "total_pages": 1})
    with pytest.raises(SourceNonsenseError, match="no JSON object: 'i1'"):
        read()


def test_a_column_missing_everywhere_is_named(api: Any, read: Callable[..., Any]) -> None:
    api.items = [{k: v for k, v in i.items() if k != "x"} for i in items(3)]
    with pytest.raises(SourceNonsenseError, match="'x' is missing") as told:
        read()
    assert told.value.column == "x"


@pytest.mark.parametrize(
    ("column", "value"),
    [("n", "1"), ("n", 1.5), ("n", True), ("n", 10**30), ("x", "warm"), ("ok", 1), ("day", "1 May"), ("id", 7), ("id", {"a": 1})],
)
def test_a_value_of_another_type_is_named_with_its_column(api: Any, read: Callable[..., Any], column: str, value: object) -> None:
    api.items = items(12)
    api.items[11][column] = value
    with pytest.raises(SourceNonsenseError, match=f"1 of 12 items.*'{column}'") as told:
        read()
    assert told.value.column == column
    assert told.value.example == repr(value)


def test_a_text_that_is_no_unicode_is_nonsense(api: Any, read: Callable[..., Any]) -> None:
    api.items = [{**items(1)[0], "id": "\ud800"}]
    with pytest.raises(SourceNonsenseError, match="Unicode"):
        read()


def test_an_address_that_is_no_url_is_refused(contract: Contract) -> None:
    with pytest.raises(SourceRefusedError, match="no http"):
        read_window(READER, "ftp://somewhere", contract, START, END, QUICK)


def test_a_window_without_a_zone_is_a_mistake_of_the_caller(contract: Contract) -> None:
    with pytest.raises(ValueError, match="zoned"):
        read_window(READER, "http://127.0.0.1:1", contract, START.replace(tzinfo=None), END, QUICK)
