"""A version, by its reference, as a loaded handle: from memory, from the cache where its bytes are right, else from the registry.

Belongs here: where to get it, and falling from one place to the next. Does not belong here: which version is wanted, files' formats.
"""

import asyncio
from dataclasses import dataclass

import structlog

from serving_app.model_handle import ModelHandle, ModelRefusedError, VersionRef, load_model
from serving_app.model_source import ModelCache, download
from serving_app.registry import MlflowRegistry, RegistryError
from serving_app.router import ModelRouter, Slot

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    device: str
    threads: int


class ModelLoader:
    """Verifies, loads, warms up and compares on every way but that from memory, which holds only what went through it."""

    def __init__(self, registry: MlflowRegistry | None, cache: ModelCache, router: ModelRouter, options: LoadOptions) -> None:
        self._registry = registry
        self._cache = cache
        self._router = router
        self._options = options

    async def obtain(self, ref: VersionRef, beside: Slot | None = None) -> ModelHandle:
        """`beside`: versions in memory that are not in place yet. Raises ModelRefusedError for a version that must not serve,
        RegistryError or OSError where it cannot be had now."""
        held = self._router.warm(ref) or (None if beside is None else beside.holding(ref))
        if held is not None:
            return held
        spoilt = ""
        if self._cache.holds(ref):
            try:
                return await self.from_cache(ref)
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
        return await self.from_cache(ref)

    async def from_cache(self, ref: VersionRef) -> ModelHandle:
        return await asyncio.to_thread(self._read, ref)

    def _read(self, ref: VersionRef) -> ModelHandle:
        self._cache.verify(ref)
        return load_model(ref, self._cache.folder(ref), self._options.device, self._options.threads)
