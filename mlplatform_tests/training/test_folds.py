"""Folds look backward only, and never at the test part."""

from datetime import date

import numpy as np
import pytest

from mlplatform.specs import TuningSpec
from mlplatform.training import folds


def test_the_last_window_is_the_validation_part_and_the_others_precede_it():
    windows = folds.boundaries(date(2013, 1, 1), date(2013, 7, 1), date(2013, 8, 1), 3)
    assert windows[-1] == (date(2013, 7, 1), date(2013, 8, 1))
    assert [end for _, end in windows[:-1]] == [start for start, _ in windows[1:]]


def test_a_long_validation_part_leaves_the_first_fold_something_to_fit_on():
    windows = folds.boundaries(date(2013, 1, 1), date(2013, 1, 3), date(2013, 1, 10), 2)
    assert windows == [(date(2013, 1, 4), date(2013, 1, 7)), (date(2013, 1, 7), date(2013, 1, 10))]


def test_too_few_days_are_refused():
    with pytest.raises(ValueError, match="too few for 3 folds"):
        folds.boundaries(date(2013, 1, 1), date(2013, 1, 2), date(2013, 1, 3), 3)


def test_every_row_a_fold_fits_on_is_before_the_rows_it_is_judged_on(spec, dataset):
    for fold in folds.build(spec.model_copy(update={"tuning": TuningSpec(folds=3, max_rows=None)}), dataset):
        assert fold.start < fold.boundary < fold.end <= spec.split.test_start
        days = dataset.part("train", "validate")["event_date"]
        assert fold.train.rows == int(days.is_between(fold.start, fold.boundary, closed="left").sum())
        assert fold.validate.rows == int(days.is_between(fold.boundary, fold.end, closed="left").sum())


def test_sampling_is_bounded_seeded_and_keeps_time_order(spec, dataset):
    small = spec.model_copy(update={"tuning": TuningSpec(folds=2, max_rows=300)})
    first, again = folds.build(small, dataset), folds.build(small, dataset)
    assert all(f.train.rows + f.validate.rows == 300 for f in first)
    assert all(np.array_equal(a.train.values, b.train.values, equal_nan=True) for a, b in zip(first, again, strict=True))
    other = folds.build(small.model_copy(update={"seed": 1}), dataset)
    assert not np.array_equal(first[0].train.values, other[0].train.values, equal_nan=True)
