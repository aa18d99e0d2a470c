"""Logged predictions against rows of a view: a clean day has no fault, and each planted fault is found under its name."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.contracts import ContractFeature, ContractField, ContractFunction, ContractView, ServingContract
from mlplatform.monitoring import skew
from mlplatform.monitoring.drain import predictions_schema
from mlplatform.monitoring.skew_faults import FAULTS
from mlplatform.monitoring.skew_plot import skew_plot
from mlplatform.records import SkewSummary
from mlplatform.specs import SkewPolicy

UTC_US = pl.Datetime("us", "UTC")
NOON = datetime(2024, 5, 3, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
NAN = float("nan")
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


CONTRACT = contract()


class Day:
    """A view's table and a log, each filled as its owner would."""

    def __init__(self, made: ServingContract = CONTRACT) -> None:
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
                "prediction": 0.5,
                "latency_ms": 1.0,
                "stream_id": "1-0",
                "contract_digest": self.contract.digest(),
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
        return skew.summarise("returns", POLICY, window, log.height, [(logged, skew.compare(logged, truth))], truth.propagation)


def hourly(day: Day) -> None:
    """A row at each full hour of the day, available two minutes later; orders and returns count up."""
    for hour in range(24):
        event = NOON.replace(hour=0) + hour * HOUR
        day.row(event, float(hour), hour / 3, event + 2 * MINUTE)


@pytest.fixture
def day() -> Day:
    made = Day()
    hourly(made)
    return made


# --- a clean day ----------------------------------------------------------------------------------------------------


def test_a_clean_day_has_no_fault(day):
    for minute in range(0, 600, 7):
        at = NOON + minute * MINUTE + timedelta(microseconds=minute * 12345 + 1)
        event = (at - 2 * MINUTE).replace(minute=0, second=0, microsecond=0)
        day.ask(at, event, float(event.hour), event.hour / 3)
    found = day.judged()
    assert (found.predictions, found.compared, found.mismatched, found.kinds) == (86, 86, 0, {})
    assert found.passed
    assert {s["source"]: s["mismatches"] for s in found.by_source} == {
        "totals": 0,
        "f:part_of_day": 0,
        "request fields": 0,
        "categories": 0,
    }
    names = ("returns", "orders", "minute", "twice", "price", "channel")
    assert {f["feature"]: (f["compared"], f["mismatches"]) for f in found.by_feature} == dict.fromkeys(names, (86, 0))


def test_a_value_on_its_way_is_no_fault_and_its_lag_is_told(day):
    day.ask(NOON + 20 * MINUTE, NOON - HOUR, 11.0, 11 / 3)
    day.ask(NOON + 32 * MINUTE, NOON - HOUR, 11.0, 11 / 3)  # exactly the budget
    found = day.judged()
    assert found.kinds == {}
    [source] = [s for s in found.by_source if s["source"] == "totals"]
    assert (source["behind"], source["budget_s"], source["lag_p50_s"], source["lag_max_s"]) == (2, 1800.0, 1440.0, 1800.0)


def test_nulls_are_nan_where_the_view_declares_no_default_and_the_default_where_it_does():
    for defaults, stood in (({"orders": None, "returns": None, "load": None}, None), ({"orders": 5.0, "returns": None, "load": None}, 5.0)):
        day = Day(contract(defaults=defaults))
        day.row(NOON, None, 1.0)
        day.ask(NOON + MINUTE, NOON, stood, 1.0)
        assert day.judged().kinds == {}


@pytest.mark.parametrize("age", [None, 4 * HOUR])
def test_what_is_missing_or_expired_is_replaced_by_the_recorded_default_and_says_so(age):
    day = Day(contract(defaults={"orders": 5.0, "returns": None, "load": 9.0}))
    if age:
        day.row(NOON - age, 3.0, 3.0)
    day.ask(NOON, None if age is None else NOON - age, 5.0, None, imputed=True, load=9.0)
    assert day.judged().kinds == {}


def test_a_view_that_is_served_when_stale_may_be_old():
    day = Day(contract("serve"))
    day.row(NOON - 9 * HOUR, 3.0, 3.0)
    day.ask(NOON, NOON - 9 * HOUR, 3.0, 3.0)
    assert day.judged().kinds == {}


def test_either_of_two_versions_of_a_row_may_be_served_while_the_correction_is_on_its_way(day):
    day.row(NOON, 99.0, 12 / 3, NOON + 20 * MINUTE)
    day.ask(NOON + 25 * MINUTE, NOON, 12.0, 12 / 3)
    day.ask(NOON + 25 * MINUTE, NOON, 99.0, 12 / 3)
    assert day.judged().kinds == {}


def test_two_nan_are_one_but_the_zeros_have_signs():
    day = Day()
    day.row(NOON, 0.0, NAN)
    day.ask(NOON + MINUTE, NOON, 0.0, None)
    assert day.judged().kinds == {}
    day.ask(NOON + MINUTE, NOON, -0.0, None)
    assert day.judged().kinds == {"value_differs": 1}


def test_every_age_up_to_seventy_one_years_gives_its_microsecond_back():
    ages = np.random.default_rng(0).integers(0, 2**51, 200_000)
    assert (np.rint(ages / 1e6 * 1e6).astype(np.int64) == ages).all()
    assert json.loads(json.dumps((ages[:1000] / 1e6).tolist())) == (ages[:1000] / 1e6).tolist()


# --- one fault at a time --------------------------------------------------------------------------------------------


def ttl_ignored(day: Day) -> None:
    day.row(NOON - 4 * HOUR, 8.0, 3.0, shop="b")  # and nothing since
    day.ask(NOON, NOON - 4 * HOUR, 8.0, 3.0, inputs={"shop": "b"})


def correction_lost(day: Day) -> None:
    day.row(NOON, 12.5, 12 / 3, NOON + 5 * MINUTE)
    day.ask(NOON + 36 * MINUTE, NOON, 12.0, 12 / 3)


def late_value(day: Day) -> None:
    day.row(NOON - 1 * HOUR, 11.5, 11 / 3, NOON + 10 * MINUTE)
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.5, 11 / 3)


def newer_value_lost(day: Day) -> None:
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.0, 11 / 3)


def time_shift(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON - 2 * HOUR, 12.0, 12 / 3)


def time_shift_into_the_future(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON + 5 * HOUR + 30 * MINUTE, 12.0, 12 / 3)


def default_filled_silently(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, None, 12 / 3)


def default_for_a_missing_view_silently(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, None, None, None)


def request_function_changed(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, twice=3.0)


def time_of_the_request_shifted(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, minute=9.0 * 60 + 10)


def wrong_default(day: Day) -> None:
    day.ask(NOON, None, 0.0, None, imputed=True, load=NAN, inputs={"shop": "b"})


def value_not_used(day: Day) -> None:
    day.ask(NOON + 33 * MINUTE, None, None, None, imputed=True)


def fresh_value_replaced(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, None, None, imputed=True)


def expired_though_newer(day: Day) -> None:
    day.ask(NOON + 33 * MINUTE, NOON - 5 * HOUR, None, None, imputed=True)


def from_the_future(day: Day) -> None:
    day.row(NOON + 7 * MINUTE, 55.0, 5.0)
    day.ask(NOON + 6 * MINUTE, NOON + 7 * MINUTE, 55.0, 5.0)


def created_after_the_request(day: Day) -> None:
    day.row(NOON, 77.0, 5.0, NOON + 20 * MINUTE)
    day.ask(NOON + 19 * MINUTE, NOON, 77.0, 5.0)


def value_differs(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.25, 12 / 3)


def unknown_row(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON - 13 * MINUTE, 123.0, 4.0)


def another_shop(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, inputs={"shop": "b"}, twice=None)


def category_differs(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, channel=0.0)


def request_value_differs(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, inputs={"price": None})


def unreadable_inputs(day: Day) -> None:
    day.ask(NOON + 10 * MINUTE, NOON, 12.0, 12 / 3, inputs={"customer": "seven"})


PLANTED = [
    (ttl_ignored, "ttl_ignored"),
    (correction_lost, "correction_lost"),
    (late_value, "late_value"),
    (newer_value_lost, "newer_value_lost"),
    (time_shift, "time_shift"),
    (time_shift_into_the_future, "time_shift"),
    (time_of_the_request_shifted, "time_shift"),
    (default_filled_silently, "default_filled_silently"),
    (default_for_a_missing_view_silently, "default_filled_silently"),
    (request_function_changed, "request_function_changed"),
    (wrong_default, "wrong_default"),
    (value_not_used, "value_not_used"),
    (fresh_value_replaced, "value_not_used"),
    (expired_though_newer, "newer_value_lost"),
    (from_the_future, "from_the_future"),
    (created_after_the_request, "from_the_future"),
    (value_differs, "value_differs"),
    (unknown_row, "unknown_row"),
    (another_shop, "unknown_row"),
    (category_differs, "category_differs"),
    (request_value_differs, "request_value_differs"),
    (unreadable_inputs, "unreadable_inputs"),
]


@pytest.mark.parametrize(("plant", "name"), PLANTED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_planted_fault_is_found_and_named_and_nothing_else_is(day, plant, name):
    day.ask(NOON + 5 * MINUTE, NOON, 12.0, 12 / 3)
    assert day.judged().passed
    plant(day)
    found = day.judged()
    assert found.kinds == {name: 1}
    assert (found.compared, found.mismatched) == (2, 1)
    assert not found.passed


def test_every_fault_that_has_a_name_was_planted():
    assert {name for _, name in PLANTED} | {"prediction_differs"} == set(FAULTS)


def test_an_answer_the_model_does_not_give_is_found(day):
    day.ask(NOON + 5 * MINUTE, NOON, 12.0, 12 / 3)
    assert day.judged(lambda m: np.full(len(m), 0.5 + 1e-7)).kinds == {}
    assert day.judged(lambda m: np.full(len(m), 0.51)).kinds == {"prediction_differs": 1}
    assert day.judged(lambda m: np.full(len(m), NAN)).kinds == {"prediction_differs": 1}


# --- any store, honest or not -------------------------------------------------------------------------------------------

MINUTES = st.integers(0, 120)
# (event, available after, on its way online for, value): the last is what tells rows apart.
ROWS = st.lists(st.tuples(MINUTES, st.integers(0, 60), st.integers(0, 60), st.integers(0, 3)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.integers(0, 240), st.integers(1, 60))
def test_a_store_that_keeps_the_budget_is_never_accused_and_one_that_does_not_always_is(rows, asked, budget_min):
    """Rows reach a store that keeps the newest by (event, created), each in its own time; a request reads what is there.

    The oracle goes through the rows one by one: a served row must have been available, and nothing newer within the ttl
    (three hours) may have been available for longer than the budget.
    """
    day = Day()
    day.propagation = budget_min * MINUTE
    table = {(e, e + c): (v, e + c + way) for e, c, way, v in rows}  # (event, created) is the key of a row
    for (event, created), (value, _) in table.items():
        day.row(NOON + event * MINUTE, float(value), float(event), NOON + created * MINUTE)
    there = max((key for key, (_, readable) in table.items() if readable <= asked), default=None)
    overdue = [key for key in table if key[1] < asked - budget_min and asked - key[0] <= 180]
    if there is None or asked - there[0] > 180:
        event = None if there is None else NOON + there[0] * MINUTE
        day.ask(NOON + asked * MINUTE, event, None, None, imputed=True, load=NAN)
        accused = bool(overdue) if there is None else any(key > there for key in overdue)
    else:
        day.ask(NOON + asked * MINUTE, NOON + there[0] * MINUTE, float(table[there][0]), float(there[0]))
        # A correction that brought the same values back changed nothing that was served.
        same = max(key for key in table if key[0] == there[0] and table[key][0] == table[there][0] and key[1] <= asked)
        accused = any(key > same for key in overdue)
    assert bool(day.judged().mismatched) == accused


# --- the summary ----------------------------------------------------------------------------------------------------


def test_an_example_says_what_was_served_what_was_right_and_when(day):
    correction_lost(day)
    [example] = day.judged().examples
    assert example == {
        "fault": "correction_lost",
        "source": "totals",
        "request_id": "r0",
        "input_index": 0,
        "version": 1,
        "requested_at": "2024-05-03T12:36:00+00:00",
        "entity": {"shop": "a"},
        "served": {"orders": 12.0},
        "rebuilt": {"orders": 12.5},
        "served_event": "2024-05-03T12:00:00+00:00",
        "expected_event": "2024-05-03T12:00:00+00:00",
        "expected_created": "2024-05-03T12:05:00+00:00",
    }


def test_mismatches_are_counted_by_feature_and_source(day):
    for number in range(4):
        day.ask(NOON + 10 * MINUTE, NOON, 12.0 + (number == 3), 12 / 3)
    found = day.judged()
    assert {f["feature"]: f["mismatches"] for f in found.by_feature if f["mismatches"]} == {"orders": 1}
    [source] = [s for s in found.by_source if s["source"] == "totals"]
    assert (source["compared"], source["mismatches"], source["rate"], source["kinds"]) == (4, 1, 0.25, {"value_differs": 1})
    assert found.rate == 0.25


def test_a_function_that_is_not_given_is_left_out_of_the_comparison(day):
    request_function_changed(day)
    day.functions = {}
    assert day.judged().kinds == {}


def test_a_view_without_entities_is_compared_too():
    made = contract()
    view = made.views[0].model_copy(update={"join_keys": ()})
    day = Day(made.model_copy(update={"views": (view,)}))
    hourly(day)
    day.ask(NOON + 5 * MINUTE, NOON, 12.0, 12 / 3)
    day.ask(NOON + 33 * MINUTE, NOON - HOUR, 11.0, 11 / 3)
    time_shift(day)
    assert day.judged().kinds == {"newer_value_lost": 1, "time_shift": 1}


def test_an_empty_table_and_an_empty_log_are_compared_without_complaint():
    assert (Day().judged().compared, Day().judged().rate) == (0, 0.0)
    day = Day()
    day.ask(NOON, None, None, None, imputed=True, load=NAN)
    assert day.judged().kinds == {}


def test_a_vector_of_another_length_is_an_error(day):
    day.ask(NOON, NOON, 12.0, 4.0)
    day.log[0]["features"] = [1.0]
    with pytest.raises(ValueError, match="6 features"):
        day.judged()


# --- what is judged -------------------------------------------------------------------------------------------------


def test_all_predictions_are_judged_up_to_the_declared_number_and_a_seeded_sample_above():
    log = pl.DataFrame({"request_id": [f"r{n}" for n in range(50)], "input_index": [0] * 50})
    assert skew.chosen(log, SkewPolicy(sample_rows=50)).height == 50
    few = skew.chosen(log, SkewPolicy(sample_rows=20))
    assert few.height == few.n_unique() == 20
    assert few.equals(skew.chosen(log.sample(fraction=1.0, shuffle=True, seed=3), SkewPolicy(sample_rows=20)))
    assert not few.equals(skew.chosen(log, SkewPolicy(sample_rows=20, seed=1)))


def test_predictions_before_a_fault_was_mended_are_not_judged():
    assert skew.judged_window(SkewPolicy(), NOON) == (NOON - timedelta(days=7), NOON)
    mended = SkewPolicy(ignore_before=NOON - HOUR)
    assert skew.judged_window(mended, NOON) == (NOON - HOUR, NOON)
    assert skew.judged_window(mended, NOON + timedelta(days=30))[0] == NOON + timedelta(days=23)
    assert skew.judged_window(mended, NOON - 2 * HOUR) == (NOON - 2 * HOUR, NOON - 2 * HOUR)


def test_the_plot_is_a_picture_with_and_without_faults(day):
    assert skew_plot(day.judged()).startswith(b"\x89PNG")
    newer_value_lost(day)
    assert skew_plot(day.judged()).startswith(b"\x89PNG")
