"""Monitoring assets of one model: `predictions`, `outcomes`, `performance`, `data_drift`, `prediction_drift`.

Belongs here: which tables each reads and writes, and what an analyst sees. Does not belong here: joins, metrics, drift; skew
(`skew`).
"""

from collections.abc import Callable, Collection, Sequence
from datetime import date, timedelta
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from mlplatform.clients.lake import DAY
from mlplatform.clients.stream import StreamClient
from mlplatform.contracts import CANARY_VARIANT, PRODUCTION, SHADOW_VARIANT, prediction_stream
from mlplatform.evaluation.measures import by_day_columns, scorer
from mlplatform.monitoring import drain as log
from mlplatform.monitoring import drift, outcomes, performance
from mlplatform.orchestration import policy
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.drift_inputs import Reference, Served, served_features, training_reference
from mlplatform.orchestration.joins import model_rows
from mlplatform.orchestration.metadata import md_table, numbers, picture
from mlplatform.orchestration.reports import folder, publish
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.summaries import store_summary
from mlplatform.records import DayRange, DriftSummary
from mlplatform.specs import ModelSpec

DRAIN_BATCH = 100_000  # records
_READ = 1_000  # entries, of up to a hundred records each
REPORTED_DAYS = timedelta(days=28)
DRIFT_WINDOW = timedelta(days=7)
_APPLICATION = "prediction_log"


def monitoring_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    return [
        _asset(
            spec,
            "predictions",
            f"Every prediction `{spec.name}` gave, drained from the service's log exactly once.",
            [policy.key("deployment", spec.name)],
            drain_log,
        ),
        _asset(
            spec,
            "outcomes",
            "Each prediction with its label once that is known; late labels restate the past.",
            [policy.key("predictions", spec.name), *(policy.key("validated", s) for s in spec.inputs)],
            join_labels,
        ),
        _asset(
            spec,
            "performance",
            "How good the answers were, by day, from the outcomes known so far.",
            [policy.key("outcomes", spec.name)],
            report_performance,
        ),
        _asset(
            spec,
            "data_drift",
            "Inputs served lately against those trained on (Evidently). A description, not a calibrated alarm.",
            [policy.key("predictions", spec.name)],
            report_data_drift,
        ),
        _asset(
            spec,
            "prediction_drift",
            "Answers given lately against answers for the test rows (Evidently). A description, not a calibrated alarm.",
            [policy.key("predictions", spec.name)],
            report_prediction_drift,
        ),
    ]


Step = Callable[[Clients, ModelSpec, str], dict[str, Any]]


def _asset(spec: ModelSpec, stage: str, description: str, upstream: Sequence[dg.AssetKey], step: Step) -> dg.AssetsDefinition:
    deps = [dg.AssetDep(k, partition_mapping=dg.AllPartitionMapping()) for k in upstream]
    # A new deployment does not call for a drain, and new outcomes come through their own sensor.
    condition = None if stage in ("predictions", "outcomes") else conditions.after_gates()

    @dg.multi_asset(
        specs=[policy.spec(stage, spec.name, description=description, owner=spec.owner, deps=deps, condition=condition)],
        name=f"{stage}_{spec.name}",
        # The log has one reader; the reports may be made twice without harm.
        pool=f"predictions_{spec.name}" if stage == "predictions" else None,
    )
    def asset(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata=step(platform.clients, spec, context.run.run_id))

    return asset


def drain_log(clients: Clients, spec: ModelSpec, run_id: str) -> dict[str, Any]:
    """Moves the prediction log into Delta, batch by batch, and trims it of what is stored. Returns the asset's metadata."""
    lake, key, aside = clients.lake, ("predictions", spec.name), ("quarantine", f"predictions_{spec.name}")
    fields = outcomes.outcome_columns(spec.row_key, spec.slices, spec.request_fields)
    written, set_aside, repeated = 0, 0, 0
    with clients.platform_streams as stream:
        while True:
            after, aside_after = lake.transaction(key, _APPLICATION), lake.transaction(aside, _APPLICATION)
            start = log.stream_id_at(min(after, aside_after) if lake.exists(aside) else after)
            entries = _read(stream, spec, start)
            if not entries:
                break
            drained = log.drain(
                entries,
                model=spec.name,
                fields=fields,
                received_at=clients.clock.now(),
                after=after,
                set_aside_after=aside_after,
                stored=partial(_stored_keys, clients, spec),
                prediction_range=(-inf, inf) if spec.quantiles else (0.0, 1.0),
            )
            number = log.position(drained.last_stream_id or "0-0")
            # The set-aside entries first: the next read starts after the predictions' position.
            for table, rows in ((aside, drained.set_aside), (key, drained.predictions)):
                lake.append(table, rows, transaction=(_APPLICATION, number), metadata={"run_id": run_id}, widen=True)
            written, set_aside, repeated = (
                written + drained.predictions.height,
                set_aside + drained.set_aside.height,
                repeated + drained.repeated,
            )
        _trim(stream, spec, min(lake.transaction(key, _APPLICATION), lake.transaction(aside, _APPLICATION)))
    if not lake.exists(key):
        # The log was read and holds nothing: an empty table, not a missing one.
        lake.append(key, pl.DataFrame(schema=log.predictions_schema(fields)), metadata={"run_id": run_id})
    return {
        "dagster/row_count": lake.row_count(key) if lake.exists(key) else 0,
        "drained": written,
        "set_aside_unreadable": set_aside,
        "repeated_by_the_service": repeated,
    }


def _read(stream: StreamClient, spec: ModelSpec, start: str) -> list[log.Entry]:
    """What comes next in the log: entries of some `DRAIN_BATCH` records, none where there are no more."""
    entries: list[log.Entry] = []
    records = 0
    while records < DRAIN_BATCH:
        after = entries[-1].stream_id if entries else start
        found = stream.read_after(prediction_stream(spec.name), after, min(_READ, DRAIN_BATCH - records))
        if not found:
            break
        entries += [log.Entry(entry_id, fields.get("record")) for entry_id, fields in found]
        records += sum(entry.count() for entry in entries[-len(found) :])
    return entries


def _trim(stream: StreamClient, spec: ModelSpec, stored: int) -> None:
    """Takes entries off the log that both tables have committed, but for the last: by it the sensor sees how far the log goes."""
    if stored > 0:
        stream.trim_through(prediction_stream(spec.name), log.stream_id_at(stored - 1))


def _stored_keys(clients: Clients, spec: ModelSpec, days: Collection[date]) -> set[log.Key]:
    key = ("predictions", spec.name)
    if not clients.lake.exists(key):
        return set()
    rows = clients.lake.scan(key).filter(pl.col(DAY).is_in(list(days)))
    return set(rows.select("request_id", "input_index", "variant").collect().iter_rows())


def join_labels(clients: Clients, spec: ModelSpec, run_id: str) -> dict[str, Any]:
    """Joins labels to the predictions that may still change, and rewrites the days that did."""
    lake, key, now = clients.lake, ("outcomes", spec.name), clients.clock.now()
    if not lake.exists(("predictions", spec.name)):
        raise dg.Failure(f"There are no predictions of {spec.name} yet: materialize predictions/{spec.name} first.")
    days = DayRange((now - REPORTED_DAYS).date(), now.date())
    asked = lake.read(("predictions", spec.name), days)
    # A flight may be asked for before the day of its T, or after it; a label is found by its key whenever it was asked.
    around = DayRange(days.first - timedelta(days=2), days.last + timedelta(days=2))
    fresh = outcomes.join_outcomes(asked, model_rows(clients, spec, around), spec.row_key, now, spec.max_label_delay)
    stored = lake.read(key, days) if lake.exists(key) else None
    changed = outcomes.days_to_rewrite(fresh, stored)
    if changed:
        span = DayRange(changed[0], changed[-1])
        lake.replace(key, fresh.filter(pl.col(DAY).is_between(span.first, span.last)), span, {"run_id": run_id}, widen=True)
    elif not lake.exists(key):
        lake.append(key, fresh, metadata={"run_id": run_id})
    states = dict(fresh["state"].value_counts().iter_rows()) if fresh.height else {}
    return {
        "dagster/row_count": lake.row_count(key) if lake.exists(key) else 0,
        "days_rewritten": len(changed),
        **{f"outcomes_{state}": int(states.get(state, 0)) for state in ("known", "pending", "missing")},
    }


def report_performance(clients: Clients, spec: ModelSpec, run_id: str) -> dict[str, Any]:
    """Metrics of what was served, by day and overall: all answers but those of a canary, which is on trial, and of a shadow."""
    now = clients.clock.now()
    rows = clients.lake.read(("outcomes", spec.name), DayRange((now - REPORTED_DAYS).date(), now.date())).filter(
        ~pl.col("variant").is_in([CANARY_VARIANT, SHADOW_VARIANT])
    )
    if rows.is_empty():
        return {"note": "no prediction was served in the last 28 days"}
    summary = performance.summarise(rows, spec.name, scorer(spec))
    store_summary(clients, "performance", summary, run_id)
    shown = ("day", "predictions", "outcomes", "missing", *by_day_columns(spec))
    return {
        "predictions": summary.predictions,
        "outcomes": summary.outcomes,
        "missing_outcomes": summary.missing_outcomes,
        **numbers(summary.metrics),
        "by_day": dg.MetadataValue.md(md_table(shown, ([_blank(day.get(c)) for c in shown] for day in summary.by_day))),
        "plot": picture(performance.performance_plot(summary), "performance by day"),
    }


def report_data_drift(clients: Clients, spec: ModelSpec, run_id: str) -> dict[str, Any]:
    """Drift of the served inputs against the training set."""
    found = _both_sides(clients, spec)
    if found is None:
        return {"note": "no version serves, or it was asked nothing in the last 7 days: nothing measured"}
    reference, served = found
    current = served.read
    html = _report_file(clients, spec, "data_drift", run_id)
    summary = drift.data_drift(
        reference.features,
        current,
        reference.features.columns,
        model=spec.name,
        html=html,
        categorical=reference.categorical,
        seed=spec.seed,
    )
    return _drift_metadata(clients, spec, summary, html, run_id) | {"left_out_with_given_features": int(served.given.sum())}


def report_prediction_drift(clients: Clients, spec: ModelSpec, run_id: str) -> dict[str, Any]:
    """Drift of the answers against those for the test rows."""
    found = _both_sides(clients, spec)
    if found is None:
        return {"note": "no version serves, or it was asked nothing in the last 7 days: nothing measured"}
    reference, served = found
    html = _report_file(clients, spec, "prediction_drift", run_id)
    summary = drift.prediction_drift(
        reference.predictions, served.rows["prediction"].to_numpy(), model=spec.name, html=html, seed=spec.seed
    )
    return _drift_metadata(clients, spec, summary, html, run_id) | {"with_given_features": int(served.given.sum())}


def _both_sides(clients: Clients, spec: ModelSpec) -> tuple[Reference, Served] | None:
    champion = clients.registry.by_alias(spec.name, PRODUCTION)
    if champion is None or not clients.lake.exists(("predictions", spec.name)):
        return None
    now = clients.clock.now()
    current = served_features(clients, spec, DayRange((now - DRIFT_WINDOW).date(), now.date()))
    if current.rows.is_empty():
        return None
    return training_reference(clients, spec, champion), current


def _drift_metadata(clients: Clients, spec: ModelSpec, summary: DriftSummary | None, html: Path, run_id: str) -> dict[str, Any]:
    if summary is None:
        return {"note": "too few predictions to measure drift (which is not the same as no drift)"}
    store_summary(clients, summary.kind, summary, run_id)
    return {
        "drifted_share": summary.drifted_share,
        "drifted": summary.drifted,
        "columns": summary.columns,
        "method": summary.method,
        "threshold": summary.threshold,
        "reference_rows": summary.reference_rows,
        "current_rows": summary.current_rows,
        "report": publish(clients, html),
        "plot": picture(drift.drift_plot(summary), "drift by column"),
    }


def _report_file(clients: Clients, spec: ModelSpec, stage: str, run_id: str) -> Path:
    return folder(clients, f"{stage}/{spec.name}") / f"{run_id}.html"


def _blank(value: object) -> object:
    return "" if value is None else value
