"""The proof of "served = trained" on a small platform of its own: real tables, a real online store, the real service. A clean day
differs nowhere; each of six faults, planted where it would happen, is found, named, and stops promotion."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pytest
from redis import Redis, RedisError

from mlplatform.clients.registry import Registry
from mlplatform.feature_store import codec
from mlplatform.feature_store.reader import OnlineReader
from mlplatform.feature_store.writer import write_frame
from mlplatform.orchestration.assets import online as online_assets
from mlplatform.orchestration.drift_inputs import served_features
from mlplatform.orchestration.serving_state import promote
from mlplatform.records import DayRange, ModelVersion
from mlplatform.specs import SkewPolicy
from serving_app import features as service_features

DAY = datetime(2024, 5, 3, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


def test_a_clean_day_differs_nowhere_and_a_version_can_be_promoted(shop):
    for hour in range(10, 15):
        shop.at(hour)
        shop.orders(*shop.early, *(("a", h - 0.5, 7.0 * h) for h in range(10, hour + 1)))
        shop.tick()
        for minute in (1, 17, 59):
            shop.at(hour, minute)
            for name in ("a", "b", "nobody"):
                shop.ask(name)
    shop.at(15)
    passed, found = shop.prove()
    assert (passed, found.mismatched, found.compared, found.kinds, found.unresolved) == (True, 0, 45, {}, ())
    assert {f["feature"]: f["mismatches"] for f in found.by_feature} == dict.fromkeys(
        ("orders", "amount", "minute", "price", "shop", "prediction"), 0
    )
    assert promote(shop.clients, "returns", shop.version.version, "ann").action in ("promote", "none")


def test_features_given_in_a_request_are_held_against_nothing_and_counted_and_the_others_are_compared_as_ever(shop):
    shop.at(9, 30)
    shop.ask()
    shop.ask(given={"orders": 99.0, "amount": 1.0})
    shop.ask(given={"orders": 99.0})
    shop.ask("nobody", given={"amount": 5.0, "minute": -1.0, "price": 3.0, "shop": "b"})
    passed, found = shop.prove()
    assert (passed, found.mismatched, found.compared, found.given, found.unresolved) == (True, 0, 4, 3, ())
    assert "3 had features given in the request" in found.told
    assert {f["feature"]: f["compared"] for f in found.by_feature} == {
        "orders": 2,
        "amount": 2,
        "minute": 3,
        "price": 3,
        "shop": 3,
        "prediction": 4,
    }
    served = served_features(shop.clients, shop.spec, DayRange(DAY.date(), DAY.date()))
    assert (served.rows.height, served.given.sum(), served.read["orders"].to_list()) == (4, 3, [2.0])


def test_answers_given_while_the_online_store_was_away_are_counted_and_stop_no_promotion(shop, monkeypatch):
    shop.at(9, 30)
    shop.ask()
    with monkeypatch.context() as outage:
        outage.setattr(OnlineReader, "blocks", away)
        shop.at(10)
        shop.orders(*shop.early, ("a", 9.9, 70.0))
        shop.tick()
        shop.at(10, 59)
        assert (shop.ask()["imputed"], shop.ask("b")["imputed"]) == ([], ["shop_totals"])
    passed, found = shop.prove()
    assert (passed, found.mismatched, found.compared, found.fallback, found.unresolved) == (True, 0, 3, 2, ())
    assert promote(shop.clients, "returns", shop.version.version, "ann").action in ("promote", "none")


async def away(self: OnlineReader, asked: Any, decode: Any) -> Any:
    raise RedisError("planted")


# --- six faults, each where it would happen ---------------------------------------------------------------------------


def ttl_ignored(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader forgets to look at the age."""
    real = service_features._take_good

    def ageless(out: Any, plan: Any, *rest: Any) -> Any:
        return real(out, replace(plan, layout=replace(plan.layout, ttl_us=None)), *rest)

    monkeypatch.setattr(service_features, "_take_good", ageless)
    shop.at(15, 30)
    assert shop.ask()["feature_ages_s"] == {"shop_totals": 6.5 * 3600}


def correction_lost(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that takes the event time for the time of creation, as stock tools do: a correction never replaces anything."""
    monkeypatch.setattr(online_assets, "write_frame", partial(write_frame, created=None))
    shop.at(9, 20)
    shop.orders(*shop.early, ("a", 8.9, 40.0))
    shop.tick()
    shop.at(9, 31)
    shop.ask()


def key_of(client: Redis, schema: int, values: np.ndarray) -> bytes:
    """Where the online store holds these values, however it names its keys."""
    for key in client.scan_iter(_type="string"):
        with contextlib.suppress(ValueError):  # something other than a value of the view
            if (found := codec.decode(client.get(key), schema, len(values))) is not None and (found.values == values).all():
                return bytes(key)
    raise LookupError(values)


def late_value(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late event changes 8:00's row, and a writer without compare-and-set puts it over 9:00's."""
    shop.at(9, 20)
    shop.orders(*shop.early, ("a", 7.9, 45.0))
    shop.tick()
    event, created = (round((DAY + h * HOUR + m * MINUTE).timestamp() * 1e6) for h, m in ((8, 0), (9, 20)))
    order = codec.feature_order(shop.plan.features)
    schema = codec.schema_hash(shop.plan.name, order)
    newer, late = (np.array([{"orders": 2.0, "amount": amount}[name] for name in order]) for amount in (50.0, 55.0))
    key = key_of(shop.clients.redis, schema, newer)
    shop.clients.redis.set(key, codec.encode(schema, event, created, late))
    shop.at(9, 25)
    shop.ask()


def time_shift(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job hands over New York's wall clock without its zone, which is taken for UTC."""

    def naive(client: Redis, project: str, view: str, keys: Any, features: Any, frame: pl.DataFrame) -> Any:
        local = pl.col("event_timestamp").dt.convert_time_zone("America/New_York").dt.replace_time_zone(None)
        return write_frame(client, project, view, keys, features, frame.with_columns(local))

    monkeypatch.setattr(online_assets, "write_frame", naive)
    shop.at(9, 1)
    shop.orders(*shop.early, ("c", 8.5, 7.0))  # a shop with nothing stored yet: what is older would not be taken
    shop.tick()
    assert shop.ask("c")["feature_ages_s"] == {"shop_totals": 4 * 3600 + 60}


def default_filled_silently(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service fills defaults in and tells nobody."""
    told = service_features._tell

    def silent(out: Any, *rest: Any) -> None:
        told(out, *rest)
        out.imputed.clear()

    monkeypatch.setattr(service_features, "_tell", silent)
    shop.at(9, 5)
    assert shop.ask("nobody")["imputed"] == []


def request_function_changed(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service runs other code than the version was trained with, past its own guard."""
    real = service_features.FeaturePlan._run_functions

    def other(self: Any, given: Any, rows: int) -> Any:
        return {name: values // 15 * 15 for name, values in real(self, given, rows).items()}

    monkeypatch.setattr(service_features.FeaturePlan, "_run_functions", other)
    shop.at(9, 5)
    shop.ask()


FAULTS: list[Callable[[Any, pytest.MonkeyPatch], None]] = [
    ttl_ignored,
    correction_lost,
    late_value,
    time_shift,
    default_filled_silently,
    request_function_changed,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found_named_and_stops_promotion_until_it_is_mended(shop, monkeypatch, plant):
    shop.at(9, 1)
    shop.ask("b")
    with monkeypatch.context() as patch:
        plant(shop, patch)
    passed, found = shop.prove()
    assert (passed, found.kinds, found.mismatched, found.compared) == (False, {plant.__name__: 1}, 1, 2)
    [example] = found.examples
    assert example["fault"] == plant.__name__
    number = shop.version.version
    refused = promote(shop.clients, "returns", number, "ann", by_hand=True)
    assert refused.action == "refuse"
    assert f"skew: 1 of 2 predictions differ ({plant.__name__} 1)" in refused.reason
    assert shop.clients.ledger.entries("returns")[-1].action == "refuse"
    # Mended, and said so in the declaration: the faulty predictions count no more.
    mended = shop.spec.model_copy(update={"skew": SkewPolicy(ignore_before=shop.clients.clock.now())})
    assert shop.prove(mended)[0]
    assert promote(shop.clients, "returns", number, "ann").action == "promote"


def test_a_function_that_is_no_longer_the_trained_one_fails_the_check_by_name_and_stops_no_new_version(shop, package, forget_package):
    shop.at(9, 5)
    shop.ask()
    file = package / "functions.py"
    file.write_text(file.read_text().replace('"m")}', '"m") + 1.0}'))
    forget_package()
    passed, found = shop.prove()
    assert (passed, found.kinds) == (False, {})
    assert [reason.partition(": ")[2].partition(":")[0] for reason in found.unresolved] == ["request_function_changed"]
    assert promote(shop.clients, "returns", shop.version.version, "ann").action == "promote"


def test_before_the_first_prediction_there_is_nothing_to_compare_and_the_check_says_so(shop):
    passed, found = shop.prove()
    assert (passed, found.predictions, found.compared) == (True, 0, 0)


def test_predictions_of_a_version_the_registry_lost_fail_the_check(shop, monkeypatch):
    shop.at(9, 5)
    shop.ask()
    monkeypatch.setattr(Registry, "version", unknown)
    passed, found = shop.prove()
    assert (passed, found.predictions, found.compared) == (False, 1, 0)
    assert "the registry does not know it" in found.unresolved[0]


def unknown(self: Registry, model: str, number: int) -> ModelVersion:
    from mlplatform.clients.registry import UnknownModelError

    raise UnknownModelError(f"{model} {number}")
