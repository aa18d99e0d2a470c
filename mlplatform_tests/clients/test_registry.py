"""The registry against a real MLflow store, and against a real MLflow server over HTTP."""

import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import mlflow
import mlflow.xgboost
import numpy as np
import pytest
import xgboost as xgb

from mlplatform.clients.model_files import CorruptModelError, NoServerError, RegistryError, require_server
from mlplatform.clients.registry import NewVersion, Registry, RegistryUnreachableError, UnknownModelError
from mlplatform.contracts import CONTRACT_FILE, ContractFeature, ServingContract
from mlplatform.records import TrainingManifest

COLUMNS = ("x0", "x1", "x2")
VALUES = np.random.default_rng(0).normal(size=(300, 3))


def model_bytes(seed: int) -> bytes:
    label = (VALUES[:, 0] > 0).astype(float)
    data = xgb.QuantileDMatrix(VALUES, label=label, feature_names=list(COLUMNS))
    return bytes(xgb.train({"objective": "binary:logistic", "seed": seed, "subsample": 0.5, "nthread": 1}, data, 5).save_raw("ubj"))


def new_version(folder: Path, model: str, seed: int = 1) -> NewVersion:
    folder.mkdir(parents=True, exist_ok=True)
    content = model_bytes(seed)
    (folder / "model.ubj").write_bytes(content)
    contract = ServingContract(
        model=model,
        task="binary",
        description="Is x0 positive?",
        framework="xgboost",
        model_file="model.ubj",
        model_sha256=hashlib.sha256(content).hexdigest(),
        project="test",
        fields=(),
        views=(),
        functions=(),
        features=tuple(ContractFeature(name=c, kind="request", source=c, column=c) for c in COLUMNS),
        training_set_hash="abc",
    )
    manifest = TrainingManifest(
        model=model,
        feature_service="s",
        rows=300,
        labelled_in=300,
        columns=COLUMNS,
        content_hash="abc",
        delta_versions={"offline/x": ("id", 4)},
        definition_hash="def",
        split={},
        rows_by_part={},
        base_rate=0.5,
        null_shares={},
    )
    return NewVersion(
        contract,
        manifest,
        folder,
        params={"max_depth": 6},
        metrics={"validate_log_loss": 0.25},
        curves={"train_log_loss": tuple(1 / (i + 1) for i in range(1500))},
        plots={"curve": b"\x89PNG\r\n\x1a\n"},
        tags={"code_version": "c0ffee", "dagster.run_id": "run-1"},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'deep' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                Registry(url).check()
                break
            except RegistryUnreachableError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
        yield url
    finally:
        # Its workers outlive a SIGTERM for ten seconds and more; nothing here is worth a graceful end.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.fixture(params=["store", "server"])
def registry(request) -> Registry:
    return Registry(request.getfixturevalue(request.param))


def test_a_version_comes_back_byte_for_byte_with_its_contract_and_manifest(registry, tmp_path):
    new = new_version(tmp_path / "new", "round_trip")
    logged = registry.log_version(new)
    assert (logged.model, logged.version, logged.aliases) == ("round_trip", 1, ())
    folder = registry.download(logged, tmp_path / "got")
    assert (folder / "model.ubj").read_bytes() == (new.files / "model.ubj").read_bytes()
    assert registry.contract_of(logged) == new.contract
    assert ServingContract.model_validate_json((folder / CONTRACT_FILE).read_bytes()) == new.contract
    assert registry.manifest_of(logged)["delta_versions"] == {"offline/x": ["id", 4]}
    assert not [p for p in folder.rglob("*") if p.suffix in {".pkl", ".pickle"}]
    loaded = xgb.Booster(model_file=folder / "model.ubj")
    original = xgb.Booster(model_file=new.files / "model.ubj")
    assert np.array_equal(
        loaded.inplace_predict(VALUES, validate_features=False), original.inplace_predict(VALUES, validate_features=False)
    )


def test_params_metrics_curves_plots_and_tags_are_told(registry, tmp_path):
    logged = registry.log_version(new_version(tmp_path, "told"))
    assert registry.params_of(logged) == {"max_depth": "6"}
    metrics = registry.metrics_of(logged)
    assert metrics["validate_log_loss"] == 0.25
    assert metrics["train_log_loss"] == pytest.approx(1 / 1500)
    assert logged.tags["training_set_hash"] == "abc"
    assert logged.tags["dagster.run_id"] == "run-1"
    assert json.loads(logged.tags["delta_versions"]) == {"offline/x": ["id", 4]}
    registry.log_metrics(logged, {"auc": 0.75}, {"reliability": b"\x89PNG\r\n\x1a\n"})
    registry.set_tags(logged, {"mlplatform.gates": "passed"})
    assert registry.metrics_of(logged)["auc"] == 0.75
    assert registry.version("told", 1).tags["mlplatform.gates"] == "passed"


def test_an_alias_names_one_version_and_moves(registry, tmp_path):
    first = registry.log_version(new_version(tmp_path / "1", "aliased", seed=1))
    second = registry.log_version(new_version(tmp_path / "2", "aliased", seed=2))
    assert registry.by_alias("aliased", "production") is None
    registry.set_alias("aliased", "production", first.version)
    registry.set_alias("aliased", "production", second.version)
    registry.set_alias("aliased", "previous", first.version)
    found = registry.by_alias("aliased", "production")
    assert found is not None
    assert (found.version, found.aliases) == (2, ("production",))
    assert [(v.version, v.aliases) for v in registry.versions("aliased")] == [(2, ("production",)), (1, ("previous",))]
    registry.delete_alias("aliased", "production")
    registry.delete_alias("aliased", "production")
    assert registry.by_alias("aliased", "production") is None
    assert "aliased" in registry.models()


def test_what_is_unknown_is_none_or_an_error_that_names_it(registry):
    assert registry.by_alias("nobody", "production") is None
    with pytest.raises(UnknownModelError, match="no model 'nobody'"):
        registry.versions("nobody")
    with pytest.raises(UnknownModelError, match="no version 9 of model 'nobody'"):
        registry.version("nobody", 9)
    with pytest.raises(UnknownModelError, match="no version 9 of model 'nobody'"):
        registry.set_alias("nobody", "production", 9)


def test_a_run_the_caller_opened_is_used_and_left_open(registry, tmp_path):
    experiment = registry.ensure_experiment("own_run")
    client = mlflow.MlflowClient(registry.tracking_uri, registry.tracking_uri)
    run = client.create_run(experiment)
    logged = registry.log_version(new_version(tmp_path, "own_run"), run_id=run.info.run_id)
    assert logged.run_id == run.info.run_id
    assert client.get_run(run.info.run_id).info.status == "RUNNING"


def test_a_model_file_that_is_not_the_contracts_is_never_registered(registry, tmp_path):
    new = new_version(tmp_path, "swapped")
    (tmp_path / "model.ubj").write_bytes(model_bytes(seed=9))
    with pytest.raises(CorruptModelError, match="its contract says"):
        registry.log_version(new)
    with pytest.raises(UnknownModelError):
        registry.versions("swapped")


def test_a_stored_file_that_was_changed_is_refused(store, tmp_path):
    registry = Registry(store)
    logged = registry.log_version(new_version(tmp_path / "new", "tampered"))
    (stored,) = Path(store.removeprefix("sqlite:///")).parent.glob("artifacts/tampered/models/*/artifacts/model.ubj")
    stored.write_bytes(model_bytes(seed=9))
    with pytest.raises(CorruptModelError):
        registry.download(logged, tmp_path / "got")
    assert not (tmp_path / "got" / "model.ubj").exists()


def test_mlflow_itself_loads_what_was_logged(server, tmp_path):
    new = new_version(tmp_path, "foreign")
    registry = Registry(server)
    registry.set_alias("foreign", "production", registry.log_version(new).version)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    try:
        booster = mlflow.xgboost.load_model("models:/foreign@production")
    finally:
        mlflow.set_tracking_uri(before)
    assert bytes(booster.save_raw("ubj")) == (new.files / "model.ubj").read_bytes()


def test_the_service_can_read_a_version_with_two_plain_http_calls(server, tmp_path):
    registry = Registry(server)
    new = new_version(tmp_path, "plain")
    registry.set_alias("plain", "production", registry.log_version(new).version)
    alias = json.loads(_get(server, "/api/2.0/mlflow/registered-models/alias", name="plain", alias="production"))
    version = alias["model_version"]["version"]
    contract = ServingContract.model_validate_json(
        _get(server, "/model-versions/get-artifact", name="plain", version=version, path=CONTRACT_FILE)
    )
    content = _get(server, "/model-versions/get-artifact", name="plain", version=version, path=contract.model_file)
    assert hashlib.sha256(content).hexdigest() == contract.model_sha256
    for names, status in (({"name": "plain", "alias": "none"}, 400), ({"name": "nobody", "alias": "production"}, 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _get(server, "/api/2.0/mlflow/registered-models/alias", **names)
        assert refused.value.code == status
        refused.value.close()


def test_pages_of_the_ui_are_known_where_there_is_a_server(server, store, tmp_path):
    logged = Registry(server).log_version(new_version(tmp_path, "paged"))
    assert Registry(server).model_ui_url(logged) == f"{server}/#/models/paged/versions/1"
    assert f"/runs/{logged.run_id}" in (Registry(server).run_ui_url(logged) or "")
    assert Registry(store).model_ui_url(replace(logged)) is None


def test_a_dead_server_is_named_within_seconds():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(RegistryUnreachableError, match=f"127.0.0.1:{port} does not answer"):
        Registry(f"http://127.0.0.1:{port}").by_alias("m", "production")
    assert time.monotonic() - began < 5


def test_a_server_that_never_answers_is_named_after_the_time_limit():
    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(1.5)

        def log_message(self, *told):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as silent:
        threading.Thread(target=silent.serve_forever, daemon=True).start()
        with pytest.raises(RegistryUnreachableError, match="timed out"):
            Registry(f"http://127.0.0.1:{silent.server_port}", timeout_s=0.3).versions("m")
        silent.shutdown()


def _get(server: str, route: str, /, **query: str) -> bytes:
    with urllib.request.urlopen(f"{server}{route}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return answer.read()


def test_a_network_is_logged_as_data_with_its_export_beside_it_and_no_flavour_that_unpickles(store, tmp_path):
    from mlplatform import networks

    files = tmp_path / "files"
    files.mkdir()
    architecture = networks.Architecture(3, (), (0.1, 0.5, 0.9), width=8, depth=1, dropout=0.0)
    content = networks.to_bytes(networks.TabularNetwork(architecture))
    (files / "model.safetensors").write_bytes(content)
    (files / "model.pt2").write_bytes(b"exported")
    new = new_version(tmp_path / "other", "network")
    changes = {"framework": "torch", "task": "quantiles", "quantiles": architecture.quantiles, "model_file": "model.safetensors"}
    contract = new.contract.model_copy(update=changes | {"model_sha256": hashlib.sha256(content).hexdigest()})
    registry = Registry(store)
    version = registry.log_version(replace(new, contract=contract, files=files))
    downloaded = registry.download(version, tmp_path / "downloaded")
    assert networks.from_bytes((downloaded / "model.safetensors").read_bytes()).architecture == architecture
    assert registry.contract_of(version) == contract
    (files / "weights.pth").write_bytes(b"\x80\x04")
    with pytest.raises(RegistryError, match="without pickle"):
        registry.log_version(replace(new, contract=contract, files=files))


def test_a_contract_from_before_quantiles_keeps_its_digest(tmp_path):
    contract = new_version(tmp_path, "old").contract
    told = json.loads(contract.canonical_json())
    assert {"quantiles", "tolerance"}.isdisjoint(told)
    assert ServingContract.model_validate(told).digest() == contract.digest()
    assert contract.model_copy(update={"tolerance": 1e-5}).digest() != contract.digest()


def test_files_behind_a_server_that_does_not_run_are_told_so_and_others_are_not_stopped():
    with pytest.raises(NoServerError, match="behind the MLflow server"):
        require_server("mlflow-artifacts:/1/models/m/artifacts", server=False)
    require_server("mlflow-artifacts:/1/models/m/artifacts", server=True)
    require_server("file:///srv/mlflow/artifacts", server=False)
