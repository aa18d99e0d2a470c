"""What of a fresh computation is appended, and with which `created`."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mlplatform.features.restate import rows_to_append

T0 = datetime(2024, 5, 1, tzinfo=UTC)
NOW = T0 + timedelta(days=2)
SCHEMA = {"shop": pl.String, "event_timestamp": pl.Datetime("us", "UTC"), "x": pl.Float64, "y": pl.Float64}


def computed(*rows: tuple[str | None, int, float | None, float | None]) -> pl.DataFrame:
    """(shop, hour, x, y)."""
    return pl.DataFrame([(s, T0 + timedelta(hours=h), x, y) for s, h, x, y in rows], schema=SCHEMA, orient="row")


def append(new: pl.DataFrame, old: pl.DataFrame, live_since: datetime | None = None, now: datetime = NOW) -> pl.DataFrame:
    found = rows_to_append(new, old, ["shop"], ["x", "y"], now=now, live_since=live_since)
    assert found.columns == ["shop", "event_timestamp", "created", "x", "y"]
    return found.sort("event_timestamp", "shop")


def test_into_an_empty_table_everything_is_history():
    rows = append(computed(("a", 1, 1.0, None), ("b", 2, 2.0, 3.0)), pl.DataFrame())
    assert (rows["created"] == rows["event_timestamp"]).all()
    assert rows.height == 2


def test_ticks_from_the_live_time_on_are_created_now():
    rows = append(computed(("a", 1, 1.0, 1.0), ("a", 2, 1.0, 1.0), ("a", 3, 1.0, 1.0)), pl.DataFrame(), T0 + timedelta(hours=2))
    assert rows["created"].to_list() == [T0 + timedelta(hours=1), NOW, NOW]


def test_a_replay_appends_nothing_nulls_and_nans_included():
    new = computed(("a", 1, None, float("nan")), (None, 2, 1.0, 2.0))
    assert append(new, append(new, pl.DataFrame())).is_empty()


@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (None, 2.0), (1.0, None), (1.0, float("nan"))])
def test_a_changed_value_is_a_correction_of_now(before, after):
    old = append(computed(("a", 1, before, 5.0)), pl.DataFrame())
    rows = append(computed(("a", 1, after, 5.0)), old)
    assert rows["created"].to_list() == [NOW]
    assert_frame_equal(rows.select("x"), pl.DataFrame({"x": [after]}, schema={"x": pl.Float64}))


def test_only_what_is_new_or_changed_is_appended():
    old = append(computed(("a", 1, 1.0, 1.0), ("b", 1, 1.0, 1.0)), pl.DataFrame())
    rows = append(computed(("a", 1, 1.0, 1.0), ("b", 1, 9.0, 1.0), ("c", 1, 3.0, 3.0)), old)
    assert rows.select("shop", "x").rows() == [("b", 9.0), ("c", 3.0)]


def test_a_row_that_a_late_event_adds_to_a_day_already_written_was_not_there_before():
    """Backdated, it would look as if it could have been served then, and training would use what nobody knew."""
    old = append(computed(("a", 1, 1.0, 1.0)), pl.DataFrame())
    rows = append(computed(("a", 1, 1.0, 1.0), ("c", 1, 3.0, 3.0), ("c", 23, 3.0, 3.0), ("c", 24, 3.0, 3.0)), old)
    assert rows["created"].to_list() == [NOW, NOW, T0 + timedelta(hours=24)]


def test_a_row_no_longer_computed_is_withdrawn_once():
    old = append(computed(("a", 1, 1.0, 1.0), ("b", 1, 2.0, 2.0)), pl.DataFrame())
    gone = append(computed(("b", 1, 2.0, 2.0)), old)
    assert gone.select("shop", "x", "y", "created").rows() == [("a", None, None, NOW)]
    assert append(computed(("b", 1, 2.0, 2.0)), pl.concat([old, gone]), now=NOW + timedelta(hours=1)).is_empty()


def test_everything_can_be_withdrawn():
    old = append(computed(("a", 1, 1.0, 1.0)), pl.DataFrame())
    assert append(computed(), old)["x"].to_list() == [None]


def test_a_withdrawn_row_comes_back_as_a_correction():
    old = append(computed(("a", 1, 1.0, 1.0)), pl.DataFrame())
    gone = append(computed(), old)
    later = NOW + timedelta(hours=3)
    back = append(computed(("a", 1, 1.0, 1.0)), pl.concat([old, gone]), now=later)
    assert back.select("x", "created").rows() == [(1.0, later)]


def test_the_newest_of_several_corrections_is_compared():
    first = append(computed(("a", 1, 1.0, 1.0)), pl.DataFrame())
    second = append(computed(("a", 1, 2.0, 1.0)), first)
    table = pl.concat([first, second])
    assert append(computed(("a", 1, 2.0, 1.0)), table, now=NOW + timedelta(hours=1)).is_empty()
    assert append(computed(("a", 1, 1.0, 1.0)), table, now=NOW + timedelta(hours=1)).height == 1


def test_new_ticks_beside_existing_ones_follow_the_live_time():
    old = append(computed(("a", 1, 1.0, 1.0)), pl.DataFrame())
    rows = append(computed(("a", 1, 1.0, 1.0), ("a", 5, 1.0, 1.0)), old, T0 + timedelta(hours=4))
    assert rows.select("event_timestamp", "created").rows() == [(T0 + timedelta(hours=5), NOW)]
