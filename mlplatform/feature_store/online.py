"""Feast online store over Redis or Valkey: the class to name in `feature_store.yaml`.

    online_store:
      type: mlplatform.feature_store.online.RedisOnlineStore
      connection_string: redis://127.0.0.1:6379/0        # rediss:// for TLS
    cluster: false                                     # true: the address is a node of a Redis Cluster

Belongs here: Feast's interface, Feast's values to and from packed ones. Does not belong here: the layout (`codec.py`), the
write rule and its script (`writer.py`), whole generations (`generations.py`), reading (`reader.py`).

Features are numbers or booleans, join keys strings or integers; `feast apply` refuses a view with others. A read returns
nothing for an unknown entity, and only the event time, without values, for one older than the view's ttl.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
from feast import Entity, Field
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.value_type import ValueType

from mlplatform.clock import clock_from
from mlplatform.feature_store.codec import Decoded, JoinValue, encode_many, entity_part, feature_order
from mlplatform.feature_store.commands import AsyncClient, Client, is_cluster, open_async_client, open_client, run, run_async
from mlplatform.feature_store.reader import OnlineReader, Request, SyncOnlineReader, ViewLayout
from mlplatform.feature_store.reclaim import remove_views
from mlplatform.feature_store.writer import EXACT_INTEGERS, Packed, View, push

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

# The one field of Feast's value that holds each type we pack.
FIELDS = {
    ValueType.DOUBLE: "double_val",
    ValueType.FLOAT: "float_val",
    ValueType.INT64: "int64_val",
    ValueType.INT32: "int32_val",
    ValueType.BOOL: "bool_val",
}
KEY_TYPES = (ValueType.STRING, ValueType.INT64, ValueType.INT32)

Row = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
Answer = tuple[datetime | None, dict[str, Value] | None]


class RedisOnlineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]  # Feast is untyped here
    """Options of the Redis online store."""

    type: Literal["mlplatform.feature_store.online.RedisOnlineStore"] = "mlplatform.feature_store.online.RedisOnlineStore"
    # A redis:// or rediss:// URL, or Feast's own `host:port,option=value`.
    connection_string: str = "redis://127.0.0.1:6379/0"
    # A Redis Cluster: keys get hash tags, and no command spans two slots.
    cluster: bool = False
    # 'system', or the file of the local profile's simulated clock: what ages are measured by.
    clock: str = "system"


class RedisOnlineStore(OnlineStore):  # type: ignore[misc]  # Feast is untyped here
    """Packed values with order and age, read and written through Feast."""

    _client: Client | None = None
    _reader: SyncOnlineReader | None = None
    # An asyncio connection belongs to the loop it was made in.
    _async: tuple[asyncio.AbstractEventLoop, AsyncClient, OnlineReader] | None = None

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        return SupportedAsyncMethods(read=True, write=True)

    def online_write_batch(self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None) -> None:
        """Compare-and-set of each row in every live generation: see `writer.py` for what stays."""
        client = self.client(config)
        run(client, push(view_of(config.project, table), _pack(table, data), is_cluster(client)))
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        client, _ = self._async_side(config)
        await run_async(client, push(view_of(config.project, table), _pack(table, data), is_cluster(client)))
        if progress:
            progress(len(data))

    def online_read(
        self, config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], requested_features: list[str] | None = None
    ) -> list[Answer]:
        """Per entity (event time, values): (None, None) where unknown, (event time, None) where older than the view's ttl."""
        if self._reader is None:
            self._reader = SyncOnlineReader(self.client(config), config.project)
        requests = _requests(table, entity_keys)
        return _answers(table, requests, self._reader.read([r for r in requests if r is not None]), requested_features, self.now(config))

    async def online_read_async(
        self, config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], requested_features: list[str] | None = None
    ) -> list[Answer]:
        _, reader = self._async_side(config)
        requests = _requests(table, entity_keys)
        return _answers(table, requests, await reader.read([r for r in requests if r is not None]), requested_features, self.now(config))

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Refuses views this store cannot hold; removes the values of views that are gone."""
        for view in tables_to_keep:
            if isinstance(view, FeatureView):
                _check(view)
        for view in tables_to_delete:
            remove_views(self.client(config), config.project, view.name)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Removes every value of the project, nothing else in the database. (Feast leaves stream views out of `tables`.)"""
        remove_views(self.client(config), config.project)

    async def close(self) -> None:
        """Closes both clients; the next call opens them anew."""
        if self._async is not None:
            await self._async[1].aclose()
            self._async = None
        if self._client is not None:
            self._client.close()
            self._client = self._reader = None

    def client(self, config: RepoConfig) -> Client:
        """The plain client, made at the first call."""
        if self._client is None:
            options = _options(config)
            self._client = open_client(redis_url(options.connection_string), options.cluster)
        return self._client

    def now(self, config: RepoConfig) -> datetime:
        """What ages are measured by."""
        return clock_from(_options(config).clock).now()

    def _async_side(self, config: RepoConfig) -> tuple[AsyncClient, OnlineReader]:
        loop = asyncio.get_running_loop()
        if self._async is None or self._async[0] is not loop:
            options = _options(config)
            client = open_async_client(redis_url(options.connection_string), options.cluster)
            self._async = (loop, client, OnlineReader(client, config.project))
        return self._async[1:]


def view_of(project: str, view: FeatureView) -> View:
    """The view as its writers name it."""
    return View(project, view.name, feature_order([f.name for f in _fields(view)]))


def layout_of(view: FeatureView) -> ViewLayout:
    """The layout of a Feast view's values: all its features, whatever a projection asks for."""
    return ViewLayout.declare(view.name, [k for k in view.join_keys if k != DUMMY_ENTITY_ID], [f.name for f in _fields(view)], view.ttl)


def _fields(view: FeatureView) -> list[Field]:
    """The view's features in packed order. A StreamFeatureView from the registry counts its join keys among them: they are not."""
    return sorted((f for f in view.features if f.name not in view.join_keys), key=lambda f: f.name)


def redis_url(connection_string: str) -> str:
    """A URL as it is; Feast's own form `host:port,option=value,…` as a URL. `ssl=true` means TLS."""
    if "://" in connection_string:
        return connection_string
    address, *options = connection_string.split(",")
    settings = dict(option.split("=", 1) for option in options)
    scheme = "rediss" if settings.pop("ssl", "false").lower() == "true" else "redis"
    host = address if ":" in address else f"{address}:6379"
    return f"{scheme}://{host}?{urlencode(settings)}"


def _options(config: RepoConfig) -> RedisOnlineStoreConfig:
    options = config.online_store
    assert isinstance(options, RedisOnlineStoreConfig)
    return options


def _check(view: FeatureView) -> None:
    wrong = [f"feature {f.name} is {f.dtype}" for f in _fields(view) if f.dtype.to_value_type() not in FIELDS]
    wrong += [
        f"join key {f.name} is {f.dtype}"
        for f in view.entity_columns
        if f.name != DUMMY_ENTITY_ID and f.dtype.to_value_type() not in KEY_TYPES
    ]
    if wrong:
        raise ValueError(
            f"feature view {view.name} cannot be served: {'; '.join(wrong)}. Features are numbers or booleans, join keys strings or "
            "integers; a view that is only for training says online=False"
        )


def _join_values(entity: EntityKey) -> list[JoinValue | None]:
    """Values in the order of the sorted join-key names, None for one that is not given."""
    values: list[JoinValue | None] = []
    for name, value in sorted(zip(entity.join_keys, entity.entity_values, strict=True), key=lambda pair: pair[0]):
        if name == DUMMY_ENTITY_ID:
            continue
        kind = value.WhichOneof("val")
        values.append(None if kind is None else getattr(value, kind))
    return values


def _pack(view: FeatureView, data: Sequence[Row]) -> Packed:
    layout = layout_of(view)
    entities: list[bytes] = []
    values = np.full((len(data), len(layout.features)), np.nan)
    events, made = (np.zeros(len(data), np.int64) for _ in range(2))
    for row, (entity, features, event, created) in enumerate(data):
        join_values = [v for v in _join_values(entity) if v is not None]
        if len(join_values) != len(layout.join_keys):
            raise ValueError(f"view {view.name}: a row to be served lacks some of its join keys {layout.join_keys}: {entity}")
        entities.append(entity_part(view.name, join_values))
        values[row] = [_number(view.name, name, features.get(name)) for name in layout.features]
        events[row], made[row] = _micros(event), _micros(created or event)
    return Packed(entities, encode_many(layout.schema, events, made, values))


def _number(view: str, name: str, value: Value | None) -> float:
    kind = value.WhichOneof("val") if value is not None else None
    if value is None or kind is None:
        return float("nan")
    if kind not in FIELDS.values():
        raise TypeError(f"view {view}: feature {name} came as {kind}; the online store packs numbers and booleans")
    number = getattr(value, kind)
    if kind == "int64_val" and abs(number) > EXACT_INTEGERS:
        raise ValueError(f"view {view}: feature {name} has integers above 2**53, which float64 cannot hold exactly")
    return float(number)


def _micros(time: datetime) -> int:
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time
    return (aware - EPOCH) // MICROSECOND


def _requests(view: FeatureView, entities: Sequence[EntityKey]) -> list[Request | None]:
    """None for an entity with a key missing: nothing can be stored for it."""
    layout = layout_of(view)
    requests: list[Request | None] = []
    for entity in entities:
        values = _join_values(entity)
        known = [v for v in values if v is not None]
        requests.append((layout, known) if len(known) == len(values) else None)
    return requests


def _answers(
    view: FeatureView,
    requests: Sequence[Request | None],
    found: Sequence[Decoded | None],
    requested: list[str] | None,
    now: datetime,
) -> list[Answer]:
    layout, stored = layout_of(view), iter(found)
    now_us = _micros(now)
    wanted = [(f.name, i, FIELDS[f.dtype.to_value_type()]) for i, f in enumerate(_fields(view)) if not requested or f.name in requested]
    return [(None, None) if request is None else _answer(layout, next(stored), wanted, now_us) for request in requests]


def _answer(layout: ViewLayout, value: Decoded | None, wanted: Sequence[tuple[str, int, str]], now_us: int) -> Answer:
    if value is None:
        return None, None
    event = EPOCH + value.event_us * MICROSECOND
    if layout.state(value, now_us) != "fresh":
        return event, None
    return event, {name: _proto(field, float(value.values[i])) for name, i, field in wanted}


def _proto(field: str, number: float) -> Value:
    value = Value()  # null as it is
    if not math.isnan(number):
        kind = {"double_val": float, "float_val": float, "bool_val": bool}.get(field, int)
        setattr(value, field, kind(number))
    return value
