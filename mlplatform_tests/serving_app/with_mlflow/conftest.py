"""What tests against a registry share: a real MLflow server."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mlplatform.contracts import CONTRACT_FILE, EVALUATION_TAG, GATES_TAG, VERIFIED_TAG, ServingContract
from mlplatform.verified import Identity, seal


class Mlflow:
    """A real `mlflow server`, spoken to by REST only."""

    def __init__(self, root: Any, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = (root / "mlflow.log").open("wb")
        store = [f"--backend-store-uri=sqlite:///{root}/mlflow.db", f"--artifacts-destination={root}/artifacts", "--serve-artifacts"]
        webhooks = {
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "0",  # a webhook counts at once, not after a minute
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(bytes(32)).decode(),
        }
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1", *store]
        self._popen = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | webhooks
        )
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError("MLflow did not start")

    def post(self, path: str, **body: Any) -> Any:
        answer = self.http.post(f"/api/2.0/mlflow/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def register(self, model: str, files: dict[str, bytes], sealed: bool = True, key: str = "") -> int:
        """A version of these files; `sealed` as one that passed its gates is."""
        run = self.post("runs/create", experiment_id="0")["run"]["info"]
        folder = run["artifact_uri"].removeprefix("mlflow-artifacts:/").lstrip("/") + "/model"
        for name, raw in files.items():
            assert self.http.put(f"/api/2.0/mlflow-artifacts/artifacts/{folder}/{name}", content=raw).status_code == 200
        if self.http.get("/api/2.0/mlflow/registered-models/get", params={"name": model}).status_code == 404:
            self.post("registered-models/create", name=model)
        version = self.post("model-versions/create", name=model, source=f"mlflow-artifacts:/{folder}", run_id=run["run_id"])
        number = int(version["model_version"]["version"])
        if sealed and CONTRACT_FILE in files:
            contract = ServingContract.model_validate_json(files[CONTRACT_FILE])
            identity = Identity(model, number, contract.digest(), contract.model_sha256)
            told = {GATES_TAG: "passed", EVALUATION_TAG: "{}", VERIFIED_TAG: seal(key, identity, "{}")}
            told |= {"contract_digest": identity.contract_digest, "model_sha256": identity.model_sha256}
            for name, value in told.items():
                self.tag_version(model, number, name, value)
        return number

    def tag_version(self, model: str, version: int, key: str, value: str) -> None:
        self.post("model-versions/set-tag", name=model, version=str(version), key=key, value=value)

    def alias(self, model: str, version: int, alias: str = "production") -> None:
        self.post("registered-models/alias", name=model, alias=alias, version=str(version))

    def tag(self, model: str, key: str, value: str) -> None:
        self.post("registered-models/set-tag", name=model, key=key, value=value)

    def unalias(self, model: str, alias: str) -> None:
        answer = self.http.request("DELETE", "/api/2.0/mlflow/registered-models/alias", json={"name": model, "alias": alias})
        assert answer.status_code == 200, answer.text

    def pause(self) -> None:
        os.killpg(self._popen.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._popen.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Once; a second call does nothing."""
        if self._popen.returncode is not None:
            return
        self.http.close()
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(10)
        self._log.close()


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Mlflow(tmp_path_factory.mktemp("mlflow"), port)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def make_mlflow() -> Iterator[Callable[[Any, int], Mlflow]]:
    """`make_mlflow(folder, port)`: a server of the test's own, with what the folder holds; killed at the end, or by the test."""
    servers: list[Mlflow] = []

    def make(root: Any, port: int) -> Mlflow:
        servers.append(Mlflow(root, port))
        servers[-1].wait()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()
