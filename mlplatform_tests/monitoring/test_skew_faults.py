"""Logged predictions against rows of a view: each planted fault is found, under its name and no other."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from mlplatform.monitoring.skew_faults import FAULTS

NOON = datetime(2024, 5, 3, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
NAN = float("nan")


def ttl_ignored(day: Any) -> None:
    day.row(NOON - 4 * HOUR, 8.0, 3.0, shop="b")  # and nothing since
    day.ask(NOON, NOON - 4 * HOUR, 8.0, 3.0, inputs={"shop": "b"})


def correction_lost(day: Any) -> None:
    day.row(NOON, 12.5, 12 / 3, NOON + 5 * MINUTE)
    day.ask(NOON + 36 * MINUTE, NOON, 12.0, 12 / 3)


def late_value(day: Any) -> None:
    day.row(NOON - 1 * HOUR, 11.5, 11 / 3, NOON + 10 * MINUTE)
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.5, 11 / 3)


def newer_value_lost(day: Any) -> None:
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.0, 11 / 3)


def time_shift(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON - 2 * HOUR, 12.0, 12 / 3)


def time_shift_into_the_future(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON + 5 * HOUR + 30 * MINUTE, 12.0, 12 / 3)


def default_filled_silently(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, None, 12 / 3)


def default_for_a_missing_view_silently(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, None, None, None)


def request_function_changed(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, twice=3.0)


def time_of_the_request_shifted(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, minute=9.0 * 60 + 10)


def wrong_default(day: Any) -> None:
    day.ask(NOON, None, 0.0, None, imputed=True, load=NAN, inputs={"shop": "b"})


def value_not_used(day: Any) -> None:
    day.ask(NOON + 33 * MINUTE, None, None, None, imputed=True, load=NAN)


def fresh_value_replaced(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, None, None, imputed=True, load=NAN)


def expired_though_newer(day: Any) -> None:
    day.ask(NOON + 33 * MINUTE, NOON - 5 * HOUR, None, None, imputed=True, load=NAN)


def from_the_future(day: Any) -> None:
    day.row(NOON + 7 * MINUTE, 55.0, 5.0)
    day.ask(NOON + 6 * MINUTE, NOON + 7 * MINUTE, 55.0, 5.0)


def created_after_the_request(day: Any) -> None:
    day.row(NOON, 77.0, 5.0, NOON + 20 * MINUTE)
    day.ask(NOON + 19 * MINUTE, NOON, 77.0, 5.0)


def value_differs(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.25, 12 / 3)


def unknown_row(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON - 13 * MINUTE, 123.0, 4.0)


def another_shop(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, inputs={"shop": "b"}, twice=None)


def category_differs(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, channel=0.0)


def request_value_differs(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, inputs={"price": None})


def unreadable_inputs(day: Any) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, inputs={"customer": "seven"})


PLANTED = [
    (ttl_ignored, "ttl_ignored"),
    (correction_lost, "correction_lost"),
    (late_value, "late_value"),
    (newer_value_lost, "newer_value_lost"),
    (time_shift, "time_shift"),
    (time_shift_into_the_future, "time_shift"),
    (time_of_the_request_shifted, "time_shift"),
    (default_filled_silently, "default_filled_silently"),
    (default_for_a_missing_view_silently, "default_filled_silently"),
    (request_function_changed, "request_function_changed"),
    (wrong_default, "wrong_default"),
    (value_not_used, "value_not_used"),
    (fresh_value_replaced, "value_not_used"),
    (expired_though_newer, "newer_value_lost"),
    (from_the_future, "from_the_future"),
    (created_after_the_request, "from_the_future"),
    (value_differs, "value_differs"),
    (unknown_row, "unknown_row"),
    (another_shop, "unknown_row"),
    (category_differs, "category_differs"),
    (request_value_differs, "request_value_differs"),
    (unreadable_inputs, "unreadable_inputs"),
]


@pytest.mark.parametrize(("plant", "name"), PLANTED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_planted_fault_is_found_and_named_and_nothing_else_is(day, plant, name):
    day.ask(NOON + 5 * MINUTE, NOON, 12.0, 12 / 3)
    assert day.judged().passed
    plant(day)
    found = day.judged()
    assert found.kinds == {name: 1}
    assert (found.compared, found.mismatched) == (2, 1)
    assert not found.passed


def test_every_fault_that_has_a_name_was_planted():
    assert {name for _, name in PLANTED} | {"prediction_differs"} == set(FAULTS)


def test_an_answer_the_model_does_not_give_is_found(day):
    day.ask(NOON + 5 * MINUTE, NOON, 12.0, 12 / 3)
    assert day.judged(lambda m: np.full(len(m), 0.5 + 1e-7)).kinds == {}
    assert day.judged(lambda m: np.full(len(m), 0.51)).kinds == {"prediction_differs": 1}
    assert day.judged(lambda m: np.full(len(m), NAN)).kinds == {"prediction_differs": 1}
