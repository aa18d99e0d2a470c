"""The world is built once for the folder's tests; every test has a Valkey of its own where it asks for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from mlplatform.local.deliveries import DeliveryModel, all_deliveries
from mlplatform.local.nycflights import World, load_world
from mlplatform.local.services import valkey
from mlplatform.local.supervisor import Supervisor


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return load_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def deliveries(world: World):
    return all_deliveries(world, DeliveryModel())


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with Supervisor(tmp_path / "valkey-home") as supervisor:
        yield supervisor.start(valkey(supervisor.home)).url


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        yield connection
