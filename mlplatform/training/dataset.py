"""From labelled rows and their joined features to a training set, its parts, and the manifest that says how it came about.

Belongs here: row accounting, the split by time, the encoding into a matrix. Does not belong here: joining features (the
feature store does) or fitting.

A row's label becomes known hours after its T (`label_known_at`), so the last labels of a part may become known after the
next part begins. They are kept: the parts are separated by T, as a retrain on that day would have had all but those few
rows. A model to be *served* must only be trained on labels known by then, which whoever chooses the rows ensures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from mlplatform.fingerprint import content_hash, definition_hash
from mlplatform.records import TrainingManifest
from mlplatform.specs import ModelSpec
from mlplatform.training.trainers.base import Floats, Matrix

MANIFEST = "mlplatform.manifest"  # commit metadata of a stored training set: the TrainingManifest as JSON
PART = "part"
PARTS = ("train", "validate", "test")
TIME = "event_timestamp"
LABEL = "label"
DAY = "event_date"
# Never a feature, whatever a feature table brings along: the answer, and when it was known.
_NEVER_FEATURES = frozenset({LABEL, "label_known_at", PART, DAY, TIME, "created"})


class MisalignedFeaturesError(ValueError):
    """The joined features are not the labelled rows' features, row for row."""


@dataclass(frozen=True)
class Dataset:
    """Labelled rows with features; `frame` has the rows' own columns, `part`, `event_date` and the features (Float64, null = missing).

    `numeric` then `categorical` is the model's column order. `counts`: labelled_in = unlabelled + outside_split + train
    + validate + test.
    """

    model: str
    frame: pl.DataFrame
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    counts: Mapping[str, int]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.numeric + self.categorical

    def part(self, *names: str) -> pl.DataFrame:
        """The rows of one or several parts, in time order as stored."""
        return self.frame.filter(pl.col(PART).is_in(names))

    def categories(self, *parts: str) -> dict[str, tuple[str, ...]]:
        """The values of each categorical column in `parts` (train alone unless said), sorted. Any other is unknown."""
        seen = self.part(*(parts or ("train",)))
        return {name: tuple(seen[name].drop_nulls().cast(pl.String).unique().sort().to_list()) for name in self.categorical}


def assemble(
    spec: ModelSpec,
    rows: pl.DataFrame,
    features: pl.DataFrame,
    feature_names: Sequence[str] | None = None,
    defaults: Mapping[str, float] | None = None,
) -> Dataset:
    """Puts labelled rows and their features side by side, splits them by the UTC day of T, and counts every row.

    `rows` is what `spec.rows` gives, (n, …); `features` has the same n rows in the same order. Where `features` repeats
    `event_timestamp` or columns of the row key, they are compared, so a reordered join cannot pass. `feature_names` are
    the feature service's columns; without it, every number or boolean of `features` that `rows` lacks. `defaults` stand for
    a missing value of the features they name, as they do when the model is served.

    Raises MisalignedFeaturesError where the two do not match, ValueError for missing columns, duplicate rows, a label
    other than 0 and 1 (no finite number, where the task is not binary), or an empty part.
    """
    _check_rows(spec, rows)
    _check_alignment(spec, rows, features)
    numeric = _numeric(spec, rows, features, feature_names)
    frame = rows.drop(DAY, PART, strict=False).with_columns(_value(features[name], (defaults or {}).get(name)) for name in numeric)
    labelled = frame.filter(pl.col(LABEL).is_not_null()).with_columns(pl.col(TIME).dt.date().alias(DAY))
    if spec.label_range is not None:
        labelled = labelled.with_columns(pl.col(LABEL).clip(*spec.label_range))
    parted = split_by_time(spec, labelled)
    by_part = dict(parted[PART].value_counts().iter_rows())
    counts = {
        "labelled_in": rows.height,
        "unlabelled": rows.height - labelled.height,
        "outside_split": labelled.height - parted.height,
        **{name: int(by_part.get(name, 0)) for name in PARTS},
    }
    if empty := [name for name in PARTS if not counts[name]]:
        raise ValueError(f"model {spec.name}: the split {_split_text(spec)} leaves no rows in {', '.join(empty)} ({counts})")
    return Dataset(spec.name, parted, numeric, spec.categorical, counts)


def split_by_time(spec: ModelSpec, labelled: pl.DataFrame) -> pl.DataFrame:
    """The rows with an `event_date` within the spec's split, with their `part`, in order of time."""
    split = spec.split
    part = (
        pl.when(pl.col(DAY) < split.train_start)
        .then(None)
        .when(pl.col(DAY) < split.validate_start)
        .then(pl.lit("train"))
        .when(pl.col(DAY) < split.test_start)
        .then(pl.lit("validate"))
        .when(pl.col(DAY) < split.end)
        .then(pl.lit("test"))
    )
    return labelled.with_columns(part.alias(PART)).filter(pl.col(PART).is_not_null()).sort(TIME, *spec.row_key)


def reopen(spec: ModelSpec, frame: pl.DataFrame, manifest: TrainingManifest) -> Dataset:
    """The dataset of a stored training set and its manifest. Raises ValueError where the content is not the manifest's."""
    found = content_hash(frame)
    if found != manifest.content_hash:
        raise ValueError(f"training set of {spec.name}: content hash {found[:12]} is not the manifest's {manifest.content_hash[:12]}")
    numeric = tuple(c for c in manifest.columns if c not in spec.categorical)
    return Dataset(spec.name, frame.sort(TIME, *spec.row_key), numeric, spec.categorical, dict(manifest.rows_by_part))


def manifest(
    spec: ModelSpec,
    dataset: Dataset,
    delta_versions: Mapping[str, tuple[str, int]],
    definitions: Sequence[str] = (),
    feature_fingerprints: Mapping[str, str] | None = None,
) -> TrainingManifest:
    """What the training set was made from. `definitions` are the sources of the request functions and recipes behind it,
    `feature_fingerprints` the content hashes of the feature tables at their `delta_versions`."""
    frame = dataset.frame
    columns = dataset.columns
    nulls = frame.select(pl.col(c).null_count() for c in columns).row(0)
    split = spec.split
    return TrainingManifest(
        model=spec.name,
        feature_service=spec.feature_service,
        rows=frame.height,
        labelled_in=dataset.counts["labelled_in"],
        columns=columns,
        content_hash=content_hash(frame),
        delta_versions=dict(delta_versions),
        definition_hash=definition_hash(tuple(definitions)),
        split={k: v.isoformat() for k, v in split.model_dump().items()},
        rows_by_part=dict(dataset.counts),
        base_rate=float(np.mean(frame[LABEL].to_numpy())),
        null_shares={c: n / frame.height for c, n in zip(columns, nulls, strict=True)},
        feature_fingerprints=dict(feature_fingerprints or {}),
    )


def to_matrix(frame: pl.DataFrame, numeric: Sequence[str], categories: Mapping[str, Sequence[str]]) -> Matrix:
    """Numeric columns, then each categorical one as the position of its value in `categories` (NaN where unknown).

    Shape (n, len(numeric) + len(categories)), float64, NaN = missing. Labels are NaN where `frame` has none.
    """
    encoded = [frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in numeric]
    encoded += [encode_category(frame[name], values) for name, values in categories.items()]
    label = frame[LABEL].cast(pl.Float64).fill_null(np.nan).to_numpy() if LABEL in frame.columns else np.full(frame.height, np.nan)
    values = np.column_stack(encoded) if encoded else np.empty((frame.height, 0))
    sizes = {name: len(known) for name, known in categories.items()}
    return Matrix(values, label, (*numeric, *categories), frozenset(categories), sizes)


def encode_category(values: pl.Series, categories: Sequence[str]) -> Floats:
    """Positions in `categories` as float64, NaN for null and for values not among them."""
    positions = pl.Series(np.arange(len(categories), dtype=np.float64), dtype=pl.Float64)
    known = pl.Series(list(categories), dtype=pl.String)
    encoded = values.cast(pl.String).replace_strict(known, positions, default=None, return_dtype=pl.Float64)
    return np.asarray(encoded.fill_null(np.nan).to_numpy(), dtype=np.float64)


def _check_rows(spec: ModelSpec, rows: pl.DataFrame) -> None:
    needed = {TIME, LABEL, *spec.row_key, *spec.categorical, *spec.slices}
    if missing := sorted(needed - set(rows.columns)):
        raise ValueError(f"model {spec.name}: the labelled rows lack {missing}")
    if duplicates := rows.height - rows.n_unique([*spec.row_key]):
        raise ValueError(f"model {spec.name}: {duplicates} labelled rows repeat the key {spec.row_key}")
    if rows[TIME].null_count():
        raise ValueError(f"model {spec.name}: {rows[TIME].null_count()} labelled rows have no {TIME}")
    label = pl.col(LABEL).cast(pl.Float64)
    usable = label.is_in([0.0, 1.0]) if spec.task == "binary" else label.is_finite()
    if other := rows.filter(pl.col(LABEL).is_not_null() & ~usable).height:
        raise ValueError(f"model {spec.name}: {other} labels are {'neither 0 nor 1' if spec.task == 'binary' else 'no finite numbers'}")


def _check_alignment(spec: ModelSpec, rows: pl.DataFrame, features: pl.DataFrame) -> None:
    if features.height != rows.height:
        raise MisalignedFeaturesError(
            f"model {spec.name}: {rows.height} labelled rows went into the feature join and {features.height} came out; "
            "a join must give every row once"
        )
    for name in (TIME, *spec.row_key):
        if name in features.columns and not features[name].cast(rows[name].dtype).equals(rows[name], null_equal=True):
            raise MisalignedFeaturesError(f"model {spec.name}: the joined features are not in the rows' order: '{name}' differs")


def _numeric(spec: ModelSpec, rows: pl.DataFrame, features: pl.DataFrame, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        names = [n for n, t in features.schema.items() if n not in rows.columns and (t.is_numeric() or t == pl.Boolean)]
    if missing := [n for n in names if n not in features.columns]:
        raise ValueError(f"model {spec.name}: the feature join did not bring {missing}")
    if forbidden := sorted(_NEVER_FEATURES.intersection(names)):
        raise ValueError(f"model {spec.name}: {forbidden} may never be a feature")
    left_out = {*spec.left_out, *spec.categorical}
    numeric = tuple(n for n in names if n not in left_out)
    if not numeric and not spec.categorical:
        raise ValueError(f"model {spec.name}: no feature is left")
    return numeric


def _value(column: pl.Series, default: float | None) -> pl.Series:
    """Float64 with one word for missing: null, or the declared default in its place."""
    values = column.cast(pl.Float64).fill_nan(None)
    return values if default is None or np.isnan(default) else values.fill_null(default)


def _split_text(spec: ModelSpec) -> str:
    s = spec.split
    return f"train from {s.train_start}, validate from {s.validate_start}, test from {s.test_start}, end {s.end}"
