"""Rates and daily quotas, with the time given."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_app.protection.callers import Caller
from serving_app.protection.limits import DAY_S, DailyQuota, TokenBucket
from serving_app.protection.quotas import QuotaExchange, quota_key

NOW = 1_700_000_000.0


def test_a_burst_passes_at_once_and_then_one_request_per_interval() -> None:
    bucket = TokenBucket(rate_per_s=10, burst=5)
    assert [bucket.take(100.0) for _ in range(5)] == [0.0] * 5
    assert bucket.take(100.0) == pytest.approx(0.1)
    assert bucket.take(100.05) == pytest.approx(0.05)
    assert bucket.take(100.1) == 0.0
    assert bucket.take(100.1) > 0
    assert [bucket.take(200.0) for _ in range(6)][-1] > 0  # long idle gives no more than the burst


@given(
    rate=st.floats(0.5, 100),
    burst=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_no_window_ever_lets_more_through_than_burst_plus_rate(rate: float, burst: int, gaps: list[float]) -> None:
    bucket, now, passed = TokenBucket(rate, burst), 0.0, []
    for gap in gaps:
        now += gap
        if not bucket.take(now):
            passed.append(now)
    for first, start in enumerate(passed):
        for count, end in enumerate(passed[first:], start=1):
            assert count <= burst + rate * (end - start) + 1e-6


@given(rate=st.floats(0.5, 100), burst=st.integers(1, 50), requests=st.integers(1, 200))
def test_who_waits_as_long_as_he_is_told_is_let_through(rate: float, burst: int, requests: int) -> None:
    bucket, now = TokenBucket(rate, burst), 50.0
    for _ in range(requests):
        if wait := bucket.take(now):
            now += wait + 1e-9
            assert bucket.take(now) == 0.0


def test_a_quota_ends_at_its_number_and_begins_again_with_the_utc_day() -> None:
    quota = DailyQuota(3)
    midnight = (NOW // DAY_S + 1) * DAY_S
    assert [quota.take(NOW) for _ in range(3)] == [0.0] * 3
    assert quota.take(NOW) == pytest.approx(midnight - NOW)
    assert quota.take(midnight - 0.001) == 1.0  # never "come again at once"
    assert quota.take(midnight) == 0.0
    assert quota.own == 1


def test_a_clock_set_back_over_midnight_gives_no_second_quota() -> None:
    quota = DailyQuota(2)
    midnight = (NOW // DAY_S + 1) * DAY_S
    assert [quota.take(at) for at in (midnight + 1, midnight - 1)] == [0.0, 0.0]
    assert quota.take(midnight - 1) > 0


def test_an_answer_about_yesterday_does_not_count_today() -> None:
    quota = DailyQuota(5)
    quota.take(NOW)
    quota.counted_elsewhere(quota.day - 1, 100)
    assert quota.others == 0


def test_processes_add_up_and_a_repeated_exchange_changes_nothing(redis_url: str) -> None:
    from redis.asyncio import Redis

    async def run() -> None:
        callers = [Caller("k", frozenset(), quota=DailyQuota(100)) for _ in range(3)]
        async with Redis.from_url(redis_url) as redis:
            exchanges = [QuotaExchange(redis) for _ in callers]
            for caller, requests in zip(callers, (2, 3, 4), strict=True):
                assert caller.quota
                for _ in range(requests):
                    caller.quota.take(NOW)
            for _ in range(2):
                for caller, exchange in zip(callers, exchanges, strict=True):
                    await exchange.exchange([caller])
            assert [caller.quota.others for caller in callers if caller.quota] == [7, 6, 5]
            day = int(NOW // DAY_S)
            assert sorted(await redis.hvals(quota_key("k", day))) == [b"2", b"3", b"4"]

    asyncio.run(run())
