"""What one room hands to the next: small frozen records with no behaviour beyond reading themselves.

Belongs here: dataclasses of plain values. Does not belong here: anything that imports a room, Dagster or a client.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from typing import Any


@dataclass(frozen=True)
class DayRange:
    """Whole UTC days, both ends included."""

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"a day range must not end before it starts: {self.first} … {self.last}")

    def __contains__(self, day: object) -> bool:
        return isinstance(day, date) and self.first <= day <= self.last


@dataclass(frozen=True)
class TableWrite:
    """What a write left behind. `content_hash` is of the rows written; `version` is the Delta version after it."""

    table: str
    version: int
    rows: int
    seconds: float = 0.0


@dataclass(frozen=True)
class ValidationSummary:
    """Row accounting of one validation: `rows_in == validated + quarantined + redelivered`.

    `broken` counts rows per quarantining rule (a row may break several), `warned` per warning rule.
    `redelivered` are exact repeats of a row already there: dropped, counted, not quarantined.
    """

    source: str
    rows_in: int
    validated: int
    quarantined: int
    redelivered: int
    broken: Mapping[str, int] = field(default_factory=dict)
    warned: Mapping[str, int] = field(default_factory=dict)
    failures: tuple[str, ...] = ()  # table-level failures: too many quarantined, stale, too many nulls
    # The days the failures are about, where they are about some of several; empty: about everything there is.
    bad_days: tuple[date, ...] = ()

    @property
    def quarantine_share(self) -> float:
        return self.quarantined / self.rows_in if self.rows_in else 0.0


@dataclass(frozen=True)
class TrainingManifest:
    """What a training set was made from; enough to make it again. `delta_versions` maps table to (table id, version),
    `feature_fingerprints` each feature table to the hash of its content at that version (`mlplatform.fingerprint`)."""

    model: str
    feature_service: str
    rows: int
    labelled_in: int
    columns: tuple[str, ...]
    content_hash: str
    delta_versions: Mapping[str, tuple[str, int]]
    definition_hash: str
    split: Mapping[str, str]
    rows_by_part: Mapping[str, int]
    base_rate: float
    null_shares: Mapping[str, float]
    feature_fingerprints: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrialResult:
    number: int
    value: float | None
    state: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class TuningResult:
    """Outcome of a study: the winner's parameters, and every trial."""

    model: str
    study: str
    metric: str
    best_value: float
    best_params: Mapping[str, Any]
    trials: tuple[TrialResult, ...]
    importances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelVersion:
    """A registered model version as the registry tells it."""

    model: str
    version: int
    run_id: str
    source: str
    created_at: datetime
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GateResult:
    name: str
    passed: bool
    value: float | None
    bound: str
    reason: str
    blocking: bool = True


@dataclass(frozen=True)
class PredictionCost:
    """What serving a version costs: bytes of its file, and milliseconds of one processor for a prediction of one row and of 100."""

    model_bytes: int
    cpu_ms: float
    cpu_ms_100: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one version on the test rows, beside the baselines and the champion on the same rows."""

    model: str
    version: int
    rows: int
    metrics: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]
    champion_version: int | None
    champion_metrics: Mapping[str, float] | None
    slices: tuple[Mapping[str, Any], ...]
    gates: tuple[GateResult, ...]

    @property
    def passed(self) -> bool:
        return all(g.passed for g in self.gates if g.blocking)


@dataclass(frozen=True)
class LedgerEntry:
    """One deployment event. `evidence` is a flat JSON-able mapping."""

    at: datetime
    model: str
    # pass | refuse (the gates, or a promotion) | approve | reject | canary | shadow | traffic (rules) | verdict | promote | rollback |
    # restore (an alias moved by hand was put back). A promote or rollback retires `previous_version`.
    action: str
    alias: str
    version: int | None
    previous_version: int | None
    actor: str
    reason: str
    run_id: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PerformanceSummary:
    """Metrics of served predictions whose outcome is known, over the days looked at."""

    model: str
    days: tuple[str, str]
    predictions: int
    outcomes: int
    missing_outcomes: int
    metrics: Mapping[str, float]
    by_day: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class DriftSummary:
    """Drift of the current window against the reference, as the declared test measures it."""

    model: str
    kind: str  # data_drift | prediction_drift
    reference_rows: int
    current_rows: int
    drifted: int
    columns: int
    scores: Mapping[str, float]
    threshold: float
    method: str
    not_compared: tuple[str, ...] = ()  # columns without a value on either side; in neither count

    @property
    def drifted_share(self) -> float:
        return self.drifted / self.columns if self.columns else 0.0


@dataclass(frozen=True)
class SkewSummary:
    """Logged predictions of a window, rebuilt from the tables and compared bit by bit.

    `predictions` fall into the window, `compared` of them were rebuilt, `mismatched` have a fault. `kinds` counts predictions
    per named fault (one may have several). `given` of the compared had features in the request, which are compared with nothing.
    `fallback` of the compared have no fault and say themselves that the online store could not be reached: for its views a newer
    value may have been there. They are no proof, so the rate is that of the others.
    `by_source` has a mapping per view and function (with its lag), `by_feature` one
    per model input. `unresolved` says what could not be rebuilt at all, and why.
    """

    model: str
    window: tuple[str, str]
    predictions: int
    compared: int
    mismatched: int
    max_rate: float  # as declared when it was measured
    kinds: Mapping[str, int]
    by_source: tuple[Mapping[str, Any], ...] = ()
    by_feature: tuple[Mapping[str, Any], ...] = ()
    examples: tuple[Mapping[str, Any], ...] = ()
    unresolved: tuple[str, ...] = ()
    given: int = 0
    fallback: int = 0
    max_fallback_share: float = 1.0  # as declared when it was measured

    @property
    def refusal(self) -> str:
        """Why nothing new may serve: more differs than is declared; '' where that is not so.

        What could not be rebuilt at all fails the check on its own, but stops nothing: when the code of a request-time
        function changed on purpose, the new version is the way out.
        """
        return "" if self.rate <= self.max_rate else f"skew: {self.told} from what the tables say, {self.max_rate:.2%} may"

    @property
    def rate(self) -> float:
        proved = self.compared - self.fallback
        return self.mismatched / proved if proved else 0.0

    @property
    def fallback_share(self) -> float:
        return self.fallback / self.compared if self.compared else 0.0

    @property
    def fallback_told(self) -> str:
        """In one line: how many answers fell back because the online store was away."""
        return f"{self.fallback:,} of {self.compared:,} predictions fell back on remembered or default values: the online store was away"

    @property
    def told(self) -> str:
        """In one line: how many differ, and by which faults."""
        kinds = ", ".join(f"{name} {count}" for name, count in self.kinds.items())
        given = f"; {self.given:,} had features given in the request, which are compared with nothing" if self.given else ""
        return f"{self.mismatched:,} of {self.compared:,} predictions differ" + (f" ({kinds})" if kinds else "") + given

    @property
    def passed(self) -> bool:
        """Nothing to compare passes; what cannot be rebuilt does not."""
        return not self.refusal and not self.unresolved


@dataclass(frozen=True)
class RetrainDecision:
    """Whether monitoring asks for a retrain, and why (or why not)."""

    model: str
    retrain: bool
    reason: str
    cursor: str = ""
