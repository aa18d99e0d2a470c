"""Every delivery goes into its stream exactly once, in order, whatever restarts."""

import json
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
import redis

from mlplatform.local.deliveries import deliveries_between, deliveries_until
from mlplatform.local.publisher import OtherWorldError, Publisher

START = datetime(2013, 9, 1, tzinfo=UTC)
Deliveries = dict[str, pl.DataFrame]


@pytest.fixture
def live(deliveries: Deliveries) -> Deliveries:
    return {source: deliveries_between(rows, START, START + timedelta(days=9)) for source, rows in deliveries.items()}


def streamed(client: redis.Redis, source: str) -> list[dict]:
    return [json.loads(fields["event"]) for _, fields in client.xrange(f"flights.{source}")]


def test_exactly_the_due_deliveries_are_published_in_their_order(client: redis.Redis, live: Deliveries) -> None:
    noon = START + timedelta(hours=12)
    counts = Publisher(client, live, "a").publish_until(noon)
    for source, rows in live.items():
        due = deliveries_until(rows, noon)
        assert counts[source] == due.height > 0
        assert [event["event_id"] for event in streamed(client, source)] == due["event_id"].to_list()


def test_an_event_carries_its_columns_with_iso_times_and_not_its_delivery(client: redis.Redis, live: Deliveries) -> None:
    Publisher(client, live, "a").publish_until(START + timedelta(hours=1))
    event = streamed(client, "arrivals")[0]
    assert set(event) == set(live["arrivals"].columns) - {"delivered_at"}
    assert datetime.fromisoformat(event["known_at"]) == live["arrivals"]["known_at"][0]
    assert event["flight"] == live["arrivals"]["flight"][0]


def test_publishing_again_adds_nothing(client: redis.Redis, live: Deliveries) -> None:
    publisher = Publisher(client, live, "a")
    publisher.publish_until(START + timedelta(days=1))
    assert set(publisher.publish_until(START + timedelta(days=1)).values()) == {0}
    assert set(publisher.publish_until(START).values()) == {0}


def test_a_new_publisher_goes_on_where_the_last_one_ended(client: redis.Redis, live: Deliveries) -> None:
    end = START + timedelta(days=8)
    for hours in (5, 30, 31, 24 * 8):
        Publisher(client, live, "a").publish_until(START + timedelta(hours=hours))
    for source, rows in live.items():
        expected = deliveries_until(rows, end)["event_id"].to_list()
        # More than two batches: the borders between them are crossed.
        assert len(expected) > 4000
        assert [event["event_id"] for event in streamed(client, source)] == expected


def test_a_failure_between_batches_loses_and_repeats_nothing(
    client: redis.Redis, live: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(client, live, "a")
    real = Publisher._publish_batch
    calls = []

    def fail_third(self: Publisher, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise redis.ConnectionError("gone")
        real(self, *arguments)

    monkeypatch.setattr(Publisher, "_publish_batch", fail_third)
    with pytest.raises(redis.ConnectionError):
        publisher.publish_until(START + timedelta(days=8))
    publisher.publish_until(START + timedelta(days=8))
    for source, rows in live.items():
        assert client.xlen(f"flights.{source}") == deliveries_until(rows, START + timedelta(days=8)).height


def test_streams_of_other_deliveries_are_refused(client: redis.Redis, live: Deliveries) -> None:
    Publisher(client, live, "a").publish_until(START + timedelta(hours=1))
    with pytest.raises(OtherWorldError, match="empty home"):
        Publisher(client, live, "b").publish_until(START + timedelta(hours=2))
