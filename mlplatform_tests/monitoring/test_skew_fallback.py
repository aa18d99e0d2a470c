"""Predictions that say themselves that the online store was away: counted apart, and no cover for any other fault."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

NOON = datetime(2024, 5, 3, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
NAN = float("nan")


def good(day: Any) -> None:
    day.ask(NOON + 4 * MINUTE, NOON, 12.0, 12 / 3)


def replaced(day: Any, **told: Any) -> None:
    """The defaults, though a value had been there for half an hour."""
    day.ask(NOON + 33 * MINUTE, None, None, None, **({"imputed": True, "load": NAN} | told))


def remembered(day: Any, **told: Any) -> None:
    """The value before, though a newer one had been there for half an hour."""
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.0, 11 / 3, **told)


def overtaken(day: Any, **told: Any) -> None:
    day.row(NOON, 12.5, 12 / 3, NOON + 5 * MINUTE)
    day.ask(NOON + 36 * MINUTE, NOON, 12.0, 12 / 3, **told)


def expired(day: Any, **told: Any) -> None:
    day.ask(NOON + 33 * MINUTE, NOON - 5 * HOUR, None, None, imputed=True, load=NAN, **told)


@pytest.mark.parametrize("ask", [replaced, remembered, overtaken, expired])
def test_what_a_store_that_was_away_explains_is_counted_as_a_fallback_and_is_no_skew(day, ask):
    good(day)
    ask(day, shortfall="unreachable")
    found = day.judged()
    assert (found.compared, found.mismatched, found.fallback, found.kinds) == (2, 0, 1, {})
    assert found.passed
    assert found.fallback_share == 0.5 > found.max_fallback_share
    assert "1 of 2 predictions fell back" in found.fallback_told
    (view,) = (s for s in found.by_source if s["source"] == "totals")
    assert (view["away"], view["behind"]) == (1, 0)


@pytest.mark.parametrize("ask", [replaced, remembered, overtaken, expired])
@pytest.mark.parametrize("reason", ["", "missing", "expired", "unreadable"])
def test_any_other_reason_or_none_excuses_nothing(day, ask, reason):
    ask(day, shortfall=reason)
    found = day.judged()
    assert (found.mismatched, found.fallback) == (1, 0)


def test_another_views_shortfall_excuses_nothing(day):
    remembered(day)
    day.log[-1]["shortfalls"] = [{"view": "others", "reason": "unreachable"}]
    assert (day.judged().mismatched, day.judged().fallback) == (1, 0)


def another_value(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.25, 12 / 3, shortfall="unreachable")


def no_such_row(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON - 13 * MINUTE, 123.0, 4.0, shortfall="unreachable")


def not_the_default(day: Any) -> None:
    day.ask(NOON + 33 * MINUTE, None, 0.0, None, imputed=True, load=NAN, shortfall="unreachable")


def silently_the_default(day: Any) -> None:
    replaced(day, imputed=False, load=1.0, shortfall="unreachable")


def older_than_its_ttl(day: Any) -> None:
    day.row(NOON - 4 * HOUR, 8.0, 3.0, shop="b")
    day.ask(NOON, NOON - 4 * HOUR, 8.0, 3.0, inputs={"shop": "b"}, shortfall="unreachable")


def from_the_future(day: Any) -> None:
    day.row(NOON, 77.0, 5.0, NOON + 20 * MINUTE)
    day.ask(NOON + 19 * MINUTE, NOON, 77.0, 5.0, shortfall="unreachable")


def a_good_value_replaced(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, None, None, imputed=True, load=NAN, shortfall="unreachable")


def another_field(day: Any) -> None:
    replaced(day, shortfall="unreachable", price=1.0)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (another_value, "value_differs"),
        (no_such_row, "unknown_row"),
        (not_the_default, "wrong_default"),
        (silently_the_default, "default_filled_silently"),
        (older_than_its_ttl, "ttl_ignored"),
        (from_the_future, "from_the_future"),
        (a_good_value_replaced, "value_not_used"),
        (another_field, "request_value_differs"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_claim_that_the_store_was_away_covers_no_other_fault(day, plant, name):
    plant(day)
    found = day.judged()
    assert (found.kinds, found.mismatched, found.fallback) == ({name: 1}, 1, 0)


def test_many_fallbacks_do_not_thin_out_the_rate_of_the_rest(day):
    good(day)
    remembered(day)
    for _ in range(8):
        replaced(day, shortfall="unreachable")
    found = day.judged()
    assert (found.compared, found.fallback, found.rate) == (10, 8, 0.5)


def test_a_record_of_before_shortfalls_were_written_is_compared_as_ever(day):
    remembered(day)
    day.log[-1]["shortfalls"] = None
    assert day.judged().kinds == {"newer_value_lost": 1}
