"""Each prediction has one outcome row; a late label restates exactly the days it touches."""

from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.monitoring.outcomes import days_to_rewrite, join_outcomes, outcome_columns
from mlplatform.specs import RequestField

START = datetime(2024, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
UTC_US = pl.Datetime("us", "UTC")


def predictions(rows: list[tuple[str | None, int]]) -> pl.DataFrame:
    """(key, hour it was asked for) each."""
    return pl.DataFrame(
        {
            "request_id": [f"r{k}" for k in range(len(rows))],
            "input_index": [0] * len(rows),
            "variant": ["champion"] * len(rows),
            "requested_at": [START + hour * HOUR for _, hour in rows],
            "prediction": [0.5] * len(rows),
            "key": [key for key, _ in rows],
        },
        schema={
            "request_id": pl.String,
            "input_index": pl.Int64,
            "variant": pl.String,
            "requested_at": UTC_US,
            "prediction": pl.Float64,
            "key": pl.String,
        },
    ).with_columns(pl.col("requested_at").dt.date().alias("event_date"))


def labels(rows: list[tuple[str | None, int | None, int]]) -> pl.DataFrame:
    """(key, label, hour it became known) each."""
    return pl.DataFrame(
        {"key": [r[0] for r in rows], "label": [r[1] for r in rows], "label_known_at": [START + r[2] * HOUR for r in rows]},
        schema={"key": pl.String, "label": pl.Int8, "label_known_at": UTC_US},
    )


def joined(asked: list[tuple[str | None, int]], known: list[tuple[str | None, int | None, int]], now: int, delay: int = 10) -> pl.DataFrame:
    return join_outcomes(predictions(asked), labels(known), ["key"], START + now * HOUR, delay * HOUR)


def test_a_prediction_is_pending_then_known_and_missing_when_the_label_stays_out() -> None:
    asked, known = [("a", 0), ("b", 0)], [("a", 1, 4)]
    assert joined(asked, known, now=3)["state"].to_list() == ["pending", "pending"]
    assert joined(asked, known, now=4)["state"].to_list() == ["known", "pending"]
    assert joined(asked, known, now=11)["state"].to_list() == ["known", "missing"]
    assert joined(asked, known, now=4)["label"].to_list() == [1.0, None]


def test_a_missing_label_that_comes_after_all_makes_the_prediction_known() -> None:
    assert joined([("a", 0)], [("a", 0, 50)], now=60)["state"].to_list() == ["known"]


def test_a_label_known_in_the_future_is_not_used() -> None:
    assert joined([("a", 0)], [("a", 1, 9)], now=8)["label"].to_list() == [None]


def test_of_two_labels_the_one_known_last_counts() -> None:
    known = [("a", 1, 2), ("a", 0, 5)]
    assert joined([("a", 0)], known, now=4)["label"].to_list() == [1.0]
    assert joined([("a", 0)], known, now=6)["label"].to_list() == [0.0]


def test_labels_that_contradict_each_other_at_one_moment_are_an_error() -> None:
    with pytest.raises(ValueError, match="two labels"):
        joined([("a", 0)], [("a", 1, 2), ("a", 0, 2)], now=4)
    assert joined([("a", 0)], [("a", 1, 2), ("a", 1, 2)], now=4)["label"].to_list() == [1.0]


keys = st.sampled_from(["a", "b", "c", None])


@given(
    st.lists(st.tuples(keys, st.integers(0, 72)), max_size=20),
    st.dictionaries(keys, st.tuples(st.sampled_from([0, 1, None]), st.integers(0, 90))),
    st.integers(0, 120),
)
def test_no_prediction_is_lost_or_doubled_and_each_is_in_the_state_brute_force_says(
    asked: list[tuple[str | None, int]], known: dict[str | None, tuple[int | None, int]], now: int
) -> None:
    found = joined(asked, [(k, label, hour) for k, (label, hour) in known.items()], now)
    assert found["request_id"].to_list() == [f"r{k}" for k in range(len(asked))]
    for (key, hour), state, label in zip(asked, found["state"], found["label"], strict=True):
        truth, known_at = known.get(key, (None, 0)) if key is not None else (None, 0)
        if truth is not None and known_at <= now:
            assert (state, label) == ("known", truth)
        else:
            assert (state, label) == ("missing" if hour + 10 < now else "pending", None)


def test_only_the_days_a_late_label_touches_are_rewritten() -> None:
    asked = [("a", 1), ("b", 25), ("c", 49), ("d", 50)]
    before = joined(asked, [("a", 1, 4), ("c", 1, 55)], now=56, delay=100)
    assert days_to_rewrite(before, None) == (date(2024, 5, 1), date(2024, 5, 2), date(2024, 5, 3))
    assert days_to_rewrite(before, before) == ()
    late = joined(asked, [("a", 1, 4), ("c", 1, 55), ("b", 0, 57)], now=58, delay=100)
    assert days_to_rewrite(late, before) == (date(2024, 5, 2),)


def test_corrections_new_predictions_and_labels_gone_missing_restate_their_days() -> None:
    asked = [("a", 1), ("b", 25)]
    before = joined(asked, [("a", 1, 4)], now=30)
    assert days_to_rewrite(joined(asked, [("a", 1, 4), ("a", 0, 31)], now=31), before) == (date(2024, 5, 1),)
    assert days_to_rewrite(joined(asked, [("a", 1, 4)], now=36), before) == (date(2024, 5, 2),)
    assert days_to_rewrite(joined([*asked, ("c", 49)], [("a", 1, 4)], now=30), before) == (date(2024, 5, 3),)
    assert days_to_rewrite(joined(asked[:1], [("a", 1, 4)], now=30), before) == (date(2024, 5, 2),)


def test_keys_of_like_types_meet_whatever_their_units() -> None:
    rows = predictions([("a", 0)]).with_columns(pl.lit(START).dt.cast_time_unit("us").alias("leaves_at"))
    known = labels([("a", 1, 1)]).with_columns(
        pl.col("key").cast(pl.Categorical),
        pl.lit(START).dt.cast_time_unit("ms").alias("leaves_at"),
        pl.col("label_known_at").dt.cast_time_unit("ms"),
    )
    assert join_outcomes(rows, known, ["key", "leaves_at"], START + HOUR, HOUR)["label"].to_list() == [1.0]


def test_a_key_that_no_request_carries_is_refused_by_name() -> None:
    fields = tuple(RequestField(name=n, dtype="string", description="", example="x") for n in ("town", "tram", "stop"))
    assert [f.name for f in outcome_columns(("tram", "town"), ("stop", "elsewhere"), fields)] == ["town", "tram", "stop"]
    with pytest.raises(ValueError, match="trip_id"):
        outcome_columns(("trip_id",), (), fields)
    with pytest.raises(ValueError, match="trip_id"):
        join_outcomes(predictions([("a", 0)]), labels([]), ["trip_id"], START, HOUR)
