"""A version, by its reference, as a loaded handle: from memory, from the cache where its bytes are right, else from the registry.

Belongs here: where to get it, and falling from one place to the next. Does not belong here: which version is wanted, files' formats.
"""

import asyncio
from dataclasses import dataclass

import structlog

from mlplatform.verified import Identity, why_unverified
from serving_app.model_handle import ModelHandle, ModelRefusedError, VersionRef, load_model
from serving_app.model_source import ModelCache, download
from serving_app.registry import MlflowRegistry, RegistryError
from serving_app.router import ModelRouter, Slot

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """`signing_key`: what seals are checked with, see `mlplatform.verified`; `unverified`: versions without a right seal may answer."""

    device: str
    threads: int
    signing_key: str = ""
    unverified: bool = False


class ModelLoader:
    """Verifies, loads, warms up and compares on every way but that from memory, which holds only what went through it. The seal of the
    gates is checked on every way for what answers callers."""

    def __init__(self, registry: MlflowRegistry | None, cache: ModelCache, router: ModelRouter, options: LoadOptions) -> None:
        self._registry = registry
        self._cache = cache
        self._router = router
        self._options = options

    async def obtain(self, ref: VersionRef, beside: Slot | None = None, answers: bool = True) -> ModelHandle:
        """`beside`: versions in memory that are not in place yet. Raises ModelRefusedError for a version that must not serve,
        RegistryError or OSError where it cannot be had now.

        `answers`: callers shall see what it says, so it must have passed its gates; one in memory too, which may be the shadow.
        """
        handle = await self._obtain(ref, beside)
        return self._verified(handle, ref) if answers else handle

    async def from_cache(self, ref: VersionRef) -> ModelHandle:
        """A version that answers callers, as the cache holds it. Raises as `obtain`."""
        return self._verified(await self._cached(ref), ref)

    def _verified(self, handle: ModelHandle, ref: VersionRef) -> ModelHandle:
        if self._options.unverified or ref.sealed is None:
            return handle
        contract = handle.contract
        identity = Identity(ref.model, ref.version, handle.digest, contract.model_sha256)
        if why := why_unverified(self._options.signing_key, identity, ref.sealed):
            raise ModelRefusedError("verified", why)
        return handle

    async def _obtain(self, ref: VersionRef, beside: Slot | None) -> ModelHandle:
        held = self._router.warm(ref) or (None if beside is None else beside.holding(ref))
        if held is not None:
            return held
        spoilt = ""
        if self._cache.holds(ref):
            try:
                return await self._cached(ref)
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
        return await self._cached(ref)

    async def _cached(self, ref: VersionRef) -> ModelHandle:
        return await asyncio.to_thread(self._read, ref)

    def _read(self, ref: VersionRef) -> ModelHandle:
        self._cache.verify(ref)
        return load_model(ref, self._cache.folder(ref), self._options.device, self._options.threads)
