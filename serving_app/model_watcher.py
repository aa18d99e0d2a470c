"""Keeps the loaded models where the registry's alias points: load, warm, verify, then swap.

Belongs here: when to look, what to do about what was seen, and falling back on the cache. Does not belong here: HTTP, files, XGBoost.
A version that fails any step is refused and the old one goes on; a registry that is away changes nothing.
"""

import asyncio
import time
from dataclasses import dataclass, field

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from mlplatform.contracts import MODELS_CHANNEL, PRODUCTION
from serving_app.metrics import Metrics
from serving_app.model_handle import ModelHandle, ModelRefusedError, VersionRef, load_model
from serving_app.model_source import ModelCache, download, servable_name
from serving_app.registry import MlflowRegistry, RegistryError
from serving_app.router import ModelRouter

_RETRY_REFUSED_S = 60.0  # a refused version is looked at again this often, or when a notification comes
_RECONNECT_S = 1.0

log = structlog.get_logger(__name__)


@dataclass
class Refusal:
    """Why a version does not serve."""

    ref: VersionRef
    step: str
    reason: str
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class LoadOptions:
    device: str
    threads: int


class ModelWatcher:
    """One per application. `refresh` may be called at any time; calls for one application run one after another."""

    def __init__(
        self,
        wanted: tuple[str, ...],
        registry: MlflowRegistry | None,
        cache: ModelCache,
        router: ModelRouter,
        metrics: Metrics,
        options: LoadOptions,
    ) -> None:
        self._wanted = wanted
        self._registry = registry
        self._cache = cache
        self._router = router
        self._metrics = metrics
        self._options = options
        self._lock = asyncio.Lock()
        self._registry_away = False
        self._unaliased: set[str] = set()
        self.refusals: dict[str, Refusal] = {}  # by model: the version its alias names, where that was refused
        self.troubles: dict[str, str] = {}  # by model: why it could not be loaded at the last look, other than a refusal

    def missing(self) -> list[str]:
        """Wanted models that are not loaded."""
        return [name for name in self._wanted if self._router.choose(name) is None]

    async def refresh(self, notified: bool = False) -> None:
        """Looks at every model's alias once and acts on it. Never raises: one model's trouble must not end the watch over all."""
        async with self._lock:
            for model in await self._names():
                if not servable_name(model):
                    continue
                try:
                    await self._refresh_model(model, notified)
                except Exception:  # logged with its trace; the next look tries again
                    log.exception("model_refresh_failed", model=model)

    async def poll_forever(self, every_s: float) -> None:
        """The safety net below the notifications."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def listen_forever(self, redis: "Redis") -> None:
        """Refreshes when a model's name is published on the models' channel."""
        while True:
            try:
                async with redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(MODELS_CHANNEL)
                    await self.refresh()  # what was published while nobody listened
                    async for message in channel.listen():
                        log.info("model_notification", model=str(message.get("data")))
                        await self.refresh(notified=True)
            except (RedisError, OSError) as error:
                log.debug("notifications_away", error=repr(error))
            await asyncio.sleep(_RECONNECT_S)

    async def _names(self) -> list[str]:
        if self._wanted:
            return list(self._wanted)
        names = set(self._router.names())
        if self._registry is not None:
            try:
                return sorted(names | set(await self._registry.models_with(PRODUCTION)))
            except RegistryError as error:
                self._note_registry(error)
        return sorted(names | set(self._cache.models()))

    async def _refresh_model(self, model: str, notified: bool) -> None:
        slot = self._router.slot(model)
        ref = self._cache.remembered(model) if self._registry is None else await self._resolve(model, self._registry)
        if ref is None or (slot is not None and slot.current.ref == ref):
            if ref is not None:
                self.refusals.pop(model, None)
            return
        refusal = self.refusals.get(model)
        if refusal is not None and refusal.ref == ref and not notified and time.monotonic() - refusal.at < _RETRY_REFUSED_S:
            return
        try:
            handle = self._router.warm(ref) or await self._load(ref)
        except ModelRefusedError as error:
            self._refuse(ref, error)
            await self._fall_back(ref)
        except RegistryError as error:
            self._note_registry(error)
            self.troubles[model] = str(error)
            await self._fall_back(ref)
        except OSError as error:
            log.error("model_cache_unusable", model=model, version=ref.version, error=str(error))
            self.troubles[model] = f"the model cache cannot be used: {error}"
            await self._fall_back(ref)
        else:
            self._take(handle)

    async def _resolve(self, model: str, registry: MlflowRegistry) -> VersionRef | None:
        """Where the alias points; with the registry away, what it said last, unless something is loaded already."""
        try:
            ref = await registry.resolve(model, PRODUCTION)
        except RegistryError as error:
            self._note_registry(error)
            return self._cache.remembered(model) if self._router.choose(model) is None else None
        if self._registry_away:
            log.info("registry_back")
        self._registry_away = False
        if ref is None and model not in self._unaliased:
            # Taking a model out of service by a vanished alias would turn a registry's mishap into an outage.
            log.warning("model_has_no_alias", model=model, alias=PRODUCTION, still_serving=self._router.choose(model) is not None)
            self._unaliased.add(model)
        if ref is not None:
            self._unaliased.discard(model)
        return ref

    async def _load(self, ref: VersionRef) -> ModelHandle:
        """From the cache where its bytes are right, else from the registry."""
        spoilt = ""
        if self._cache.holds(ref):
            try:
                return await asyncio.to_thread(self._load_cached, ref)
            except (ModelRefusedError, OSError) as error:
                if self._registry is None:
                    raise
                spoilt = f"; the cached copy cannot be used ({error})"
                log.warning("cached_version_unusable", model=ref.model, version=ref.version, reason=str(error))
        if self._registry is None:
            raise ModelRefusedError("cache", "the cache does not hold this version, and no registry is set")
        try:
            files = await download(self._registry, ref)
        except RegistryError as error:
            raise RegistryError(f"{error}{spoilt}") from error
        await asyncio.to_thread(self._cache.store, ref, files)
        return await asyncio.to_thread(self._load_cached, ref)

    def _load_cached(self, ref: VersionRef) -> ModelHandle:
        return load_model(ref, self._cache.folder(ref), self._options.device, self._options.threads)

    async def _fall_back(self, failed: VersionRef) -> None:
        """At start only: rather the version that served last than none."""
        ref = self._cache.remembered(failed.model)
        if self._router.choose(failed.model) is not None or ref is None or ref == failed or not self._cache.holds(ref):
            return
        try:
            handle = await asyncio.to_thread(self._load_cached, ref)
        except (ModelRefusedError, OSError) as error:
            log.error("cached_version_unusable", model=ref.model, version=ref.version, reason=str(error))
            return
        log.warning("serving_cached_version", model=ref.model, version=ref.version)
        self._show(self._router.swap(handle).current)

    def _take(self, handle: ModelHandle) -> None:
        before = self._router.slot(handle.name)
        self._router.swap(handle)
        self.refusals.pop(handle.name, None)
        self.troubles.pop(handle.name, None)
        try:
            self._cache.remember(handle.ref)
        except OSError as error:
            log.error("model_cache_unusable", model=handle.name, version=handle.version, error=str(error))
        if before is not None:
            self._metrics.swaps.labels(handle.name).inc()
        log.info(
            "model_serving",
            model=handle.name,
            version=handle.version,
            before=before.current.version if before else None,
            device=handle.device,
        )
        self._show(handle)

    def _show(self, handle: ModelHandle) -> None:
        """Renews the info metric: one series per loaded version."""
        self._metrics.model_info.clear()
        for slot in self._router:
            for role, held in (("current", slot.current), ("previous", slot.previous)):
                if held is not None:
                    c = held.contract
                    self._metrics.model_info.labels(held.name, str(held.version), role, held.digest, c.training_set_hash, held.device).set(
                        1
                    )

    def _refuse(self, ref: VersionRef, error: ModelRefusedError) -> None:
        known = self.refusals.get(ref.model)
        self.refusals[ref.model] = Refusal(ref, error.step, error.reason)
        if known is None or known.ref != ref:
            self._metrics.refused.labels(ref.model, error.step).inc()
        serving = self._router.choose(ref.model)
        log.error(
            "model_refused",
            model=ref.model,
            version=ref.version,
            step=error.step,
            reason=error.reason,
            serving=serving.handle.version if serving else None,
        )

    def _note_registry(self, error: Exception) -> None:
        self._metrics.registry_errors.inc()
        if not self._registry_away:
            log.error("registry_away", error=str(error))
        self._registry_away = True
