"""Time-ordered folds of the range a study may look at.

Belongs here: which rows a fold fits on and which it is judged by. Does not belong here: the test part, which no fold sees.
"""

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import polars as pl

from mlplatform.specs import ModelSpec
from mlplatform.training.dataset import DAY, Dataset, to_matrix
from mlplatform.training.trainers.base import Matrix


@dataclass(frozen=True)
class Fold:
    """Fit on days [start, boundary), judge on [boundary, end)."""

    start: date
    boundary: date
    end: date
    train: Matrix
    validate: Matrix


def boundaries(start: date, validate_start: date, end: date, folds: int) -> list[tuple[date, date]]:
    """The judged windows [boundary, end) of an expanding window, oldest first.

    Each is as long as the split's validation part and the last one is that part, unless the folds would then leave the
    first one nothing to fit on: then the range is cut into folds + 1 equal pieces.

    Raises ValueError where the range has fewer days than folds + 1.
    """
    days = (end - start).days
    length = min((end - validate_start).days, days // (folds + 1))
    if length < 1:
        raise ValueError(f"{days} days from {start} to {end} are too few for {folds} folds")
    ends = [end - timedelta(days=length * k) for k in reversed(range(folds))]
    return [(last - timedelta(days=length), last) for last in ends]


def build(spec: ModelSpec, dataset: Dataset) -> list[Fold]:
    """The folds of `spec.tuning` over train and validate, each sampled down to `max_rows` rows (seeded, in time order).

    Categories are the whole train part's, so that all folds share one encoding.
    """
    split = spec.split
    frame = dataset.part("train", "validate")
    categories = dataset.categories()
    folds = []
    for number, (boundary, end) in enumerate(boundaries(split.train_start, split.validate_start, split.test_start, spec.tuning.folds)):
        rows = _sample(frame.filter(pl.col(DAY) < end), spec.tuning.max_rows, (spec.seed, number))
        train = to_matrix(rows.filter(pl.col(DAY) < boundary), dataset.numeric, categories)
        validate = to_matrix(rows.filter(pl.col(DAY) >= boundary), dataset.numeric, categories)
        for name, matrix in (("fits on", train), ("is judged on", validate)):
            if len(np.unique(matrix.label)) < 2:
                raise ValueError(f"model {spec.name}: fold {number} {name} rows of one label only ({matrix.rows} rows until {end})")
        folds.append(Fold(split.train_start, boundary, end, train, validate))
    return folds


def _sample(rows: pl.DataFrame, most: int | None, seed: tuple[int, int]) -> pl.DataFrame:
    if most is None or rows.height <= most:
        return rows
    # NumPy's generator, because its stream is promised to stay the same from release to release (NEP 19 for PCG64 bits).
    chosen = np.sort(np.random.Generator(np.random.PCG64(list(seed))).permutation(rows.height)[:most])
    return rows[chosen]
