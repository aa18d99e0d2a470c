"""Logged predictions against rows of a view: a clean day has no fault, and each planted fault is found under its name."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.monitoring import skew
from mlplatform.monitoring.skew_plot import skew_plot
from mlplatform.specs import SkewPolicy

UTC_US = pl.Datetime("us", "UTC")
NOON = datetime(2024, 5, 3, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
NAN = float("nan")
POLICY = SkewPolicy()


# --- a clean day ----------------------------------------------------------------------------------------------------


def test_a_clean_day_has_no_fault(day):
    for minute in range(0, 600, 7):
        at = NOON + minute * MINUTE + timedelta(microseconds=minute * 12345 + 1)
        event = (at - 2 * MINUTE).replace(minute=0, second=0, microsecond=0)
        day.ask(at, event, float(event.hour), event.hour / 3)
    found = day.judged()
    assert (found.predictions, found.compared, found.mismatched, found.kinds) == (86, 86, 0, {})
    assert found.passed
    assert {s["source"]: s["mismatches"] for s in found.by_source} == {
        "totals": 0,
        "f:part_of_day": 0,
        "request fields": 0,
        "categories": 0,
    }
    names = ("returns", "orders", "minute", "twice", "price", "channel")
    assert {f["feature"]: (f["compared"], f["mismatches"]) for f in found.by_feature} == dict.fromkeys(names, (86, 0))


def test_a_value_on_its_way_is_no_fault_and_its_lag_is_told(day):
    day.ask(NOON + 20 * MINUTE, NOON - HOUR, 11.0, 11 / 3)
    day.ask(NOON + 32 * MINUTE, NOON - HOUR, 11.0, 11 / 3)  # exactly the budget
    found = day.judged()
    assert found.kinds == {}
    [source] = [s for s in found.by_source if s["source"] == "totals"]
    assert (source["behind"], source["budget_s"], source["lag_p50_s"], source["lag_max_s"]) == (2, 1800.0, 1440.0, 1800.0)


def test_nulls_are_nan_where_the_view_declares_no_default_and_the_default_where_it_does(new_day):
    for defaults, stood in (({"orders": None, "returns": None, "load": None}, None), ({"orders": 5.0, "returns": None, "load": None}, 5.0)):
        day = new_day(defaults=defaults)
        day.row(NOON, None, 1.0)
        day.ask(NOON + MINUTE, NOON, stood, 1.0)
        assert day.judged().kinds == {}


@pytest.mark.parametrize("age", [None, 4 * HOUR])
def test_what_is_missing_or_expired_is_replaced_by_the_recorded_default_and_says_so(new_day, age):
    day = new_day(defaults={"orders": 5.0, "returns": None, "load": 9.0})
    if age:
        day.row(NOON - age, 3.0, 3.0)
    day.ask(NOON, None if age is None else NOON - age, 5.0, None, imputed=True, load=9.0)
    assert day.judged().kinds == {}


def test_a_view_that_is_served_when_stale_may_be_old(new_day):
    day = new_day("serve")
    day.row(NOON - 9 * HOUR, 3.0, 3.0)
    day.ask(NOON, NOON - 9 * HOUR, 3.0, 3.0)
    assert day.judged().kinds == {}


def test_either_of_two_versions_of_a_row_may_be_served_while_the_correction_is_on_its_way(day):
    day.row(NOON, 99.0, 12 / 3, NOON + 20 * MINUTE)
    day.ask(NOON + 25 * MINUTE, NOON, 12.0, 12 / 3)
    day.ask(NOON + 25 * MINUTE, NOON, 99.0, 12 / 3)
    assert day.judged().kinds == {}


def test_two_nan_are_one_but_the_zeros_have_signs(new_day):
    day = new_day()
    day.row(NOON, 0.0, NAN)
    day.ask(NOON + MINUTE, NOON, 0.0, None)
    assert day.judged().kinds == {}
    day.ask(NOON + MINUTE, NOON, -0.0, None)
    assert day.judged().kinds == {"value_differs": 1}


def test_every_age_up_to_seventy_one_years_gives_its_microsecond_back():
    ages = np.random.default_rng(0).integers(0, 2**51, 200_000)
    assert (np.rint(ages / 1e6 * 1e6).astype(np.int64) == ages).all()
    assert json.loads(json.dumps((ages[:1000] / 1e6).tolist())) == (ages[:1000] / 1e6).tolist()


# --- any store, honest or not -------------------------------------------------------------------------------------------

MINUTES = st.integers(0, 120)
# (event, available after, on its way online for, value): the last is what tells rows apart.
ROWS = st.lists(st.tuples(MINUTES, st.integers(0, 60), st.integers(0, 60), st.integers(0, 3)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.integers(0, 240), st.integers(1, 60))
def test_a_store_that_keeps_the_budget_is_never_accused_and_one_that_does_not_always_is(new_day, rows, asked, budget_min):
    """Rows reach a store that keeps the newest by (event, created), each in its own time; a request reads what is there.

    The oracle goes through the rows one by one: a served row must have been available, and nothing newer within the ttl
    (three hours) may have been available for longer than the budget.
    """
    day = new_day()
    day.propagation = budget_min * MINUTE
    table = {(e, e + c): (v, e + c + way) for e, c, way, v in rows}  # (event, created) is the key of a row
    for (event, created), (value, _) in table.items():
        day.row(NOON + event * MINUTE, float(value), float(event), NOON + created * MINUTE)
    there = max((key for key, (_, readable) in table.items() if readable <= asked), default=None)
    overdue = [key for key in table if key[1] < asked - budget_min and asked - key[0] <= 180]
    if there is None or asked - there[0] > 180:
        event = None if there is None else NOON + there[0] * MINUTE
        day.ask(NOON + asked * MINUTE, event, None, None, imputed=True, load=NAN)
        accused = bool(overdue) if there is None else any(key > there for key in overdue)
    else:
        day.ask(NOON + asked * MINUTE, NOON + there[0] * MINUTE, float(table[there][0]), float(there[0]))
        # A correction that brought the same values back changed nothing that was served.
        same = max(key for key in table if key[0] == there[0] and table[key][0] == table[there][0] and key[1] <= asked)
        accused = any(key > same for key in overdue)
    assert bool(day.judged().mismatched) == accused


# --- the summary ----------------------------------------------------------------------------------------------------


def test_an_example_says_what_was_served_what_was_right_and_when(day):
    day.row(NOON, 12.5, 12 / 3, NOON + 5 * MINUTE)
    day.ask(NOON + 36 * MINUTE, NOON, 12.0, 12 / 3)
    [example] = day.judged().examples
    assert example == {
        "fault": "correction_lost",
        "source": "totals",
        "request_id": "r0",
        "input_index": 0,
        "version": 1,
        "requested_at": "2024-05-03T12:36:00+00:00",
        "entity": {"shop": "a"},
        "served": {"orders": 12.0},
        "rebuilt": {"orders": 12.5},
        "served_event": "2024-05-03T12:00:00+00:00",
        "expected_event": "2024-05-03T12:00:00+00:00",
        "expected_created": "2024-05-03T12:05:00+00:00",
    }


def test_mismatches_are_counted_by_feature_and_source(day):
    for number in range(4):
        day.ask(NOON + 10 * MINUTE, NOON, 12.0 + (number == 3), 12 / 3)
    found = day.judged()
    assert {f["feature"]: f["mismatches"] for f in found.by_feature if f["mismatches"]} == {"orders": 1}
    [source] = [s for s in found.by_source if s["source"] == "totals"]
    assert (source["compared"], source["mismatches"], source["rate"], source["kinds"]) == (4, 1, 0.25, {"value_differs": 1})
    assert found.rate == 0.25


def test_a_function_that_is_not_given_is_left_out_of_the_comparison(day):
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, twice=3.0)
    day.functions = {}
    assert day.judged().kinds == {}


def test_a_given_feature_is_no_fault_but_the_one_beside_it_is(day):
    day.ask(NOON + 10 * MINUTE, NOON, 77.0, 12 / 3, given=("orders",))
    assert (day.judged().kinds, day.judged().given) == ({}, 1)
    day.ask(NOON + 10 * MINUTE, NOON, 77.0, 9.9, given=("orders",))
    found = day.judged()
    assert found.kinds == {"value_differs": 1}
    assert {f["feature"] for f in found.by_feature if f["mismatches"]} == {"returns"}


def test_the_same_value_that_nobody_gave_is_a_fault(day):
    day.ask(NOON + 10 * MINUTE, NOON, 77.0, 12 / 3)
    assert day.judged().kinds == {"value_differs": 1}


def test_a_view_that_was_not_read_since_all_of_it_was_given_is_not_asked_for(day):
    day.ask(NOON + 10 * MINUTE, None, 77.0, 7.0, twice=5.0, given=("orders", "returns", "minute", "twice"))
    found = day.judged()
    assert (found.kinds, found.given) == ({}, 1)
    assert "totals" not in {s["source"] for s in found.by_source}


def test_a_view_that_a_function_still_takes_was_read_and_is_compared(day):
    day.ask(NOON + 10 * MINUTE, None, 77.0, 7.0, given=("orders", "returns"))
    assert day.judged().kinds == {"default_filled_silently": 1}


def test_what_a_function_is_given_is_what_was_read_not_what_stood_in_the_request(day):
    day.contract = day.contract.model_copy(
        update={
            "features": tuple(f.model_copy(update={"column": "load"}) if f.name == "returns" else f for f in day.contract.features),
        }
    )
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 55.0, given=("returns",))  # the load is 1.0, and `twice` follows from that
    assert day.judged().kinds == {}


@pytest.mark.parametrize(("name", "value"), [("price", 99.0), ("channel", 0.0), ("minute", -3.0)])
def test_given_request_features_are_no_faults(day, name, value):
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, given=(name,), **{name: value})
    assert day.judged().kinds == {}


def test_the_answer_is_compared_whatever_was_given(day):
    day.ask(NOON + 10 * MINUTE, NOON, 77.0, 12 / 3, given=("orders",))
    assert day.judged(lambda matrix: matrix[:, 2] * 0 + 0.9).kinds == {"prediction_differs": 1}


def test_a_view_without_entities_is_compared_too(day):
    view = day.contract.views[0].model_copy(update={"join_keys": ()})
    day.contract = day.contract.model_copy(update={"views": (view,)})
    day.ask(NOON + 5 * MINUTE, NOON, 12.0, 12 / 3)
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.0, 11 / 3)
    day.ask(NOON + 10 * MINUTE, NOON - 2 * HOUR, 12.0, 12 / 3)
    assert day.judged().kinds == {"newer_value_lost": 1, "time_shift": 1}


def test_an_empty_table_and_an_empty_log_are_compared_without_complaint(new_day):
    assert (new_day().judged().compared, new_day().judged().rate) == (0, 0.0)
    day = new_day()
    day.ask(NOON, None, None, None, imputed=True, load=NAN)
    assert day.judged().kinds == {}


def test_a_vector_of_another_length_is_an_error(day):
    day.ask(NOON, NOON, 12.0, 4.0)
    day.log[0]["features"] = [1.0]
    with pytest.raises(ValueError, match="6 features"):
        day.judged()


# --- what is judged -------------------------------------------------------------------------------------------------


def test_all_predictions_are_judged_up_to_the_declared_number_and_a_seeded_sample_above():
    log = pl.DataFrame({"request_id": [f"r{n}" for n in range(50)], "input_index": [0] * 50})
    assert skew.chosen(log, SkewPolicy(sample_rows=50)).height == 50
    few = skew.chosen(log, SkewPolicy(sample_rows=20))
    assert few.height == few.n_unique() == 20
    assert few.equals(skew.chosen(log.sample(fraction=1.0, shuffle=True, seed=3), SkewPolicy(sample_rows=20)))
    assert not few.equals(skew.chosen(log, SkewPolicy(sample_rows=20, seed=1)))


def test_predictions_before_a_fault_was_mended_are_not_judged():
    assert skew.judged_window(SkewPolicy(), NOON) == (NOON - timedelta(days=7), NOON)
    mended = SkewPolicy(ignore_before=NOON - HOUR)
    assert skew.judged_window(mended, NOON) == (NOON - HOUR, NOON)
    assert skew.judged_window(mended, NOON + timedelta(days=30))[0] == NOON + timedelta(days=23)
    assert skew.judged_window(mended, NOON - 2 * HOUR) == (NOON - 2 * HOUR, NOON - 2 * HOUR)


def test_the_plot_is_a_picture_with_and_without_faults(day):
    assert skew_plot(day.judged()).startswith(b"\x89PNG")
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.0, 11 / 3)
    assert skew_plot(day.judged()).startswith(b"\x89PNG")
