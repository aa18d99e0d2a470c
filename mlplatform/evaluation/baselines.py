"""What a model must beat: predictions that know little, or that a textbook would make.

Belongs here: baselines fitted on the training rows and asked for the test rows. Does not belong here: the model itself.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from mlplatform.evaluation.metrics import Floats

LABEL = "label"
MAX_FIT_ROWS = 60_000


def baseline_predictions(
    train: pl.DataFrame, test: pl.DataFrame, numeric: Sequence[str], categorical: Sequence[str] = (), seed: int = 0
) -> dict[str, Floats]:
    """Predictions for the test rows by name of the baseline: `constant` and `logistic`.

    `train` has the features and `label` (0 or 1), `test` the features.
    """
    return {"constant": constant(train, test.height), "logistic": logistic(train, test, numeric, categorical, seed)}


def constant(train: pl.DataFrame, rows: int) -> Floats:
    """The training rows' base rate, `rows` times. Raises ValueError without a training row."""
    if train.is_empty():
        raise ValueError("no training rows to take a base rate from")
    return np.full(rows, float(train[LABEL].cast(pl.Float64).to_numpy().mean()))


def constant_quantiles(train: pl.DataFrame, rows: int, levels: Sequence[float]) -> Floats:
    """The training labels' quantiles at `levels`, (rows, levels). Raises ValueError without a training row."""
    if train.is_empty():
        raise ValueError("no training rows to take quantiles from")
    return np.tile(np.quantile(train[LABEL].cast(pl.Float64).to_numpy(), levels), (rows, 1))


def logistic(train: pl.DataFrame, test: pl.DataFrame, numeric: Sequence[str], categorical: Sequence[str] = (), seed: int = 0) -> Floats:
    """L2 logistic regression on standardised features, medians in place of missing values, categories one-hot.

    Fitted on at most MAX_FIT_ROWS training rows, sampled with `seed`: a baseline must be cheap. Categories rarer than
    20 rows, and those the training rows lack, share one column. Raises ValueError where training has a single class.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    sampled = train.sample(MAX_FIT_ROWS, seed=seed) if train.height > MAX_FIT_ROWS else train
    width = len(numeric)
    # A column empty in training would be dropped with a warning; kept, it is a constant and weighs nothing.
    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    groups = OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False)
    parts = [("numbers", numbers, slice(0, width)), ("groups", groups, slice(width, width + len(categorical)))]
    prepare = ColumnTransformer([part for part, used in zip(parts, (numeric, categorical), strict=True) if used])
    model = make_pipeline(prepare, LogisticRegression(max_iter=500, tol=1e-3))
    model.fit(_matrix(sampled, numeric, categorical), sampled[LABEL].cast(pl.Int8).to_numpy())
    predictions: Floats = model.predict_proba(_matrix(test, numeric, categorical))[:, 1]
    return predictions


def _matrix(frame: pl.DataFrame, numeric: Sequence[str], categorical: Sequence[str]) -> np.ndarray:
    """Numbers first, then categories as text, shape (n, columns); an object array only where there are categories."""
    matrix = np.empty((frame.height, len(numeric) + len(categorical)), dtype=object if categorical else np.float64)
    for k, name in enumerate(numeric):
        values = frame[name].cast(pl.Float64).to_numpy()
        # Infinity has no place in a linear model: missing, like anything else that could not be measured.
        matrix[:, k] = np.where(np.isfinite(values), values, np.nan)
    for k, name in enumerate(categorical, start=len(numeric)):
        matrix[:, k] = frame[name].cast(pl.String).fill_null("(missing)").to_numpy()
    return matrix
