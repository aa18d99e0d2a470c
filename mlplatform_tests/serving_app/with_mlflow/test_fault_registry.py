"""The registry killed, and the disk full: what is loaded goes on, and what comes next is told and tried again."""

import json
import resource
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from mlplatform.local.supervisor import free_port

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}


def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def predicted(url: str, model: str) -> int:
    answer = httpx.post(f"{url}/v1/models/{model}/predict", json={"inputs": [ROW]}, timeout=20)
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["version"]
    return version


def test_mlflow_killed_and_started_again_costs_no_answer_and_its_next_version_arrives(
    make_mlflow, make_model, open_service, tmp_path
) -> None:
    root, port = tmp_path / "registry", free_port()
    root.mkdir()
    mlflow = make_mlflow(root, port)
    mlflow.alias("kept", mlflow.register("kept", make_model(model="kept").files))
    client = open_service(mlflow_url=mlflow.url, serving_models="kept", serving_poll_s=0.2, serving_registry_timeout_s=1)
    url = str(client.base_url)
    assert predicted(url, "kept") == 1
    mlflow.stop()
    eventually(lambda: "mlplatform_registry_errors_total 0.0" not in client.get("/metrics").text)
    assert predicted(url, "kept") == 1
    assert client.get("/health/ready").status_code == 200
    cold = open_service(mlflow_url=mlflow.url, serving_models="kept")  # started while it is gone: from the verified cache
    assert predicted(str(cold.base_url), "kept") == 1

    again = make_mlflow(root, port)
    again.alias("kept", again.register("kept", make_model(seed=5, model="kept").files))
    eventually(lambda: predicted(url, "kept") == 2)
    # Both went on looking all the while; the one that started without it looks every five seconds.
    eventually(lambda: predicted(str(cold.base_url), "kept") == 2)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can shorten the files another process may write")
def test_a_disk_that_is_full_keeps_the_new_version_out_and_the_old_one_serving_until_there_is_room(
    mlflow, make_model, run_service, tmp_path
) -> None:
    """Writes past the limit fail, with EFBIG where a full disk has ENOSPC: for the service the same OSError."""
    files = make_model(model="full").files
    mlflow.alias("full", mlflow.register("full", files))
    process = run_service(MLPLATFORM_MLFLOW_URL=mlflow.url, MLPLATFORM_SERVING_MODELS="full", MLPLATFORM_SERVING_POLL_S="0.2")
    process.wait_ready()
    assert predicted(process.url, "full") == 1
    _, hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (min(map(len, files.values())) - 1, hard))
    mlflow.alias("full", mlflow.register("full", make_model(seed=5, model="full").files))
    eventually(lambda: "model_cache_unusable" in process.log.read_text())
    assert predicted(process.url, "full") == 1
    assert httpx.get(f"{process.url}/health/ready").status_code == 200
    folder = tmp_path / "serving" / "models" / "full"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]  # nothing half written is left

    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))
    eventually(lambda: predicted(process.url, "full") == 2)
    assert (folder / "2" / "model.ubj").is_file()
    told = [json.loads(line) for line in process.log.read_text().splitlines() if "model_cache_unusable" in line]
    assert {(line["model"], line["version"]) for line in told} == {("full", 2)}
