"""What teams declare: sources, contracts, feature recipes and models.

Belongs here: frozen, validated declarations. Does not belong here: anything that reads, writes or computes.
"""

from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Annotated, Literal

import polars as pl  # at run time too: pydantic resolves the annotations below
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from mlplatform.gate_specs import ChampionGate, Gate, ServingBudget, SliceGate
from mlplatform.release_policy import CanaryPolicy

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Share = Annotated[float, Field(ge=0, le=1)]
DType = Literal["string", "int", "float", "bool", "date", "timestamp"]

RowExpression = Callable[[], "pl.Expr"]
Tables = Mapping[str, "pl.DataFrame"]


class Spec(BaseModel):
    """Base of every declaration: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


# --- sources -----------------------------------------------------------------------------------------------------


class SqlReader(Spec):
    """A table of a SQL database. `connection` names a URL in the settings (`MLPLATFORM_SOURCE_<NAME>`)."""

    kind: Literal["sql"] = "sql"
    connection: Name
    table: str


class HttpReader(Spec):
    """A paged JSON API: `GET {base}{path}?from=…&to=…&page=k` answers `{"items": […], "page": k, "total_pages": n}`.

    `from` is inclusive, `to` exclusive, both ISO 8601 UTC.
    """

    kind: Literal["http"] = "http"
    connection: Name
    path: str
    page_size: int = Field(default=1000, ge=1, le=100_000)


class FileReader(Spec):
    """CSV or Parquet files, local or `s3://`. `{date}` in the path stands for the partition's day (YYYY-MM-DD)."""

    kind: Literal["file"] = "file"
    connection: Name
    path: str
    format: Literal["csv", "parquet"] = "parquet"


class StreamReader(Spec):
    """A Redis Stream read by a consumer group; each entry has one field `event`, a JSON object.

    Days before the stream's retention come from `archive`, files with the same columns as the events.
    """

    kind: Literal["stream"] = "stream"
    connection: Name
    stream: str
    group: str = "mlplatform"
    archive: FileReader | None = None


Reader = Annotated[SqlReader | HttpReader | FileReader | StreamReader, Field(discriminator="kind")]


class Column(Spec):
    """One column of a contract. Bounds are inclusive and in the column's `unit`."""

    name: str
    dtype: DType
    description: str = ""
    unit: str = ""
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[str, ...] | None = None
    pattern: str | None = None
    # A share of nulls above this fails the table's check; rows are not quarantined for it.
    max_null_share: Share | None = None


class Reference(Spec):
    """Values of `columns` that must be found in `source`'s `to` columns. `warn` counts orphans, `quarantine` sets them aside.

    A row with a null among `columns` refers to nothing and is no orphan, as in SQL; `null_is_missing` counts it as one.
    """

    columns: tuple[str, ...]
    source: Name
    to: tuple[str, ...]
    on_missing: Literal["warn", "quarantine"] = "warn"
    null_is_missing: bool = False


class Coverage(Spec):
    """Rows of `source` for whose time this source should have a row: counted where it has none, nothing is set aside.

    A row of `source` needs the row here with equal `columns` and with the time column equal to `at` cut down to `every`
    (UTC), and with a value in each of `values`. Declared on the source that answers, since the need is often known first:
    it is checked when the answering day is complete. Rows of `source` lie at most `lookback` before their `at`.
    """

    source: Name
    columns: tuple[str, ...]
    at: str
    every: timedelta
    values: tuple[str, ...] = ()
    lookback: timedelta = timedelta(0)


class RowRule(Spec):
    """A named rule over a row (or its neighbours): the expression is true where the row is broken.

    `warn` counts the rows and leaves them in place, `quarantine` sets them aside.
    """

    name: Name
    description: str
    broken: RowExpression
    on_broken: Literal["warn", "quarantine"] = "quarantine"


class Contract(Spec):
    """What a source promises. Drives the expectation suite, the row split, the column schema and the blocking checks."""

    columns: tuple[Column, ...]
    key: tuple[str, ...]
    references: tuple[Reference, ...] = ()
    rules: tuple[RowRule, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    # Newest row may be this old (by the source's time column) when the day is complete.
    max_age: timedelta | None = None
    max_quarantine_share: Share = 0.02

    @model_validator(mode="after")
    def _names_exist(self) -> "Contract":
        names = {c.name for c in self.columns}
        used = set(self.key).union(*(r.columns for r in self.references), *(c.columns + c.values for c in self.coverage))
        if missing := used - names:
            raise ValueError(f"contract names columns it does not declare: {sorted(missing)}")
        return self

    def column(self, name: str) -> Column:
        return next(c for c in self.columns if c.name == name)


class SourceSpec(Spec):
    """One source system's table. `time_column` set means daily partitions by the UTC day of that column."""

    name: Name
    description: str
    owner: str = "team:data"
    reader: Reader
    contract: Contract
    time_column: str | None = None

    @property
    def partitioned(self) -> bool:
        return self.time_column is not None


# --- features ----------------------------------------------------------------------------------------------------


class FeatureRecipe(Spec):
    """How the rows of one Feast view come about. The view itself (entities, schema, aggregations, ttl) is declared in Feast.

    Exactly one of `events` (a windowed view: the rows its declared aggregations run over) and `compute`
    (any other stored view: its values at given ticks) is set.

    - `events(tables)` → frame with the view's join keys, `event_timestamp` (when the row became known) and the
      columns its aggregations name.
    - `compute(tables, ticks)` → frame with join keys, `event_timestamp` (one of the ticks) and the features.
    - `finish(frame)` → the features derived from the aggregates of a windowed view, row by row; `event_timestamp` is the row's.
    - `inputs` maps each validated source to the lookback its rows are needed for, beyond the range of the rows asked for.
    - `trigger` says when a windowed view has rows. "cadence": at each tick, for each entity with an event in its longest
      window. "event": at each time an entity has an event; the cadence then says how often values are expected, for freshness.
    - `independent_by` names a column of every input such that `events(tables)` of all rows is, whatever the order, the union
      of `events(rows with one value of the column)` over its values: a streaming worker may compute one such group alone.
    - `propagation` is how long after `created`, by the platform's clock, a value may take until it is readable online,
      whoever writes it, a streaming worker or the assets; None: one cadence.
    """

    view: Name
    inputs: Mapping[str, timedelta]
    cadence: Annotated[timedelta, Field(gt=timedelta(0))]
    trigger: Literal["cadence", "event"] = "cadence"
    events: Callable[[Tables], "pl.DataFrame"] | None = None
    compute: Callable[[Tables, "pl.Series"], "pl.DataFrame"] | None = None
    finish: Callable[["pl.DataFrame"], "pl.DataFrame"] | None = None
    # Stands in place of a missing value, in the training set and in what is served, and is recorded in the model version. NaN
    # (or none) where the model handles missing values itself.
    defaults: Mapping[str, float] = Field(default_factory=dict)
    on_stale: Literal["serve", "impute", "refuse"] = "impute"
    independent_by: str | None = None
    propagation: Annotated[timedelta, Field(gt=timedelta(0))] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "FeatureRecipe":
        if (self.events is None) == (self.compute is None):
            raise ValueError(f"view {self.view}: set exactly one of events and compute")
        for name, given in (("trigger='event'", self.trigger == "event"), ("independent_by", self.independent_by is not None)):
            if given and self.events is None:
                raise ValueError(f"view {self.view}: {name} speaks of events, so give the recipe events in place of compute")
        return self

    @property
    def propagation_budget(self) -> timedelta:
        """How long after `created` a value may take until it is readable online."""
        return self.cadence if self.propagation is None else self.propagation


class RequestFunction(Spec):
    """A request-time feature function: `function(columns) -> columns`, NumPy arrays of equal length in and out."""

    name: Name
    function: Callable[..., Mapping[str, object]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


# --- models ------------------------------------------------------------------------------------------------------


class RequestField(Spec):
    """One field an application sends for each input of a prediction request."""

    name: str
    dtype: DType
    description: str
    example: bool | str | int | float
    minimum: float | None = None
    maximum: float | None = None
    max_length: int = 64
    # A constant join key (for a view about everything) is filled in by the platform, never asked for.
    constant: str | None = None
    required: bool = True


class Split(Spec):
    """Half-open, by calendar day of T (UTC): train [start, validate), validate [validate, test), test [test, end)."""

    train_start: date
    validate_start: date
    test_start: date
    end: date

    @model_validator(mode="after")
    def _in_order(self) -> "Split":
        if not self.train_start < self.validate_start < self.test_start < self.end:
            raise ValueError("a split's dates must be in order: train_start < validate_start < test_start < end")
        return self

    def moved_to(self, end: date) -> "Split":
        """The same lengths of validation and test, ending at `end`; training still starts where it did. For retraining."""
        shift = end - self.end
        return Split(train_start=self.train_start, validate_start=self.validate_start + shift, test_start=self.test_start + shift, end=end)


class CostMatrix(Spec):
    """Costs of a binary decision; a right warning and a right silence cost nothing."""

    miss: float = Field(gt=0)
    false_alarm: float = Field(gt=0)

    @property
    def threshold(self) -> float:
        # Warning costs (1-p)·false_alarm, silence p·miss; they are equal here (Elkan 2001,
        # "The Foundations of Cost-Sensitive Learning", eq. 2).
        return self.false_alarm / (self.false_alarm + self.miss)


class TuningSpec(Spec):
    """An Optuna study over time-ordered folds of the training range."""

    trials: int = Field(default=8, ge=1)
    folds: int = Field(default=2, ge=1)
    metric: str = "log_loss"
    timeout_s: float | None = None
    # Rows sampled per fold while searching; the final fit takes all rows.
    max_rows: int | None = 60_000


class RetrainPolicy(Spec):
    """When monitoring asks for a retrain. Each request is followed by a cooldown."""

    max_metric_drop: float = 0.03
    metric: str = "auc"
    max_drifted_share: Share = 0.5
    min_outcomes: int = 500
    cooldown: timedelta = timedelta(days=7)


class SkewPolicy(Spec):
    """How the proof of "served = trained" is made: which logged predictions are rebuilt, and how many may differ.

    `ignore_before`: predictions asked before it are not judged. Set it, in review, once a fault is found and mended: until
    the faulty ones have left the window they stop every promotion. `max_fallback_share`: how many may have been answered while
    the online store was away, and say so, before a check warns; they stop nothing.
    """

    max_mismatch_rate: Share = 0.0
    max_fallback_share: Share = 0.01
    window_days: int = Field(default=7, ge=1)
    sample_rows: int = Field(default=100_000, ge=1)  # above this, a sample drawn with `seed`
    seed: int = 20130901
    ignore_before: AwareDatetime | None = None


class ModelSpec(Spec):
    """One model: the question, the rows it is asked for, its features, how it is trained, and what it must reach.

    `rows(tables)` gives the labelled rows: `event_timestamp` (T, when the question is asked), every request field,
    the slice columns, `label` and `label_known_at`. `inputs` maps each validated source it reads to the extra lookback.
    """

    name: Name
    description: str
    owner: str = "team:ml"
    task: Literal["binary", "quantiles"] = "binary"
    # The levels an answer of the task "quantiles" gives, ascending, the median among them; it stands as the prediction.
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    label_range: tuple[float, float] | None = None  # labels are clipped to it to learn from and to measure; None: taken as they are
    trainer: str = "xgboost_classifier"
    feature_service: str
    inputs: Mapping[str, timedelta]
    rows: Callable[[Tables], "pl.DataFrame"]
    row_key: tuple[str, ...]
    request_fields: tuple[RequestField, ...]
    categorical: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # feature columns of the service the model does not take
    slices: tuple[str, ...] = ()
    split: Split
    tuning: TuningSpec = TuningSpec()
    gates: tuple[Gate, ...] = ()
    slice_gates: tuple[SliceGate, ...] = ()  # each of a column among `slices`
    # Who must agree before a version answers callers: the gates alone, also a person, or also a person who did not train it.
    approval: Literal["gates", "person", "other_person"] = "gates"
    champion_gate: ChampionGate = ChampionGate()
    budget: ServingBudget = ServingBudget()
    canary: CanaryPolicy = CanaryPolicy()
    cost: CostMatrix | None = None
    retrain: RetrainPolicy = RetrainPolicy()
    skew: SkewPolicy = SkewPolicy()
    max_label_delay: timedelta = timedelta(hours=36)  # after T; monitoring waits so long before it calls a label missing
    seed: int = 20130901

    @model_validator(mode="after")
    def _answers_fit_the_task(self) -> "ModelSpec":
        if (self.task == "quantiles") != bool(self.quantiles):
            raise ValueError(f"model {self.name}: a model has quantiles if, and only if, its task is 'quantiles'")
        if self.quantiles and (0.5 not in self.quantiles or list(self.quantiles) != sorted(set(self.quantiles))):
            raise ValueError(f"model {self.name}: quantiles must ascend and hold the median, not {self.quantiles}")
        if self.quantiles and self.cost is not None:
            raise ValueError(f"model {self.name}: a cost matrix is of a binary decision")
        if self.label_range is not None and (self.task == "binary" or self.label_range[0] >= self.label_range[1]):
            raise ValueError(f"model {self.name}: label_range is (low, high) of labels that are numbers")
        return self

    @model_validator(mode="after")
    def _gates_judge_slices_there_are(self) -> "ModelSpec":
        if unknown := sorted({gate.column for gate in self.slice_gates} - set(self.slices)):
            raise ValueError(f"model {self.name}: slice gates judge slices by {unknown}, which is not among its slices {self.slices}")
        return self


class Catalog(Spec):
    """Everything a team declares for one use case, found by `mlplatform.catalog.discover`.

    `feature_package` names the package under `feature_definitions` with the Feast objects, recipes and request functions.
    """

    name: Name
    sources: tuple[SourceSpec, ...]
    models: tuple[ModelSpec, ...]
    feature_package: str
    start: date  # the first day of the daily partitions
    end: date | None = None  # the day after the last, where the data is a closed set; None: they go on
    timezone: str = "UTC"  # the business's own day, for reports
