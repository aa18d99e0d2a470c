"""Loading one version: bit-identical answers, and every way a version is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost as xgb

from mlplatform.contracts import CONTRACT_FILE
from serving_app.device import DeviceError, pick_device
from serving_app.model_handle import ModelRefusedError, VersionRef, load_model


def load(registered: Any, home: Path) -> Any:
    return load_model(VersionRef(registered.contract.model, registered.version, "test"), registered.into_cache(home), "cpu", 1)


def test_predictions_are_bit_identical_to_booster_predict(make_model, tmp_path) -> None:
    model = make_model()
    handle = load(model, tmp_path)
    rng = np.random.default_rng(3)
    for rows in (1, 7, 64, 1000):
        matrix = rng.normal(size=(rows, 10)) * 10
        matrix[rng.random(matrix.shape) < 0.2] = np.nan
        wanted = model.booster.predict(xgb.DMatrix(matrix, feature_names=[f.name for f in model.contract.features]))
        assert np.array_equal(handle.predict(matrix), wanted)


def test_a_booster_with_native_categories_answers_like_booster_predict(make_model, tmp_path) -> None:
    import hashlib

    model = make_model()
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(500, 10))
    rows[:, 8] = rng.integers(0, 6, 500)
    label = np.isin(rows[:, 8], [1, 4]).astype(int)
    names = [f.name for f in model.contract.features]
    types = ["q"] * 8 + ["c", "q"]
    data = xgb.DMatrix(rows, label, feature_names=names, feature_types=types, enable_categorical=True)
    booster = xgb.train({"objective": "binary:logistic", "max_cat_to_onehot": 1, "nthread": 1}, data, 10)
    raw = bytes(booster.save_raw("ubj"))
    answers = booster.predict(data)
    model.files["model.ubj"] = raw
    changed = model.contract.model_copy(
        update={
            "model_sha256": hashlib.sha256(raw).hexdigest(),
            "example_features": tuple(tuple(map(float, row)) for row in rows[:16]),
            "example_predictions": tuple(float(a) for a in answers[:16]),
        }
    )
    model.files[CONTRACT_FILE] = changed.canonical_json().encode()
    handle = load(model, tmp_path)
    assert np.array_equal(handle.predict(rows), answers)


def spoil(registered: Any, **changes: Any) -> None:
    registered.files[CONTRACT_FILE] = json.dumps(json.loads(registered.contract.canonical_json()) | changes).encode()


def function(model: Any, **changes: Any) -> list[dict[str, Any]]:
    return [model.contract.functions[0].model_dump(mode="json") | changes]


REFUSALS = {
    "an altered model file": ("hash", lambda m: m.files.update({"model.ubj": m.files["model.ubj"][:-1] + b"x"})),
    "a truncated model file": ("hash", lambda m: m.files.update({"model.ubj": m.files["model.ubj"][:200]})),
    "a contract that is not JSON": ("contract", lambda m: m.files.update({CONTRACT_FILE: b"{"})),
    "another model's contract": ("contract", lambda m: spoil(m, model="other")),
    "a model file outside its folder": ("contract", lambda m: spoil(m, model_file="../../evil.ubj")),
    "features in another order": ("features", lambda m: spoil(m, features=[f.model_dump(mode="json") for f in m.contract.features[::-1]])),
    "a feature of an unknown view": ("contract", lambda m: spoil(m, views=[])),
    "a join key that is no field": ("contract", lambda m: spoil(m, fields=[f.model_dump(mode="json") for f in m.contract.fields[1:]])),
    "a function outside the package": ("functions", lambda m: spoil(m, functions=function(m, path="os:system"))),
    "a function smuggled through a module of the package": (
        "functions",
        lambda m: spoil(m, functions=function(m, path="feature_definitions.shop.functions:np")),
    ),
    "a function that is not there": ("functions", lambda m: spoil(m, functions=function(m, path="feature_definitions.gone:f"))),
    "a function that changed since training": ("functions", lambda m: spoil(m, functions=function(m, source_hash="0" * 64))),
    "an example answered otherwise in training": ("examples", lambda m: spoil(m, example_predictions=[0.5] * 16)),
    "no examples": ("examples", lambda m: spoil(m, example_predictions=[], example_features=[])),
    "a field whose own example is invalid": (
        "contract",
        lambda m: spoil(m, fields=[f.model_dump(mode="json") | ({"maximum": 1} if f.name == "price" else {}) for f in m.contract.fields]),
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_version_is_refused_for(make_model, tmp_path, what) -> None:
    step, damage = REFUSALS[what]
    model = make_model()
    damage(model)
    with pytest.raises(ModelRefusedError) as refused:
        load(model, tmp_path)
    if what == "a feature of an unknown view":
        assert refused.value.step in ("contract", "functions")
    else:
        assert refused.value.step == step, refused.value


def test_one_last_bit_of_an_example_is_enough_to_refuse(make_model, tmp_path) -> None:
    model = make_model()
    first, *rest = model.contract.example_predictions
    spoil(model, example_predictions=[float(np.nextafter(np.float32(first), np.float32(1))), *rest])
    with pytest.raises(ModelRefusedError, match="example 0"):
        load(model, tmp_path)


def test_a_device_that_is_not_there_fails_loudly() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda:0")
    with pytest.raises(DeviceError, match=r"MLPLATFORM_DEVICE=cuda:99"):
        pick_device("cuda:99")


def test_threads_that_predict_at_once_get_each_their_own_rows_answers(make_model, tmp_path) -> None:
    model = make_model()
    handle = load(model, tmp_path)
    matrix = np.random.default_rng(5).normal(size=(400, 10))
    wanted = model.booster.predict(xgb.DMatrix(matrix, feature_names=[f.name for f in model.contract.features]))
    parts = [(start, start + rows) for rows in (1, 3, 70, 200) for start in range(0, 200, 25)] * 20
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda part: handle.predict(matrix[slice(*part)]), parts))
    assert all(np.array_equal(one, wanted[slice(*part)]) for one, part in zip(found, parts, strict=True))
