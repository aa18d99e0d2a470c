"""Row accounting, the split, alignment, and encoding."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from mlplatform.fingerprint import content_hash
from mlplatform.training.dataset import MisalignedFeaturesError, assemble, manifest, reopen, to_matrix


def test_every_row_is_in_a_part_or_counted(spec, rows_and_features):
    rows, features = rows_and_features
    rows = rows.with_columns(
        pl.when(pl.int_range(pl.len()) < 7).then(None).otherwise(pl.col("label")).alias("label"),
    )
    late = rows.head(3).with_columns(
        pl.col("row_id") + "x",
        event_timestamp=pl.lit(datetime(2024, 5, 1, tzinfo=UTC)).cast(pl.Datetime("us", "UTC")),
        label=pl.lit(1, pl.Int8),
    )
    built = assemble(spec, pl.concat([rows, late]), pl.concat([features, features.head(3)]).drop("row_id", "event_timestamp"))
    counts = built.counts
    assert counts["labelled_in"] == 2403
    assert counts["unlabelled"] == 7
    assert counts["outside_split"] == 3
    assert counts["labelled_in"] == sum(counts[k] for k in ("unlabelled", "outside_split", "train", "validate", "test"))
    assert built.frame.height == counts["train"] + counts["validate"] + counts["test"]


def test_the_parts_are_cut_at_midnight_utc_of_t(dataset, spec):
    days = dataset.frame.group_by("part").agg(pl.col("event_date").min().alias("first"), pl.col("event_date").max().alias("last"))
    by_part = {part: (first, last) for part, first, last in days.iter_rows()}
    split, day = spec.split, timedelta(days=1)
    assert by_part == {
        "train": (split.train_start, split.validate_start - day),
        "validate": (split.validate_start, split.test_start - day),
        "test": (split.test_start, split.end - day),
    }


def test_a_join_that_lost_or_added_a_row_is_refused_with_both_counts(spec, rows_and_features):
    rows, features = rows_and_features
    with pytest.raises(MisalignedFeaturesError, match="2400 labelled rows went into the feature join and 2399 came out"):
        assemble(spec, rows, features.head(2399))


def test_a_join_that_reordered_rows_is_refused(spec, rows_and_features):
    rows, features = rows_and_features
    with pytest.raises(MisalignedFeaturesError, match="order"):
        assemble(spec, rows, features.reverse())


def test_duplicate_rows_strange_labels_and_missing_columns_are_refused(spec, rows_and_features):
    rows, features = rows_and_features
    with pytest.raises(ValueError, match="repeat the key"):
        assemble(spec, rows.with_columns(row_id=pl.lit("same")), features)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        assemble(spec, rows.with_columns(label=pl.lit(2)), features)
    with pytest.raises(ValueError, match=r"lack \['site'\]"):
        assemble(spec, rows.drop("site"), features)
    with pytest.raises(ValueError, match=r"did not bring \['x9'\]"):
        assemble(spec, rows, features, ["x0", "x9"])


def test_the_answer_can_never_be_a_feature(spec, rows_and_features):
    rows, features = rows_and_features
    with pytest.raises(ValueError, match="may never be a feature"):
        assemble(spec, rows, features.with_columns(label=rows["label"]), ["x0", "label"])


def test_a_split_with_an_empty_part_is_refused(spec, rows_and_features):
    rows, features = rows_and_features
    early = rows["event_timestamp"] < datetime(2024, 4, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match="no rows in test"):
        assemble(spec, rows.filter(early), features.filter(early))


def test_left_out_features_stay_out(rows_and_features, spec):
    rows, features = rows_and_features
    built = assemble(spec.model_copy(update={"left_out": ("x1",)}), rows, features)
    assert built.columns == ("x0", "x2", "x3", "x4", "x5", "site")


def test_nan_and_null_are_one_missing_value(spec, rows_and_features):
    rows, features = rows_and_features
    nan = features.with_columns(pl.col("x0").fill_null(float("nan")))
    assert content_hash(assemble(spec, rows, nan).frame) == content_hash(assemble(spec, rows, features).frame)


def test_a_declared_default_stands_for_a_missing_value_as_it_does_when_the_model_is_served(spec, rows_and_features):
    rows, features = rows_and_features
    name = next(n for n, t in features.schema.items() if t.is_float())
    holed = features.with_columns(pl.when(pl.int_range(pl.len()) % 3 == 0).then(None).otherwise(pl.col(name)).alias(name))
    without, filled, nan = (assemble(spec, rows, holed, defaults=d).frame[name] for d in (None, {name: 7.5}, {name: float("nan")}))
    assert without.null_count() >= 800
    assert filled.equals(without.fill_null(7.5))
    assert nan.equals(without)


def test_categories_come_from_the_train_part_and_anything_else_is_unknown(spec, rows_and_features):
    rows, features = rows_and_features
    test_only = pl.col("event_timestamp") >= datetime(2024, 4, 1, tzinfo=UTC)
    rows = rows.with_columns(pl.when(test_only).then(pl.lit("D")).otherwise(pl.col("site")).alias("site"))
    built = assemble(spec, rows, features.drop("site"))
    assert built.categories() == {"site": ("A", "B", "C")}
    matrix = to_matrix(built.part("test"), built.numeric, built.categories())
    assert np.isnan(matrix.values[:, -1]).all()
    train = to_matrix(built.part("train"), built.numeric, built.categories())
    assert set(train.values[:, -1]) == {0.0, 1.0, 2.0}


def test_the_manifest_says_what_the_set_was_made_from(spec, dataset):
    told = manifest(spec, dataset, {"offline/x": ("id", 3)}, ("def f(): ...",))
    assert told.rows == dataset.frame.height == 2400
    assert told.content_hash == content_hash(dataset.frame)
    assert told.null_shares["x0"] == pytest.approx(0.05, abs=0.02)
    assert told.null_shares["site"] == 0
    assert told.base_rate == pytest.approx(float(dataset.frame["label"].mean()))
    assert told.split["test_start"] == "2024-04-01"
    assert told.delta_versions == {"offline/x": ("id", 3)}


def test_a_stored_set_reopens_as_it_was_and_a_changed_one_does_not(spec, dataset):
    told = manifest(spec, dataset, {})
    again = reopen(spec, dataset.frame.sample(fraction=1.0, shuffle=True, seed=3), told)
    assert again.frame.equals(dataset.frame)
    assert again.columns == dataset.columns
    with pytest.raises(ValueError, match="content hash"):
        reopen(spec, dataset.frame.head(-1), told)
