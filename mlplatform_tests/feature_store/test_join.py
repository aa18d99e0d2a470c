"""The point-in-time join against a brute-force oracle that tries every stored row for every question."""

import os
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.feature_store.join import TIME, JoinKeyTypeError, latest_known, newest

EXAMPLES = int(os.environ.get("MLPLATFORM_TEST_EXAMPLES", "10000"))
START = datetime(2013, 1, 1, tzinfo=UTC)

# Few minutes and few keys, so that ties, late rows and repeats are common. One draw makes a row, which keeps ten thousand cases cheap.
MINUTES, TEXT, WHOLE = range(13), ("a", "b", "ab", None), (0, 1, 11, None)
DELAYS = (*[0] * 10, *range(-2, 13))
question = st.sampled_from(list(product(TEXT, WHOLE, MINUTES)))
stored = st.sampled_from(list(product(TEXT, WHOLE, MINUTES, DELAYS)))
time_to_live = st.sampled_from([None, timedelta(0), timedelta(minutes=1), timedelta(minutes=4)])


def at(minutes: int) -> datetime:
    return START + timedelta(minutes=minutes)


def frames(questions: list, rows: list) -> tuple[pl.DataFrame, pl.DataFrame]:
    asked = pl.DataFrame(
        {"name": [q[0] for q in questions], "number": [q[1] for q in questions], "t": [at(q[2]) for q in questions]},
        schema={"name": pl.String, "number": pl.Int32, "t": TIME},
    )
    have = pl.DataFrame(
        {
            "who": [r[0] for r in rows],
            "n": [r[1] for r in rows],
            "known": [at(r[2]) for r in rows],
            "made": [at(r[2] + r[3]) for r in rows],
        },
        schema={"who": pl.String, "n": pl.Int64, "known": TIME, "made": TIME},
    )
    return asked, have


def expected(oracle: Any, questions: list, rows: list, keys: int, ttl: timedelta | None, later: bool) -> list[int | None]:
    limit = None if ttl is None else ttl // timedelta(minutes=1)
    found: list[int | None] = oracle(questions, [(*r[:3], r[2] + r[3]) for r in rows], keys, limit, later)
    return found


@pytest.mark.timeout(600)
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(question, max_size=12), st.lists(stored, max_size=20), st.integers(0, 2), time_to_live, st.booleans())
def test_every_question_gets_the_row_the_oracle_finds(
    oracle: Any, questions: list, rows: list, keys: int, ttl: timedelta | None, later: bool
) -> None:
    asked, have = frames(questions, rows)
    on = dict(list({"name": "who", "number": "n"}.items())[:keys])
    found = latest_known(asked, have, on=on, at="t", event="known", created="made", ttl=ttl, later_corrections=later)
    assert found.dtype == pl.get_index_type()
    assert found.to_list() == expected(oracle, questions, rows, keys, ttl, later)


@settings(max_examples=EXAMPLES // 20, deadline=None)
@given(st.lists(question, max_size=8), st.lists(stored, max_size=12), time_to_live)
def test_without_a_created_column_only_the_event_time_counts(oracle: Any, questions: list, rows: list, ttl: timedelta | None) -> None:
    asked, have = frames(questions, rows)
    found = latest_known(asked, have, on={"name": "who"}, at="t", event="known", created=None, ttl=ttl)
    assert found.to_list() == expected(oracle, questions, [(*r[:3], 0) for r in rows], 1, ttl, True)


@settings(max_examples=EXAMPLES // 20, deadline=None)
@given(st.lists(stored, max_size=20))
def test_the_newest_row_is_the_one_a_question_after_everything_gets(rows: list) -> None:
    _, have = frames([], rows)
    asked = have.select("who", "n").unique().drop_nulls().with_columns(pl.lit(at(100)).alias("t"))
    numbered = have.with_row_index("row")
    answers = latest_known(asked, have, on={"who": "who", "n": "n"}, at="t", event="known", created="made")
    got = newest(numbered, keys=["who", "n"], event="known", created="made")
    assert sorted(got.get_column("row")) == sorted(answers)


def test_a_late_older_row_does_not_hide_the_newer_one() -> None:
    asked, have = frames([("a", 0, 9)], [("a", 0, 5, 0), ("a", 0, 3, 5)])
    assert latest_known(asked, have, on={"name": "who"}, at="t", event="known", created="made").to_list() == [0]


def test_a_newer_row_not_yet_created_leaves_the_older_one_in_use() -> None:
    asked, have = frames([("a", 0, 6), ("a", 0, 9)], [("a", 0, 2, 0), ("a", 0, 5, 3)])
    assert latest_known(asked, have, on={"name": "who"}, at="t", event="known", created="made").to_list() == [0, 1]


def test_categorical_and_small_integer_keys_join_plain_ones() -> None:
    asked, have = frames([("a", 1, 6)], [("a", 1, 2, 0)])
    asked = asked.with_columns(pl.col("name").cast(pl.Categorical), pl.col("number").cast(pl.UInt8))
    assert latest_known(asked, have, on={"name": "who", "number": "n"}, at="t", event="known", created="made").to_list() == [0]


def test_integer_keys_that_pandas_made_floats_still_join() -> None:
    asked, have = frames([("a", 1, 6)] * 3, [("a", 1, 2, 0)])
    asked = asked.with_columns(pl.Series("number", [1.0, float("nan"), 1.5]))
    assert latest_known(asked, have, on={"number": "n"}, at="t", event="known", created="made").to_list() == [0, None, None]


def test_keys_of_different_types_are_refused() -> None:
    asked, have = frames([("a", 1, 6)], [("a", 1, 2, 0)])
    with pytest.raises(JoinKeyTypeError, match="join key name"):
        latest_known(asked, have, on={"name": "n"}, at="t", event="known", created="made")


def test_a_question_without_a_time_is_refused() -> None:
    asked, have = frames([("a", 1, 6)], [("a", 1, 2, 0)])
    with pytest.raises(ValueError, match="column t has nulls"):
        latest_known(asked.with_columns(pl.lit(None, TIME).alias("t")), have, on={"name": "who"}, at="t", event="known", created="made")
