"""A view's table and a prediction log that the tests of the skew proof fill, each as its owner would."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlplatform.contracts import ContractFeature, ContractField, ContractFunction, ContractView, ServingContract
from mlplatform.monitoring import skew
from mlplatform.monitoring.drain import predictions_schema
from mlplatform.records import SkewSummary
from mlplatform.specs import SkewPolicy

UTC_US = pl.Datetime("us", "UTC")
NOON = datetime(2024, 5, 3, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
POLICY = SkewPolicy()


def part_of_day(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Minutes since midnight of `placed_at`, and twice the stored load."""
    minutes = (columns["placed_at"] - columns["placed_at"].astype("datetime64[D]")) / np.timedelta64(1, "m")
    return {"minute": minutes, "twice": columns["load"] * 2.0}


def contract(on_stale: str = "impute", defaults: dict[str, float | None] | None = None) -> ServingContract:
    return ServingContract(
        model="returns",
        task="binary",
        description="",
        framework="xgboost",
        model_file="model.ubj",
        model_sha256="0" * 64,
        project="shop",
        fields=(
            ContractField(name="shop", dtype="string", description="", example="a"),
            ContractField(name="customer", dtype="int", description="", example=1),
            ContractField(name="placed_at", dtype="timestamp", description="", example="2024-05-03T12:00:00Z"),
            ContractField(name="price", dtype="float", description="", example=1.5, required=False),
            ContractField(name="channel", dtype="string", description="", example="web"),
            ContractField(name="region", dtype="string", description="", example="all", constant="all"),
        ),
        views=(
            ContractView(
                name="totals",
                join_keys=("shop",),
                features=("orders", "returns", "load"),
                ttl_s=3 * 3600,
                on_stale=on_stale,
                defaults=defaults or {"orders": None, "returns": None, "load": None},
            ),
        ),
        functions=(ContractFunction(path="f:part_of_day", inputs=("placed_at", "load"), outputs=("minute", "twice"), source_hash="h"),),
        features=(
            ContractFeature(name="returns", kind="view", source="totals", column="returns"),
            ContractFeature(name="minute", kind="request", source="f:part_of_day", column="minute"),
            ContractFeature(name="orders", kind="view", source="totals", column="orders"),
            ContractFeature(name="price", kind="request", source="price", column="price"),
            ContractFeature(name="twice", kind="request", source="f:part_of_day", column="twice"),
            ContractFeature(name="channel", kind="category", source="channel", column="channel", categories=("store", "web")),
        ),
        training_set_hash="t",
    )


class Day:
    """A view's table and a log, each filled as its owner would."""

    def __init__(self, made: ServingContract) -> None:
        self.contract = made
        self.rows: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.propagation = 30 * MINUTE
        self.functions: dict[str, Any] = {"f:part_of_day": part_of_day}

    def row(
        self,
        event: datetime,
        orders: float | None,
        returns: float | None,
        created: datetime | None = None,
        load: float = 1.0,
        shop: str = "a",
    ) -> None:
        self.rows.append(
            {"shop": shop, "event_timestamp": event, "created": created or event, "orders": orders, "returns": returns, "load": 1.0}
        )

    def ask(
        self,
        at: datetime,
        event: datetime | None,
        orders: float | None,
        returns: float | None,
        *,
        imputed: bool = False,
        load: float = 1.0,
        inputs: dict[str, Any] | None = None,
        given: tuple[str, ...] = (),
        shortfall: str = "",
        **features: float | None,
    ) -> None:
        """What the service writes for a request at `at`: a value of `event` served, or none found."""
        placed = at + HOUR
        sent = {"shop": "a", "customer": 7, "placed_at": placed.isoformat(), "price": 12.5, "channel": "web"} | (inputs or {})
        minute = (placed - placed.replace(hour=0, minute=0, second=0, microsecond=0)) / MINUTE
        usual = {"returns": returns, "minute": minute, "orders": orders, "price": 12.5, "twice": 2 * load, "channel": 1.0} | features
        self.log.append(
            {
                "request_id": f"r{len(self.log)}",
                "input_index": 0,
                "requested_at": at,
                "event_date": at.date(),
                "model": "returns",
                "version": 1,
                "variant": "champion",
                "inputs": json.dumps(sent),
                "features": [usual[f.name] for f in self.contract.features],
                "feature_ages_s": [{"view": "totals", "age_s": None if event is None else (at - event) // timedelta(microseconds=1) / 1e6}],
                "imputed": ["totals"] if imputed else [],
                "shortfalls": [{"view": "totals", "reason": shortfall}] if shortfall else [],
                "prediction": 0.5,
                "latency_ms": 1.0,
                "stream_id": "1-0",
                "contract_digest": self.contract.digest(),
                "given": list(given),
            }
        )

    def judged(self, predict: Callable[[np.ndarray], np.ndarray] | None = None) -> SkewSummary:
        log = pl.DataFrame(self.log, schema=predictions_schema(()))
        kinds = {
            "shop": pl.String,
            "event_timestamp": UTC_US,
            "created": UTC_US,
            **dict.fromkeys(("orders", "returns", "load"), pl.Float64),
        }
        logged = skew.Logged.of(self.contract, log)
        truth = skew.Truth({"totals": pl.DataFrame(self.rows, schema=kinds)}, {"totals": self.propagation}, self.functions, predict)
        window = skew.judged_window(POLICY, NOON + 12 * HOUR)
        return skew.summarise(
            "returns", POLICY, window, log.height, [(part, skew.compare(part, truth)) for part in logged.by_given()], truth.propagation
        )


def hourly(day: Day) -> None:
    """A row at each full hour of the day, available two minutes later; orders and returns count up."""
    for hour in range(24):
        event = NOON.replace(hour=0) + hour * HOUR
        day.row(event, float(hour), hour / 3, event + 2 * MINUTE)


@pytest.fixture(scope="session")
def new_day() -> Callable[..., Day]:
    """`new_day(on_stale, defaults)`: nothing stored, nothing logged, under a contract that says so."""
    return lambda *declared, **named: Day(contract(*declared, **named))


@pytest.fixture
def day() -> Day:
    """A row of the view at each full hour, and nothing logged."""
    made = Day(contract())
    hourly(made)
    return made
