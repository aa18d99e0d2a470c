"""The one resource of all assets: the platform's clients, made from the settings when a run first asks for them.

Belongs here: from settings to clients. Does not belong here: what is done with them.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import dagster as dg

from mlplatform.clients.alerts import Alerts
from mlplatform.clients.lake import Lake
from mlplatform.clients.ledger import Ledger
from mlplatform.clients.stream import StreamClient
from mlplatform.clock import Clock, clock_from
from mlplatform.settings import Settings, load_settings
from mlplatform.training.engines import Engine

if TYPE_CHECKING:
    from dagster_aws.s3 import S3Resource
    from feast import FeatureStore
    from redis import Redis

    from mlplatform.clients.registry import Registry
    from mlplatform.feature_store.commands import Client
    from mlplatform.training.dataset import Dataset


class Clients:
    """Clients by need: a run that touches no model never imports MLflow."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Model name → (table id and version, its dataset): the training set opened last.
        self.opened: dict[str, tuple[tuple[str, int], Dataset]] = {}

    @cached_property
    def clock(self) -> Clock:
        return clock_from(self.settings.clock)

    @cached_property
    def lake(self) -> Lake:
        return Lake(self.settings.lake_root, self.settings.storage_options())

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.lake)

    @cached_property
    def alerts(self) -> Alerts:
        return Alerts(self.settings)

    @cached_property
    def registry(self) -> "Registry":
        from mlplatform.clients.registry import Registry

        return Registry(self.settings.mlflow_uri)

    @property
    def engine(self) -> Engine:
        return Engine(self.settings.engine, self.settings.ray_address)

    def device_for(self, framework: str) -> str:
        """Where to train: the setting, with `auto` meaning CUDA where there is a device and the installed framework can use it."""
        if self.settings.device != "auto":
            return self.settings.device
        from mlplatform.training.trainers.base import cuda_devices

        if not cuda_devices():
            return "cpu"
        if framework == "torch":
            import torch

            return "cuda" if torch.cuda.is_available() else "cpu"
        from xgboost import build_info

        return "cuda" if build_info()["USE_CUDA"] else "cpu"

    @cached_property
    def s3(self) -> "S3Resource":
        """dagster-aws's S3 resource, with the lake's own settings; for whole files, tables go through deltalake."""
        from dagster_aws.s3 import S3Resource

        s = self.settings
        return S3Resource(
            endpoint_url=s.s3_endpoint_url or None,
            region_name=s.s3_region,
            aws_access_key_id=s.s3_access_key_id.get_secret_value() or None,
            aws_secret_access_key=s.s3_secret_access_key.get_secret_value() or None,
        )

    @cached_property
    def redis(self) -> "Redis":
        from redis import Redis

        return Redis.from_url(self.settings.redis_url.get_secret_value())

    @cached_property
    def online(self) -> "Client":
        """The online store: a Redis of its own, maybe a cluster, or the platform's."""
        from mlplatform.feature_store.commands import open_client

        return open_client(self.settings.online_redis_url, self.settings.online_cluster)

    @cached_property
    def platform_streams(self) -> StreamClient:
        """Streams of the platform itself: the prediction log."""
        return StreamClient(self.settings.redis_url.get_secret_value())

    def source_streams(self, connection: str) -> StreamClient:
        return StreamClient(self.settings.connection(connection))

    @cached_property
    def feature_store(self) -> "FeatureStore":
        from mlplatform.clients.features import open_store

        return open_store(self.settings)


class PlatformResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Gives assets the clients of this process's settings (environment variables `MLPLATFORM_*`)."""

    @property
    def clients(self) -> Clients:
        return _clients(load_settings())


_CACHE: dict[int, Clients] = {}


def _clients(settings: Settings) -> Clients:
    # One set of clients for each settings object: connections and Feast's registry are worth keeping between assets.
    if id(settings) not in _CACHE:
        _CACHE.clear()
        _CACHE[id(settings)] = Clients(settings)
    return _CACHE[id(settings)]
