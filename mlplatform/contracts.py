"""What crosses between the platform and the prediction service: names, the serving contract, the prediction record.

Belongs here: shapes and names both sides must agree on. Only the standard library and pydantic may be imported.
"""

import ast
import hashlib
import inspect
import json
import struct
from binascii import a2b_base64
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from math import isinf, isnan
from typing import Annotated, Any, AnyStr, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRODUCTION = "production"  # the MLflow alias that serves
CANARY: Final = "canary"  # the alias of a version that answers a share of the entities, until it is judged
SHADOW: Final = "shadow"  # the alias of a version that is asked copies of requests; its answers are logged and seen by nobody
PREVIOUS = "previous"  # the alias of the version that served before, for a rollback
GATES_TAG = "mlplatform.gates"  # model version tag: "passed" or "refused"
GATE_RESULTS_TAG = "mlplatform.gate_results"  # model version tag: each gate's result and reason as JSON, for people to see
EVALUATION_TAG = "mlplatform.evaluation"  # model version tag: the evaluation as JSON (metrics only)
VERIFIED_TAG = "mlplatform.verified"  # model version tag: the seal of a version that passed, see `mlplatform.verified`
STATE_TAG = "mlplatform.state"  # model version tag: candidate, approved, canary, production, retired or rejected, for people to see
TRAINED_BY_TAG = "mlplatform.trained_by"  # model version tag: who asked for the training
LEDGER_HEAD_TAG = "mlplatform.ledger_head"  # registered model tag: the ledger's last entry, `sequence:hash`
TRAFFIC_TAG = "mlplatform.traffic"  # registered model tag: `TrafficRules` as JSON; the one source of truth
CONTRACT_FILE = "serving_contract.json"  # beside the model's files in the registry
ONLINE_PROJECT = "flights"

STREAM_LEASE = "mlplatform:stream:worker"  # in the online store: of the streaming workers that write there, one works
MODELS_CHANNEL = "mlplatform:models"  # Redis pub/sub: the name of a model whose alias moved, or whose traffic rules changed

# What stands as `variant` in answers and records; an experiment's arms stand as `<experiment>/<arm>`.
CHAMPION_VARIANT = "champion"
CANARY_VARIANT = "canary"
SHADOW_VARIANT = "shadow"
PINNED_VARIANT = "pinned"  # the caller named the version

_COUNT, _LONGEST_COUNT = b'{"records":', 24


def prediction_stream(model: str) -> str:
    """Redis Stream with a model's prediction records; an entry's one field `record` holds one or more, as `record_lines` has them."""
    return f"mlplatform:predictions:{model}"


def record_lines(entry: AnyStr) -> list[AnyStr]:
    """The lines of JSON in an entry's field `record`, at least one. Each holds records of one request, see `read_records`."""
    return entry.split(b"\n" if isinstance(entry, bytes) else "\n")


def record_count(line: str | bytes) -> int:
    """How many records a line says it holds, by its first member; an older line holds one."""
    if isinstance(line, str):
        line = line[:_LONGEST_COUNT].encode(errors="replace")
    if not line.startswith(_COUNT):
        return 1
    count = line[len(_COUNT) : line.find(b",", 0, _LONGEST_COUNT)]
    return int(count) if count.isdigit() else 1


def moment_of(text: str) -> datetime:
    """A request's date and time, ISO 8601, without a zone where it has none; letters may be small (RFC 3339, 5.6). Raises ValueError."""
    return datetime.fromisoformat(f"{text[:-1]}Z" if text.endswith("z") else text)


def source_hash(function: Callable[..., Any]) -> str:
    """SHA-256 of the module a request-time function is written in: its helpers and constants count, comments and layout don't.

    Written into `ContractFunction.source_hash` at training time; the service refuses a version whose function has changed since.
    """
    module = inspect.getmodule(inspect.unwrap(function))
    if module is None:
        raise ValueError(f"{function!r} was not defined in a module: its source cannot be hashed")
    return hashlib.sha256(ast.unparse(ast.parse(inspect.getsource(module))).encode()).hexdigest()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ContractField(_Frozen):
    """One field an application sends."""

    name: str
    dtype: Literal["string", "int", "float", "bool", "date", "timestamp"]
    description: str
    example: bool | str | int | float
    required: bool = True
    minimum: float | None = None
    maximum: float | None = None
    max_length: int = 64
    constant: str | None = None  # a constant join key, filled in by the service


class ContractView(_Frozen):
    """One feature view as the model version was trained with it."""

    name: str
    join_keys: tuple[str, ...]
    features: tuple[str, ...]  # in the packed order of the online codec; all float64
    ttl_s: float
    on_stale: Literal["serve", "impute", "refuse"]
    defaults: dict[str, float | None]  # None stands for NaN, which JSON lacks


class ContractFunction(_Frozen):
    """A request-time function by its import path `module:function`, with the hash of its source at training time."""

    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source_hash: str


class ContractFeature(_Frozen):
    """One model input, in the model's column order.

    `view`: read online; `request`: computed by a request-time function or sent as is; `category`: a request field
    encoded as its position in `categories` (NaN where unknown).
    """

    name: str
    kind: Literal["view", "request", "category"]
    source: str  # view name, function path or request field
    column: str  # the feature's name within its source
    categories: tuple[str, ...] | None = None


class ServingContract(_Frozen):
    """Everything the service must know to serve one model version; lies beside the model as `serving_contract.json`."""

    schema_version: Literal[1] = 1
    model: str
    task: Literal["binary", "quantiles"]
    description: str
    framework: Literal["xgboost", "torch"]
    model_file: str
    model_sha256: str
    project: str
    fields: tuple[ContractField, ...]
    views: tuple[ContractView, ...]
    functions: tuple[ContractFunction, ...]
    features: tuple[ContractFeature, ...]
    threshold: float | None = None
    training_set_hash: str
    # Inputs in the feature order and what the model answered for them in training: the service compares before it swaps.
    example_features: tuple[tuple[float | None, ...], ...] = ()
    example_predictions: tuple[float | tuple[float, ...], ...] = ()
    # For the task "quantiles": the levels of an answer, ascending; the median stands as the prediction.
    quantiles: tuple[float, ...] = ()
    # How far an answer may be from the one recorded in training on the same inputs; 0: not by a bit.
    tolerance: float = 0.0

    @property
    def quantile_names(self) -> tuple[str, ...]:
        """As answers name them: p10, p50, p90."""
        return tuple(f"p{100 * level:g}" for level in self.quantiles)

    @property
    def median(self) -> int:
        """The place of the median among the quantiles."""
        return self.quantiles.index(0.5)

    def asked(self) -> tuple[str, ...]:
        """The fields an application sends, in their order."""
        return tuple(f.name for f in self.fields if f.constant is None)

    def canonical_json(self) -> str:
        # Fields younger than the first registered versions are left out where they say nothing, so that those keep their digest.
        told = self.model_dump(mode="json")
        for name, nothing in (("quantiles", []), ("tolerance", 0.0)):
            if told[name] == nothing:
                del told[name]
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
_Salt = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,64}$")]  # it keys BLAKE2b, which takes 64 bytes


class CanaryRule(_Frozen):
    """The share of the entities that the version with the alias `canary` answers. Another salt draws other entities."""

    weight: Percent = 0.0
    salt: _Salt = "canary"


class Arm(_Frozen):
    """One version of an experiment: `serves` is an alias, or a version's number written as text."""

    name: _Name
    serves: Annotated[str, Field(pattern=r"^([A-Za-z][A-Za-z0-9_-]{0,63}|[1-9][0-9]{0,9})$")]
    weight: Percent


class Layer(_Frozen):
    """The part [start, end) of a layer's entities, in percent, that an experiment may hold; the name is the layer's salt.

    Experiments of one layer whose parts do not overlap never hold the same entity, whatever model they are of, provided their entities are
    the same request fields. Layers of different names draw independently.
    """

    name: _Name
    start: Percent
    end: Percent

    @model_validator(mode="after")
    def _holds_somebody(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"layer {self.name}: [{self.start:g}, {self.end:g}) holds nobody")
        return self


class Experiment(_Frozen):
    """Named versions that share the entities the canary does not take; weights in percent of those, 100 in all.

    With a layer they share only its part of those, and the champion answers the others.

    Without a salt of its own the name is the salt, so that another experiment draws other entities.
    """

    name: _Name
    salt: _Salt = Field(default_factory=lambda known: str(known["name"]))
    arms: Annotated[tuple[Arm, ...], Field(min_length=2, max_length=16)]
    layer: Layer | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if len({arm.name for arm in self.arms}) != len(self.arms):
            raise ValueError("two arms of an experiment have one name")
        if abs(sum(arm.weight for arm in self.arms) - 100) > 1e-6:
            raise ValueError(f"the arms' weights are {sum(arm.weight for arm in self.arms):g} % together, not 100")
        return self


class TrafficRules(_Frozen):
    """How a model's versions share its requests. Without rules the champion answers everything.

    An entity is drawn twice: by the canary's salt, whether the canary answers it; if not, by the experiment's, which arm does.
    So a canary that grows takes entities from everybody and moves none between the others. `sticky_on`: the request fields that
    are the entity; empty: the join keys of the champion's views.
    """

    schema_version: Literal[1] = 1
    canary: CanaryRule = CanaryRule()
    experiment: Experiment | None = None
    shadow_share: Percent = 100.0  # of the requests that are copied to the version with the alias `shadow`
    sticky_on: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(max_length=16)] = ()

    def unfit_for(self, champion: ServingContract) -> str:
        """Why these rules cannot draw among the requests to that champion; '' where they can."""
        asked = champion.asked()
        unknown = [name for name in self.sticky_on if name not in asked]
        if not unknown:
            return ""
        # A field that no request has would be the same for all of them: one draw for everybody, instead of one for each entity.
        return f"sticky_on names {', '.join(map(repr, unknown))}, which no request to {champion.model} has; its fields: {', '.join(asked)}"

    def canonical_json(self) -> str:
        # A service of before layers refuses what it does not know: where there is none, the word is left out.
        without = {"experiment": {"layer"}} if self.experiment is not None and self.experiment.layer is None else None
        return json.dumps(self.model_dump(mode="json", exclude=without), sort_keys=True, separators=(",", ":"))


NO_RULES = TrafficRules()


class PredictionRecord(_Frozen):
    """One answered input, as the service logs it and `predictions/<model>` stores it."""

    request_id: str
    input_index: int
    requested_at: str  # ISO 8601 UTC, microseconds: the service's clock once the features were read
    model: str
    version: int
    variant: str
    inputs: dict[str, Any]  # request fields as received
    features: tuple[float | None, ...]  # in the contract's feature order; None is NaN
    # Per view: requested_at - event time, microseconds / 1e6 (so exact for 71 years); None: no value found.
    feature_ages_s: dict[str, float | None]
    imputed: tuple[str, ...]  # views whose values were replaced by defaults
    # Per view whose value was not there as it should be: missing, expired, future, unreadable or unreachable.
    shortfalls: dict[str, str] = {}
    prediction: float
    latency_ms: float
    contract_digest: str
    # Features that stood in the request: they were neither read nor computed.
    given: tuple[str, ...] = ()
    # All quantiles of an answer that gives them, in the contract's order; `prediction` is the median among them.
    quantiles: tuple[float, ...] | None = None
    code_version: str | None = None  # of the service, as `mlplatform.code_version` names it; None: logged before records said it


class RowRecord(_Frozen):
    """What one row of `RequestRecords` says for itself; the members as in `PredictionRecord`."""

    prediction: float
    feature_ages_s: dict[str, float | None]
    imputed: tuple[str, ...]
    shortfalls: dict[str, str] = {}
    quantiles: tuple[float, ...] | None = None


class RequestRecords(_Frozen):
    """Records of one request as a line of the log: what they share stands once, and their features as they lay in memory.

    `records` is how many there are; it stands first (`record_count`). Input `first + i` of the request has `rows[i]`, `inputs[i]` and
    `given[i]`. `features`: float64 little-endian (records, features), row by row, as base64; NaN is missing.
    """

    records: int = Field(ge=1, strict=True)
    request_id: str
    requested_at: str
    model: str
    version: int
    variant: str
    contract_digest: str
    latency_ms: float
    code_version: str | None = None
    first: int
    rows: tuple[RowRecord, ...]
    inputs: tuple[dict[str, Any], ...]
    given: tuple[tuple[str, ...], ...] | None = None
    features: str

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for name, found in (("rows", self.rows), ("inputs", self.inputs), ("given", self.given)):
            if found is not None and len(found) != self.records:
                raise ValueError(f"{self.records} records, but {len(found)} {name}")
        if self.features and len(self.numbers) % (8 * self.records):
            raise ValueError(f"{len(self.numbers)} bytes of features are not the same number of float64 for each of {self.records} records")
        return self

    @cached_property
    def numbers(self) -> bytes:
        """The features' bytes. Raises ValueError for what is no base64."""
        return a2b_base64(self.features, strict_mode=True)

    def each(self) -> list[PredictionRecord]:
        """The records one by one. Raises ValueError for a feature that is infinite: no model is asked that."""
        numbers = struct.unpack(f"<{len(self.numbers) // 8}d", self.numbers)
        if any(map(isinf, numbers)):
            raise ValueError("a feature is infinite")
        values = [None if isnan(number) else number for number in numbers]
        width = len(values) // self.records
        shared = {name: getattr(self, name) for name in _SHARED}
        return [
            PredictionRecord.model_construct(
                **shared,
                **dict(row),
                input_index=self.first + i,
                inputs=self.inputs[i],
                features=tuple(values[i * width : (i + 1) * width]),
                given=() if self.given is None else self.given[i],
            )
            for i, row in enumerate(self.rows)
        ]


_SHARED = (RequestRecords.model_fields.keys() & PredictionRecord.model_fields.keys()) - {"inputs", "features", "given"}


def read_records(line: str | bytes) -> list[PredictionRecord]:
    """The records in a line of the log. Raises ValueError (pydantic's) for what holds none."""
    raw = line.encode() if isinstance(line, str) else line
    if raw.startswith(_COUNT):
        return RequestRecords.model_validate_json(raw).each()
    return [PredictionRecord.model_validate_json(raw)]
