"""Nulls, quantiles, histograms and the picture of a view's values."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

from mlplatform.features import profile as module
from mlplatform.features.plots import distributions
from mlplatform.features.profile import BINS, QUANTILES, newest_versions, profile, recent_days, sample
from mlplatform.figures import MAX_MARKDOWN_BYTES, markdown

NOON = datetime(2024, 5, 3, 12, tzinfo=UTC)


def test_nulls_quantiles_and_counts_are_those_of_the_values():
    [found] = profile(pl.DataFrame({"x": [None, *range(101)]}, schema={"x": pl.Float64}), ["x"])
    assert (found.rows, found.nulls, found.null_share) == (102, 1, 1 / 102)
    assert dict(zip(QUANTILES, found.quantiles, strict=True)) == {0.0: 0, 0.05: 5, 0.25: 25, 0.5: 50, 0.75: 75, 0.95: 95, 1.0: 100}
    assert len(found.counts) == BINS
    assert sum(found.counts) == 101


def test_an_outlier_does_not_squeeze_the_rest_into_one_bin():
    values = [*np.linspace(0, 1, 999), 1e9]
    [found] = profile(pl.DataFrame({"x": values}), ["x"])
    assert found.edges[1] < 1
    assert max(found.counts) < 100
    assert found.quantiles[-1] == 1e9


def test_a_constant_is_one_bar_and_a_column_of_nulls_is_none():
    constant, nothing = profile(pl.DataFrame({"c": [2.0] * 5, "n": [None] * 5}, schema={"c": pl.Float64, "n": pl.Float64}), ["c", "n"])
    assert [n for n in constant.counts if n] == [5]
    assert (nothing.nulls, nothing.quantiles, nothing.counts) == (5, (), ())


def test_no_rows_have_no_share_of_nulls():
    [found] = profile(pl.DataFrame(schema={"x": pl.Float64}), ["x"])
    assert (found.rows, found.null_share) == (0, None)


def test_many_rows_are_sampled_but_their_nulls_are_all_counted(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_ROWS", 10)
    rows = pl.DataFrame({"x": [None] * 3 + [1.0] * 96 + [7.0]}, schema={"x": pl.Float64})
    assert sample(rows).height == 10
    [found] = profile(rows, ["x"])
    assert (found.rows, found.nulls) == (100, 3)
    assert sum(found.counts) <= 10


def test_of_corrections_the_newest_known_counts_and_withdrawn_values_do_not():
    def row(shop: str, created: datetime, x: float | None, at: datetime = NOON) -> dict[str, object]:
        return {"shop": shop, "event_timestamp": at, "created": created, "x": x}

    later, future = NOON + timedelta(hours=1), NOON + timedelta(hours=9)
    rows = pl.DataFrame(
        [
            row("a", NOON, 1.0),
            row("a", later, 2.0),
            row("a", future, 3.0),
            row("b", NOON, 1.0),
            row("b", later, None),
            row("c", future, 9.0, at=future),
        ],
        schema={"shop": pl.String, "event_timestamp": pl.Datetime("us", "UTC"), "created": pl.Datetime("us", "UTC"), "x": pl.Float64},
    )
    assert newest_versions(rows, ["shop"], ["x"], now=later).select("shop", "x").rows() == [("a", 2.0)]


def test_recent_days_end_today():
    days = recent_days(NOON)
    assert (days.first.isoformat(), days.last.isoformat()) == ("2024-04-26", "2024-05-03")


def test_the_picture_of_forty_features_fits_into_metadata_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    rows = pl.DataFrame({f"a_feature_with_a_long_name_{i}": rng.gamma(1 + i, size=2000) for i in range(39)}).with_columns(
        pl.lit(None, pl.Float64).alias("nothing")
    )
    profiles = profile(rows, rows.columns)
    picture = distributions(profiles)
    assert picture.startswith(b"\x89PNG")
    assert len(markdown(picture, "distributions")) < MAX_MARKDOWN_BYTES
    assert distributions(profiles) == picture
