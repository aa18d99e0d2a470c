"""A canary's trial, one judgement at a time: evidence read, judged, and the step that follows carried out.

Belongs here: reading tables and counters, the order of a judgement. Does not belong here: the judgement (`deployment.judge`), how a step
is written (`canary_state`).

The evidence is read anew each time, so a judgement that was killed is made again. Of failed requests only the services know: what they
have counted is read with every judgement, and kept in the table `canary/<model>`.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import polars as pl

from mlplatform.clients.lake import with_day
from mlplatform.contracts import CANARY_VARIANT, CHAMPION_VARIANT
from mlplatform.deployment.evidence import COUNTERS, Trial, looks, on_trial, requests_since
from mlplatform.deployment.judge import Progress, Step, Verdict, judge, next_step
from mlplatform.orchestration.canary_state import finish_canary, record_verdict, set_canary
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange, LedgerEntry
from mlplatform.specs import ModelSpec


@dataclass(frozen=True)
class Judgement:
    """`refused`: why the step could not be carried out. `unheard`: why the services' counters could not be read."""

    trial: Trial
    progress: Progress
    verdict: Verdict
    step: Step
    refused: tuple[str, ...] = ()
    unheard: str = ""


def judge_canary(clients: Clients, spec: ModelSpec, actor: str = "judge", run_id: str = "", act: bool = True) -> Judgement | None:
    """The judgement of the canary that answers now, and with `act` its consequence; None where nobody is on trial."""
    entries = clients.ledger.entries(spec.name)
    found = on_trial(entries, spec.canary.window)
    if found is None:
        return None
    trial, progress = found
    now = clients.clock.now()
    read, unheard = _read_counters(clients, spec, now)
    outcomes = _table(clients, "outcomes", spec, trial.began, now)
    counters = pl.concat([_table(clients, "canary", spec, trial.began, now).select(COUNTERS.names()), read])
    if act and read.height:
        clients.lake.append(("canary", spec.name), with_day(read, "at"), metadata={"run_id": run_id})
    verdict = judge(spec.canary, looks(spec, trial, outcomes, counters, now))
    progress = replace(progress, requests=requests_since(trial, outcomes, progress.since))
    step = next_step(spec.canary, progress, verdict, now)
    told = Judgement(trial, progress, verdict, step, unheard=unheard)
    return replace(told, refused=_carry_out(clients, spec, told, entries, actor, run_id)) if act else told


def _carry_out(
    clients: Clients, spec: ModelSpec, told: Judgement, entries: tuple[LedgerEntry, ...], actor: str, run_id: str
) -> tuple[str, ...]:
    """The verdict's entry first: whoever finds the step finds why."""
    model, version, step = spec.name, told.trial.canary, told.step
    evidence = {**told.verdict.evidence(), "step": step.action, "percent": step.percent}
    if step.action != "hold" or told.verdict.word != _last_word(entries, told):
        place = f"{told.progress.since.isoformat()}:{step.action}:{told.verdict.word}"
        record_verdict(clients, model, version, told.verdict.word, step.reason, evidence, actor, run_id, place)
    if step.action == "hold":
        return ()
    if step.action == "advance":
        return set_canary(clients, model, version, step.percent, actor, step.reason, run_id, evidence).reasons
    return finish_canary(clients, model, version, step.action, actor, step.reason, run_id, evidence)


def _last_word(entries: tuple[LedgerEntry, ...], told: Judgement) -> Any:
    said = [e for e in entries if e.action == "verdict" and e.version == told.trial.canary and e.at >= told.progress.since]
    return said[-1].evidence.get("verdict") if said else None


def _table(clients: Clients, stage: str, spec: ModelSpec, since: datetime, now: datetime) -> pl.DataFrame:
    key = (stage, spec.name)
    if not clients.lake.exists(key):
        empty = COUNTERS if stage == "canary" else _OUTCOMES
        return pl.DataFrame(schema=empty)
    return clients.lake.read(key, DayRange(since.date(), now.date()))


_OUTCOMES = pl.Schema(
    {
        "request_id": pl.String,
        "requested_at": pl.Datetime("us", "UTC"),
        "variant": pl.String,
        "version": pl.Int64,
        "prediction": pl.Float64,
        "latency_ms": pl.Float64,
        "state": pl.String,
        "label": pl.Float64,
        "label_known_at": pl.Datetime("us", "UTC"),
    }
)


def _read_counters(clients: Clients, spec: ModelSpec, now: datetime) -> tuple[pl.DataFrame, str]:
    """What the service has counted, with the columns of `COUNTERS`; or nothing, and why it does not tell."""
    from mlplatform.clients.service_counters import CountersUnreadError, read_counters

    settings = clients.settings
    secret = settings.serving_api_key.get_secret_value()
    try:
        found = read_counters(settings.serving_url, spec.name, (CHAMPION_VARIANT, CANARY_VARIANT), secret)
    except CountersUnreadError as fault:
        return pl.DataFrame(schema=COUNTERS), str(fault)
    return pl.DataFrame([{"at": now, **asdict(one)} for one in found], schema=COUNTERS), ""
