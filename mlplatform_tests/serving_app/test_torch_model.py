"""A torch model in the service: quantiles in every protocol, as near to training as declared, and no torch where none is needed."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from mlplatform.client import PredictionClient
from mlplatform.contracts import CONTRACT_FILE, ServingContract
from mlplatform.monitoring.drain import Entry, drain
from mlplatform.training.trainers.base import cuda_devices
from serving_app.model_handle import ModelRefusedError, VersionRef, load_model

LEVELS = (0.1, 0.5, 0.9)
NAMES = ("p10", "p50", "p90")
FILE = "model.safetensors"
PATH = "/v1/models/basket"
ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
# In the contract's order, the category last; what the row and the stored values come to.
FEATURES = [10.0, 2.0, 10.5, 99.5, 12.5, 12.5 / 3, 4.0, 8.0, 30.0, 1.0]


@pytest.fixture
def make_torch(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """`make_torch(levels=…)`: the model of `make_model`, with a network of the platform in place of the booster."""

    def make(version: int = 1, levels: tuple[float, ...] = LEVELS, **changes: Any) -> Any:
        import torch

        from mlplatform import networks

        model = make_model(version)
        told = json.loads(model.contract.canonical_json())
        features = sorted(told["features"], key=lambda f: f["kind"] == "category")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(version)
            network = networks.TabularNetwork(networks.Architecture(9, (2,), levels, width=32, depth=2, dropout=0.1, label_scale=40.0))
        raw = networks.to_bytes(network.eval())
        rows = np.random.default_rng(0).normal(size=(16, 10)) * 10
        rows[:, -1] = np.arange(16) % 2
        rows[3] = np.nan
        contract = told | {
            "task": "quantiles" if levels else "binary",
            "framework": "torch",
            "model_file": FILE,
            "model_sha256": hashlib.sha256(raw).hexdigest(),
            "features": features,
            "threshold": None if levels else 0.4,
            "quantiles": levels,
            "tolerance": 1e-3,
            "example_features": [[None if np.isnan(v) else float(v) for v in row] for row in rows],
            "example_predictions": networks.predict(network, rows).astype(np.float64).tolist(),
        }
        model.contract = ServingContract.model_validate(contract | changes)
        model.files = {CONTRACT_FILE: model.contract.canonical_json().encode(), FILE: raw}
        model.network = network
        return model

    return make


@pytest.fixture
def stored(put_values: Any) -> None:
    put_values("shop_stats", ["s1"], [10.0, 2.0], age_s=60)
    put_values("customer_stats", [7, "s1"], [99.5], age_s=120)
    put_values("all_stats", ["all"], [4.0], age_s=30)


@pytest.fixture
def answered(make_torch: Any, stored: None, open_service: Any, tmp_path: Any) -> tuple[httpx.Client, list[float]]:
    """A running service with the model, and the quantiles it must answer for ROW."""
    from mlplatform import networks

    model = make_torch()
    model.into_cache(tmp_path)
    wanted = networks.predict(model.network, np.array([FEATURES]))[0].astype(np.float64).tolist()
    return open_service(), wanted


def load(registered: Any, home: Any, device: str = "cpu") -> Any:
    return load_model(VersionRef("basket", registered.version, "test"), registered.into_cache(home), device, 1)


def test_an_answer_gives_the_quantiles_and_their_median_as_the_prediction(answered) -> None:
    client, wanted = answered
    body = client.post(f"{PATH}/predict", json={"inputs": [ROW]}).json()
    [told] = body["predictions"]
    assert told["quantiles"] == dict(zip(NAMES, wanted, strict=True))
    assert told["prediction"] == told["quantiles"]["p50"]
    assert told["quantiles"]["p10"] <= told["quantiles"]["p50"] <= told["quantiles"]["p90"]
    assert (told["decision"], body["threshold"]) == (None, None)


def test_small_and_large_batches_agree_within_the_tolerance(answered) -> None:
    client, wanted = answered
    rows = client.post(f"{PATH}/predict", json={"inputs": [ROW] * 300}).json()["predictions"]
    np.testing.assert_allclose([[row["quantiles"][name] for name in NAMES] for row in rows], [wanted] * 300, rtol=0, atol=1e-3)


def test_the_other_protocols_name_the_quantiles_too(answered) -> None:
    client, wanted = answered
    [row] = client.post(f"{PATH}/invocations", json={"dataframe_records": [ROW]}).json()["predictions"]
    assert row == dict(zip(NAMES, wanted, strict=True))
    with triton.InferenceServerClient(f"127.0.0.1:{client.base_url.port}") as inference:
        described = inference.get_model_metadata("basket")
        assert [o["name"] for o in described["outputs"]] == ["prediction", *NAMES, "imputed"]
        tensor = triton.InferInput("features", [1, 10], "FP64")
        tensor.set_data_from_numpy(np.array([FEATURES]))
        found = inference.infer("basket", [tensor])
        assert [float(found.as_numpy(name)[0]) for name in NAMES] == pytest.approx(wanted, abs=1e-3)


def test_the_client_and_the_document_show_the_quantiles(answered) -> None:
    client, wanted = answered
    with PredictionClient(str(client.base_url)) as ours:
        assert ours.predict("basket", [ROW]).predictions[0].quantiles == dict(zip(NAMES, wanted, strict=True))
    document = client.get("/openapi.json").json()
    assert "p10, p50, p90" in document["paths"][f"{PATH}/predict"]["post"]["description"]
    assert "quantiles" in document["components"]["schemas"]["Prediction"]["properties"]
    assert client.get(PATH).json()["quantiles"] == list(NAMES)


def test_the_log_keeps_all_quantiles_and_the_drain_stores_them(answered, logged) -> None:
    client, wanted = answered
    client.post(f"{PATH}/predict", json={"inputs": [ROW]})
    [record] = logged(1)
    assert record.quantiles == tuple(wanted)
    assert record.prediction == wanted[1]
    from datetime import UTC, datetime

    drained = drain(
        [Entry("1-1", record.model_dump_json())],
        model="basket",
        fields=(),
        received_at=datetime(2013, 9, 1, tzinfo=UTC),
        after=0,
        set_aside_after=0,
        stored=lambda days: set(),
        prediction_range=(-np.inf, np.inf),
    )
    assert drained.predictions["quantiles"].to_list() == [wanted]


def test_trees_are_not_explained_where_there_are_none(answered) -> None:
    client, _ = answered
    refused = client.post(f"{PATH}/predict?explain=true", json={"inputs": [ROW]})
    assert refused.status_code == 422
    assert "no trees" in refused.text
    shown = client.post(f"{PATH}/predict?features=true", json={"inputs": [ROW]}).json()["predictions"][0]
    assert list(shown["features"].values()) == FEATURES


def test_a_network_may_answer_a_probability_like_any_classifier(make_torch, stored, open_service, tmp_path) -> None:
    from mlplatform import networks

    model = make_torch(levels=())
    model.into_cache(tmp_path)
    [told] = open_service().post(f"{PATH}/predict", json={"inputs": [ROW]}).json()["predictions"]
    assert told["prediction"] == float(networks.predict(model.network, np.array([FEATURES]))[0])
    assert told["decision"] is (told["prediction"] >= 0.4)
    assert "quantiles" not in told


def test_one_process_serves_both_families(make_model, make_torch, stored, open_service, tmp_path) -> None:
    make_model(model="other").into_cache(tmp_path)
    make_torch().into_cache(tmp_path)
    client = open_service()
    assert client.get("/health/ready").json()["models"] == {"basket": 1, "other": 1}
    assert "quantiles" not in client.post("/v1/models/other/predict", json={"inputs": [ROW]}).json()["predictions"][0]


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"quantiles": (0.25, 0.5, 0.75)}, "features"),
        ({"example_predictions": tuple((0.0, 1.0, 2.0) for _ in range(16))}, "examples"),
        ({"example_predictions": tuple(1.0 for _ in range(16))}, "examples"),
        ({"model_sha256": "0" * 64}, "hash"),
    ],
)
def test_a_version_that_is_not_what_its_contract_says_is_refused(make_torch, tmp_path, changes, step) -> None:
    with pytest.raises(ModelRefusedError) as refused:
        load(make_torch(**changes), tmp_path)
    assert refused.value.step == step


def test_a_pickle_in_place_of_the_weights_is_refused_even_with_the_right_hash(make_torch, tmp_path) -> None:
    import io
    import pickle

    import torch

    model = make_torch()
    archive = io.BytesIO()
    torch.save(model.network.state_dict(), archive)
    for raw in (pickle.dumps(model.network.state_dict()), archive.getvalue()):
        model.files[FILE] = raw
        model.contract = model.contract.model_copy(update={"model_sha256": hashlib.sha256(raw).hexdigest()})
        model.files[CONTRACT_FILE] = model.contract.canonical_json().encode()
        with pytest.raises(ModelRefusedError) as refused:
            load(model, tmp_path)
        assert refused.value.step == "load"


def test_a_service_of_trees_alone_never_imports_torch(make_model, tmp_path, definitions) -> None:
    folder = make_model().into_cache(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import feature_definitions\n"
        "feature_definitions.__path__.append(sys.argv[2] + '/feature_definitions')\n"
        "from pathlib import Path; from serving_app.model_handle import VersionRef, load_model\n"
        "load_model(VersionRef('basket', 1, 'test'), Path(sys.argv[1]), 'cpu', 1); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(folder), str(definitions)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a CUDA device")
def test_asking_for_cuda_where_torch_has_none_is_refused(make_torch, tmp_path) -> None:
    with pytest.raises(ModelRefusedError, match="torch can use none"):
        load(make_torch(), tmp_path, "cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA device")
def test_on_cuda_the_examples_come_out_within_the_tolerance(make_torch, tmp_path) -> None:
    assert load(make_torch(), tmp_path, "cuda:0").device == "cuda:0"
