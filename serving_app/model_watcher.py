"""Keeps the loaded models where the registry's aliases point, sharing traffic as its rules say: load, warm, verify, then swap.

Belongs here: when to look, what to do about what was seen, and falling back on the cache. Does not belong here: HTTP, files, XGBoost.
A version that fails any step is refused and the old one goes on; so do the old rules where new ones are refused. A registry that is
away changes nothing.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from mlplatform.contracts import MODELS_CHANNEL, PRODUCTION, TrafficRules
from serving_app.lineup import Lineup, ask_registry
from serving_app.metrics import Metrics
from serving_app.model_handle import ModelHandle, ModelRefusedError, VersionRef
from serving_app.model_loader import ModelLoader
from serving_app.model_source import ModelCache, servable_name
from serving_app.registry import MlflowRegistry, RegistryError
from serving_app.router import ModelRouter, Slot

_RETRY_REFUSED_S = 60.0  # a refused version is looked at again this often, or when a notification comes
_RECONNECT_S = 1.0

log = structlog.get_logger(__name__)


@dataclass
class Refusal:
    """Why a version does not serve in the role it is wanted for: an alias, or an arm of an experiment."""

    ref: VersionRef
    step: str
    reason: str
    role: str = PRODUCTION
    at: float = field(default_factory=time.monotonic)


class ModelWatcher:
    """One per application. `refresh` may be called at any time; calls for one model run one after another."""

    def __init__(
        self,
        wanted: tuple[str, ...],
        registry: MlflowRegistry | None,
        cache: ModelCache,
        router: ModelRouter,
        metrics: Metrics,
        loader: ModelLoader,
    ) -> None:
        self._wanted = wanted
        self._registry = registry
        self._cache = cache
        self._router = router
        self._metrics = metrics
        self._loader = loader
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._nudged: set[str] = set()
        self._looks: set[asyncio.Task[None]] = set()
        self._remembered: dict[str, Lineup] = {}
        self.known = bool(wanted)  # whether registry or cache has said once which models there are
        self.registry_fault = ""  # why the registry did not answer when asked last; '' where it did
        self.registry_seen_s = 0.0  # when the registry answered last, seconds of the Unix epoch; 0.0: not yet
        self._unaliased: set[str] = set()
        self.refusals: dict[str, Refusal] = {}  # by model: the version `production` names, where that was refused
        self.side_refusals: dict[tuple[str, str], Refusal] = {}  # by model and role: other versions that were refused
        self.rule_faults: dict[str, str] = {}  # by model: why its newest traffic rules do not count
        self.troubles: dict[str, str] = {}  # by model: why it could not be loaded at the last look, other than a refusal

    def missing(self) -> list[str]:
        """Wanted models that are not loaded."""
        return [name for name in self._wanted if self._router.slot(name) is None]

    def expects(self, model: str) -> bool:
        """Whether a model that is not loaded may have to be: it is wanted, or was tried."""
        return model in self.missing() or model in self.refusals or model in self.troubles

    def unknown_because(self) -> str:
        """Why it is not known which models there are, while it isn't."""
        return self.registry_fault or "registry and cache are being read"

    async def refresh(self) -> None:
        """Looks at every model once and acts on it. Never raises."""
        names = await self._names()
        await asyncio.gather(*(self.refresh_model(model) for model in names))
        # An empty cache beside a registry that is away says nothing of what there is.
        self.known = self.known or bool(names) or not self.registry_fault

    async def refresh_model(self, model: str, notified: bool = False) -> None:
        """Looks at one model. Never raises: one model's trouble must not end the watch over all, nor hold up the others."""
        if not servable_name(model) or (self._wanted and model not in self._wanted):
            self._nudged.discard(model)
            return
        # The registry is read under the lock: what an earlier look saw never overwrites what a later one saw.
        async with self._locks[model]:
            self._nudged.discard(model)
            try:
                await self._refresh_model(model, notified)
            except Exception:  # logged with its trace; the next look tries again
                log.exception("model_refresh_failed", model=model)

    def nudge(self, model: str) -> None:
        """A notice about the model: it is looked at soon. Notices that come before that look has begun are one."""
        if model in self._nudged:
            return
        self._nudged.add(model)
        self._beside(self.refresh_model(model, notified=True))

    def _beside(self, look: Coroutine[Any, Any, None]) -> None:
        """Begins a look that nobody waits for."""
        task = asyncio.create_task(look)
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def close(self) -> None:
        """Ends the looks that nobody waits for."""
        for task in self._looks:
            task.cancel()
        await asyncio.gather(*self._looks, return_exceptions=True)

    async def poll_forever(self, every_s: float) -> None:
        """The safety net below the notifications."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def listen_forever(self, redis: "Redis") -> None:
        """Looks at a model when its name is published on the models' channel."""
        while True:
            try:
                async with redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(MODELS_CHANNEL)
                    # What was published while nobody listened; beside it, for a model that loads slowly would hold up later notices.
                    self._beside(self.refresh())
                    async for message in channel.listen():
                        model = message["data"].decode(errors="replace")
                        log.info("model_notification", model=model)
                        self.nudge(model)  # beside the listening: one model's long load holds up no other's notice
            except (RedisError, OSError) as error:
                log.debug("notifications_away", error=repr(error))
            await asyncio.sleep(_RECONNECT_S)

    async def _names(self) -> list[str]:
        if self._wanted:
            return list(self._wanted)
        names = set(self._router.names())
        if self._registry is not None:
            try:
                found = await self._registry.models_with(PRODUCTION)
            except RegistryError as error:
                self._note_registry(error)
            else:
                self._note_answer()
                return sorted(names | set(found))
        return sorted(names | set(self._cache.models()))

    # --- one model -------------------------------------------------------------------------------------------------

    async def _refresh_model(self, model: str, notified: bool) -> None:
        lineup = await self._look(model)
        if lineup is None:
            return
        slot = self._router.slot(model)
        first = slot is None
        handle = None if lineup.champion is None else await self._champion(lineup.champion, notified)
        if handle is not None:
            # The first time it goes in place with its variants, in one swap: none of their entities is answered by the champion before.
            slot = Slot(handle) if slot is None else self._put(replace(slot, current=handle, previous=slot.current))
        if slot is None:
            return
        after = await self._others(slot, lineup, notified)
        if first and model in self.rule_faults and (known := self._cache.remembered(model)) is not None and known.rules is not None:
            # The rules that were in place before the start go on, as they would have without it.
            arms, fault = await self._arms(after, known.rules, known.arms, notified)
            after = after if fault else replace(after, rules=known.rules, arms=arms)
        if first or after != slot:
            self._put(after)
        if after != slot:
            log.info("variants_serving", model=model, **{role: handle.version for role, handle in after.held()})
        self._show()
        self._remember(after, lineup)

    async def _look(self, model: str) -> Lineup | None:
        """What is asked for; with the registry away, what it said last, unless something is loaded already."""
        if self._registry is None:
            return self._cache.remembered(model)
        try:
            lineup = await ask_registry(self._registry, model)
        except RegistryError as error:
            self._note_registry(error)
            if self._router.slot(model) is not None:
                return None
            self.troubles[model] = str(error)
            return self._cache.remembered(model)
        self._note_answer()
        if lineup is not None and lineup.champion is not None:
            self._unaliased.discard(model)
            return lineup
        self.troubles.pop(model, None)  # nobody wants it any more
        if model not in self._unaliased:
            # Taking a model out of service by a vanished alias would turn a registry's mishap into an outage.
            log.warning("model_has_no_alias", model=model, alias=PRODUCTION, still_serving=self._router.slot(model) is not None)
            self._unaliased.add(model)
        return lineup

    async def _champion(self, ref: VersionRef, notified: bool) -> ModelHandle | None:
        """The version that shall stand in front from now on; None where it stands there already, or cannot be had."""
        model, slot = ref.model, self._router.slot(ref.model)
        if slot is not None and slot.current.ref == ref:
            self.refusals.pop(model, None)
            return None
        if _fresh(self.refusals.get(model), ref) and not notified:
            return None
        try:
            handle = await self._loader.obtain(ref)
        except ModelRefusedError as error:
            self.refusals[model] = self._refuse(self.refusals.get(model), Refusal(ref, error.step, error.reason))
            return await self._fall_back(ref)
        except (RegistryError, OSError) as error:
            self._note_trouble(ref, error)
            return await self._fall_back(ref)
        self.refusals.pop(model, None)
        self.troubles.pop(model, None)
        return handle

    async def _fall_back(self, failed: VersionRef) -> ModelHandle | None:
        """At start only: rather the version that served last than none."""
        known = self._cache.remembered(failed.model)
        ref = None if known is None else known.champion
        if self._router.slot(failed.model) is not None or ref is None or ref == failed or not self._cache.holds(ref):
            return None
        try:
            handle = await self._loader.from_cache(ref)
        except (ModelRefusedError, OSError) as error:
            log.error("cached_version_unusable", model=ref.model, version=ref.version, reason=str(error))
            return None
        log.warning("serving_cached_version", model=ref.model, version=ref.version)
        return handle

    def _put(self, slot: Slot) -> Slot:
        """Puts versions in place; tells it where another one stands in front than before."""
        handle, before = slot.current, self._router.slot(slot.current.name)
        self._router.put(slot)
        if before is None or before.current is not handle:
            if before is not None:
                self._metrics.swaps.labels(handle.name).inc()
            version = before.current.version if before else None
            log.info("model_serving", model=handle.name, version=handle.version, before=version, device=handle.device)
        return slot

    # --- canary, shadow, arms --------------------------------------------------------------------------------------

    async def _others(self, slot: Slot, lineup: Lineup, notified: bool) -> Slot:
        """The slot with the other versions that are wanted and could be had, and the rules where all their versions are."""
        model = slot.current.name
        canary = await self._side(slot, "canary", lineup.canary, slot.canary, notified)
        shadow = await self._side(replace(slot, canary=canary), "shadow", lineup.shadow, slot.shadow, notified)
        slot = replace(slot, canary=canary, shadow=shadow)
        arms: tuple[ModelHandle | None, ...] = ()
        fault = lineup.fault
        if lineup.rules is not None:
            arms, fault = await self._arms(slot, lineup.rules, lineup.arms, notified)
        self._note_rules(model, fault)
        return slot if fault or lineup.rules is None else replace(slot, rules=lineup.rules, arms=arms)

    async def _arms(
        self, slot: Slot, rules: TrafficRules, refs: tuple[VersionRef | None, ...], notified: bool
    ) -> tuple[tuple[ModelHandle | None, ...], str]:
        """The versions of the experiment's arms, and why the rules must not count: they do not suit the champion, or one cannot be had."""
        model = slot.current.name
        names = [arm.name for arm in rules.experiment.arms] if rules.experiment else []
        handles: list[ModelHandle | None] = []
        fault = rules.unfit_for(slot.current.contract)
        for name, ref in zip(names, refs, strict=True):
            role = f"arm {name}"
            handle = await self._side(slot, role, ref, None, notified)
            if ref is not None and handle is None and not fault:
                refusal = self.side_refusals.get((model, role))
                why = f"was refused ({refusal.step}: {refusal.reason})" if refusal else "could not be loaded yet"
                fault = f"version {ref.version} of the arm '{name}' {why}"
            handles.append(handle)
        for key in [k for k in self.side_refusals if k[0] == model and k[1] not in {"canary", "shadow", *(f"arm {n}" for n in names)}]:
            del self.side_refusals[key]
        return tuple(handles), fault

    async def _side(self, slot: Slot, role: str, ref: VersionRef | None, held: ModelHandle | None, notified: bool) -> ModelHandle | None:
        """The version for a role beside the champion; what is held in it where the wanted one cannot be had."""
        model = slot.current.name
        known = self.side_refusals.get((model, role))
        if ref is None or (held is not None and held.ref == ref):
            self.side_refusals.pop((model, role), None)
            return None if ref is None else held
        if _fresh(known, ref) and not notified:
            return held
        try:
            handle = await self._loader.obtain(ref, slot, answers=role != "shadow")
        except ModelRefusedError as error:
            self.side_refusals[model, role] = self._refuse(known, Refusal(ref, error.step, error.reason, role))
            return held
        except (RegistryError, OSError) as error:
            self._note_trouble(ref, error)
            return held
        self.side_refusals.pop((model, role), None)
        return handle

    def _note_rules(self, model: str, fault: str) -> None:
        if fault and self.rule_faults.get(model) != fault:
            self._metrics.refused.labels(model, "traffic").inc()
            log.error("traffic_rules_refused", model=model, reason=fault)
        self.rule_faults.pop(model, None)
        if fault:
            self.rule_faults[model] = fault

    # --- telling ---------------------------------------------------------------------------------------------------

    def _remember(self, slot: Slot, lineup: Lineup) -> None:
        """For a start without the registry. A version that could not be had now may be in the cache by then."""
        model = slot.current.name
        rules, arms = slot.rules, tuple(None if handle is None else handle.ref for handle in slot.arms)
        now = Lineup(slot.current.ref, _held_or(slot.canary, lineup.canary), _held_or(slot.shadow, lineup.shadow), rules, arms)
        if self._remembered.get(model) == now:
            return
        try:
            self._cache.remember(model, now)
        except OSError as error:
            log.error("model_cache_unusable", model=model, version=slot.current.version, error=str(error))
            return
        self._remembered[model] = now

    def _show(self) -> None:
        """Renews the info metric: one series per loaded version and role."""
        self._metrics.model_info.clear()
        for slot in self._router:
            for role, held in slot.held():
                c = held.contract
                self._metrics.model_info.labels(held.name, str(held.version), role, held.digest, c.training_set_hash, held.device).set(1)

    def _refuse(self, known: Refusal | None, refusal: Refusal) -> Refusal:
        ref = refusal.ref
        if known is None or known.ref != ref:
            self._metrics.refused.labels(ref.model, refusal.step).inc()
        slot = self._router.slot(ref.model)
        log.error(
            "model_refused",
            model=ref.model,
            version=ref.version,
            role=refusal.role,
            step=refusal.step,
            reason=refusal.reason,
            serving=slot.current.version if slot else None,
        )
        return refusal

    def _note_trouble(self, ref: VersionRef, error: Exception) -> None:
        if isinstance(error, RegistryError):
            self._note_registry(error)
            self.troubles[ref.model] = str(error)
            return
        log.error("model_cache_unusable", model=ref.model, version=ref.version, error=str(error))
        self.troubles[ref.model] = f"the model cache cannot be used: {error}"

    def _note_answer(self) -> None:
        if self.registry_fault:
            log.info("registry_back")
        self.registry_fault = ""
        self.registry_seen_s = time.time()

    def _note_registry(self, error: Exception) -> None:
        self._metrics.registry_errors.inc()
        if not self.registry_fault:
            log.error("registry_away", error=str(error))
        self.registry_fault = str(error)


def _held_or(handle: ModelHandle | None, wanted: VersionRef | None) -> VersionRef | None:
    return None if wanted is None else wanted if handle is None else handle.ref


def _fresh(refusal: Refusal | None, ref: VersionRef) -> bool:
    """Whether this version was refused just now, so that looking again tells nothing new."""
    return refusal is not None and refusal.ref == ref and time.monotonic() - refusal.at < _RETRY_REFUSED_S
