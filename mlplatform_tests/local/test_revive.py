"""`up` on a platform of which a service has ended starts that one again, at its address, and leaves the others alone."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import redis

from mlplatform.local import services
from mlplatform.local.profile import ENVIRONMENT
from mlplatform.local.revive import launch_of
from mlplatform.local.service_state import Service, read_state, recorded_services, stop_recorded
from mlplatform.local.supervisor import Supervisor
from mlplatform.local.up import run_up


@pytest.fixture
def home(tmp_path: Path):
    with Supervisor(tmp_path) as supervisor:
        valkey = supervisor.start(services.valkey(tmp_path))
        supervisor.start(services.reports(tmp_path))
        supervisor.detach()
    (tmp_path / ENVIRONMENT).write_text(json.dumps({"MLPLATFORM_REDIS_URL": valkey.url}))
    yield tmp_path
    stop_recorded(tmp_path)


def end(service: Service) -> None:
    os.killpg(service.pgid, signal.SIGKILL)
    while service.running:
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["valkey", "reports"])
def test_the_one_that_ended_is_back_at_its_address_and_the_other_never_stopped(home: Path, name: str) -> None:
    before = {service.name: service for service in recorded_services(home)}
    end(before[name])
    assert run_up(home) == 0
    after = {service.name: service for service in recorded_services(home)}
    assert (after[name].url, after[name].wave) == (before[name].url, before[name].wave)
    assert after[name].pid != before[name].pid
    assert {n: s for n, s in after.items() if n != name} == {n: s for n, s in before.items() if n != name}
    with redis.Redis.from_url(after["valkey"].url) as client:
        assert client.ping()
    assert read_state(home).supervisor is None


def test_every_service_the_profile_starts_is_known(tmp_path: Path) -> None:
    names = ("valkey", "sources", "mlflow", "reports", "serving", "stream", "dagster-webserver", "dagster-daemon")
    environment = {"MLPLATFORM_REDIS_URL": "redis://127.0.0.1:1/0"}
    made = {name: launch_of(Service(name, 1, 1, 4321, "", ""), tmp_path, environment) for name in names}
    assert {name: launch.name for name, launch in made.items()} == {name: name for name in names}
    assert [name for name, launch in made.items() if launch.port != 4321] == ["dagster-daemon"]
    assert [name for name, launch in made.items() if launch.restart] == ["serving", "stream"]
    with pytest.raises(ValueError, match="mlplatform down"):
        launch_of(Service("ray", 1, 1, 4321, "", ""), tmp_path, environment)
