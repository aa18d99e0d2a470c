"""An experiment on a real MLflow store, ledger and lake: begun by rules, read as an asset and by command, kept out of others' layers."""

import json
from collections.abc import Callable
from datetime import date, timedelta

import dagster as dg
import numpy as np
import polars as pl
import pytest

from mlplatform.clients.lake import with_day
from mlplatform.contracts import Arm, Experiment, Layer, TrafficRules
from mlplatform.orchestration.assets.experiment import experiment_assets
from mlplatform.orchestration.experiment_state import experiment_result
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.serving_state import promote
from mlplatform.orchestration.traffic_state import set_rules
from mlplatform.specs import ModelSpec, Split

ARMS = (Arm(name="old", serves="1", weight=50), Arm(name="new", serves="2", weight=50))


def rules(layer: str, start: float, end: float) -> TrafficRules:
    """The experiment in a part of a layer; the tests' models share one registry, so each test has a layer of its own."""
    part = Layer(name=layer, start=start, end=end)
    return TrafficRules(experiment=Experiment(name="price", salt="x", arms=ARMS, layer=part))


@pytest.fixture
def spec(model: str) -> ModelSpec:
    days = [date(2013, month, 1) for month in (1, 2, 3, 4)]
    split = Split(train_start=days[0], validate_start=days[1], test_start=days[2], end=days[3])
    given = {"description": "x", "feature_service": "s", "inputs": {}, "rows": lambda _: pl.DataFrame(), "row_key": ("id",)}
    return ModelSpec(name=model, request_fields=(), split=split, **given)


def materialize(spec: ModelSpec) -> dict[str, dg.MetadataValue]:
    done = dg.materialize(experiment_assets(spec), resources={"platform": PlatformResource()}, selection=dg.AssetSelection.all())
    return dict(done.asset_materializations_for_node(f"experiment_{spec.name}")[0].metadata)


def test_an_experiment_that_began_is_read_by_the_asset_with_effects_and_a_picture(clients: Clients, spec: ModelSpec) -> None:
    promote(clients, spec.name, 1, "tom")
    assert experiment_result(clients, spec) is None
    assert materialize(spec)["note"].value == "no experiment runs"
    assert not set_rules(clients, spec.name, rules("prices", 0, 50), "ann", "a try").refused
    rng, start = np.random.default_rng(3), clients.clock.now()
    arms = rng.choice(["old", "new"], 4000)
    times = [start + timedelta(seconds=5 * k) for k in range(4000)]
    rows = {
        "request_id": [f"r{k}" for k in range(4000)],
        "input_index": 0,
        "inputs": [json.dumps({"x": k}) for k in range(4000)],
        "requested_at": times,
        "variant": [f"price/{arm}" for arm in arms],
        "version": 1,
        "prediction": 0.3,
        "state": "known",
        "label": (rng.random(4000) < np.where(arms == "new", 0.6, 0.3)).astype(float),
        "label_known_at": times,
    }
    clients.lake.append(("outcomes", spec.name), with_day(pl.DataFrame(rows), "requested_at"))
    clients.clock.set(start + timedelta(hours=7))
    found = experiment_result(clients, spec)
    assert found is not None
    assert found.entities == {arm: int((arms == arm).sum()) for arm in ("old", "new")}
    assert [e.metric for e in found.effects if e.differs] == ["label", "loss"]
    told = materialize(spec)
    assert told["experiment"].value == "price"
    assert "arm less control" in str(told["effects"].value)
    assert "data:image/png" in str(told["intervals"].value)


def test_a_part_of_a_layer_that_another_models_experiment_holds_is_refused(clients: Clients, new_model: Callable[[], str]) -> None:
    one = new_model()
    promote(clients, one, 1, "tom")
    assert not set_rules(clients, one, rules("ui", 0, 50), "ann", "a try").refused
    assert not set_rules(clients, one, rules("ui", 0, 60), "ann", "its own part may grow").refused
    other = new_model()
    promote(clients, other, 1, "tom")
    [reason] = set_rules(clients, other, rules("ui", 50, 100), "ann", "a try").reasons
    assert reason == f"layer ui: {other}/price [50, 100) and {one}/price [0, 60) overlap"
    assert not set_rules(clients, other, rules("ui", 60, 100), "ann", "a try").refused


def test_a_layer_that_another_model_draws_by_other_fields_is_refused_until_both_draw_by_the_same(
    clients: Clients, new_model: Callable[..., str]
) -> None:
    one, other = new_model(), new_model(("x", "y"))
    for model in (one, other):
        promote(clients, model, 1, "tom")
    assert not set_rules(clients, one, rules("fields", 0, 50), "ann", "a try").refused
    [reason] = set_rules(clients, other, rules("fields", 50, 100), "ann", "a try").reasons
    assert reason.startswith(f"layer fields: {one}/price draws it by x, {other}/price by x, y: set the same `sticky_on`")
    same = rules("fields", 50, 100).model_copy(update={"sticky_on": ("x",)})
    assert not set_rules(clients, other, same, "ann", "a try").refused
