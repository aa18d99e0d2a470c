"""`validated/<source>` and `quarantine/<source>`: one step that splits a source's raw rows by its contract.

Belongs here: which rows are split against which references, and the contract's checks. Does not belong here: the rules.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from mlplatform.clients.lake import MissingTableError
from mlplatform.orchestration import partitions, policy
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.metadata import column_schema, md_table
from mlplatform.orchestration.reports import folder, publish
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange, ValidationSummary
from mlplatform.specs import Catalog, Coverage, SourceSpec
from mlplatform.validation import describe, table
from mlplatform.validation.rules import rules_of
from mlplatform.validation.split import SplitResult, split

if TYPE_CHECKING:
    from mlplatform.validation.expectations import SuiteResult

# A day's rows are judged with their neighbours: rules may look at the hours before and after.
CONTEXT = timedelta(days=1)
SUITE = "expectation_suite"


def validation_assets(catalog: Catalog) -> Sequence[dg.AssetsDefinition]:
    sources = {s.name: s for s in catalog.sources}
    return [_validated(catalog, spec, sources) for spec in catalog.sources]


def _validated(catalog: Catalog, spec: SourceSpec, sources: Mapping[str, SourceSpec]) -> dg.AssetsDefinition:
    days_def = partitions.daily(catalog) if spec.partitioned else None
    condition = conditions.after_gates_any_day() if spec.partitioned else conditions.after_gates()
    referred = {r.source for r in spec.contract.references} | {c.source for c in spec.contract.coverage}
    deps = [dg.AssetDep(policy.key("raw", spec.name)), *(_reference_dep(spec, sources[name]) for name in sorted(referred))]
    validated, quarantine = policy.key("validated", spec.name), policy.key("quarantine", spec.name)

    @dg.multi_asset(
        specs=[
            policy.spec(
                "validated",
                spec.name,
                description=f"{spec.description}\n\nRows that keep the contract.\n\n{describe.table_limits(spec)}",
                owner=spec.owner,
                deps=deps,
                partitions=days_def,
                condition=condition,
                metadata=column_schema(describe.validated_columns(spec)) | {"contract": dg.MetadataValue.md(describe.markdown(spec))},
            ),
            policy.spec(
                "quarantine",
                spec.name,
                description=f"Rows of {spec.name} that break the contract, each with every rule it breaks.",
                owner=spec.owner,
                deps=deps,
                partitions=days_def,
                condition=condition,
                metadata=column_schema(describe.quarantine_columns(spec)),
            ),
        ],
        name=f"validated_{spec.name}",
        backfill_policy=dg.BackfillPolicy.single_run() if days_def else None,
        check_specs=[
            *(dg.AssetCheckSpec(c.name, asset=validated, blocking=c.blocking, description=c.description) for c in describe.checks(spec)),
            dg.AssetCheckSpec(
                SUITE, asset=validated, description="The contract as a Great Expectations suite, over the raw rows (shows what was caught)"
            ),
        ],
    )
    def validate(context: dg.AssetExecutionContext, platform: PlatformResource) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        clients = platform.clients
        days = partitions.days_of(context) if spec.partitioned else None
        result, summary, covers, inputs = split_source(clients, spec, days)
        suite = _suite(clients, spec, inputs, days, context.run.run_id)
        write(clients, spec, result, days, context.run.run_id, summary)
        yield dg.MaterializeResult(
            asset_key=quarantine,
            metadata={
                "dagster/partition_row_count": summary.quarantined,
                "broken": dg.MetadataValue.md(md_table(("rule", "rows"), summary.broken.items())),
            },
        )
        checks = list(_checks(clients, spec, summary, covers, suite, validated))
        if summary.failures:
            # The good rows of an unacceptable day are not written: what stands is the last acceptable state. Other days of
            # the range are, but the run fails all the same: what lies downstream would take the old day for the new one.
            yield from checks
            raise dg.Failure(
                f"{spec.name}: " + "; ".join(summary.failures),
                metadata={"accounting": dg.MetadataValue.md(_accounting(summary))},
                allow_retries=False,
            )
        yield dg.MaterializeResult(asset_key=validated, metadata=_metadata(clients, spec, summary, suite), check_results=checks)

    return validate


@dataclass(frozen=True)
class Inputs:
    """What a split reads: the rows judged, their neighbours, the rows referred to."""

    rows: pl.DataFrame
    context: pl.DataFrame
    references: Mapping[str, pl.DataFrame]


def split_source(
    clients: Clients, spec: SourceSpec, days: DayRange | None
) -> tuple[SplitResult, ValidationSummary, list[table.CoverageResult], Inputs]:
    """Reads the raw rows and what they refer to, splits, and judges the table."""
    lake = clients.lake
    try:
        around = None if days is None else DayRange(days.first - CONTEXT, days.last + CONTEXT)
        raw = lake.read(("raw", spec.name), around)
    except MissingTableError as missing:
        raise dg.Failure(f"{missing} (asset raw/{spec.name})") from missing
    inside = pl.lit(True) if days is None else pl.col("event_date").is_between(days.first, days.last)
    rows = raw.filter(inside)
    references = {r.source: _reference_rows(clients, r.source) for r in spec.contract.references}
    context = raw.filter(~inside)
    result = split(rows, spec, references, context=context)
    complete = days is not None and _complete(clients, days)
    end = datetime.combine(days.last + timedelta(days=1), time.min, UTC) if days is not None and complete else None
    summary = table.judge(result, spec, now=end, rows_expected=days is None or complete)
    covers = [
        _cover(clients, spec, declared, result.validated, days) for declared in spec.contract.coverage if complete and days is not None
    ]
    return result, summary, covers, Inputs(rows, context, references)


def _complete(clients: Clients, days: DayRange) -> bool:
    return days.last < clients.clock.now().date()


def _suite(clients: Clients, spec: SourceSpec, inputs: Inputs, days: DayRange | None, run_id: str) -> "SuiteResult | None":
    """The expectation suite, once the days are complete: within a day the split alone runs, every few minutes, and suffices."""
    if days is not None and not _complete(clients, days):
        return None
    from mlplatform.validation.expectations import run_suite

    return run_suite(inputs.rows, spec, folder(clients, "data_docs"), references=inputs.references, context=inputs.context, run=run_id)


def _cover(clients: Clients, spec: SourceSpec, declared: Coverage, validated: pl.DataFrame, days: DayRange) -> table.CoverageResult:
    """How far `validated` answers the rows of another source that fall on `days`."""
    known = DayRange(days.first - _whole_days(declared.lookback), days.last)
    needing = clients.lake.scan(("validated", declared.source), known).filter(
        pl.col(declared.at).dt.date().is_between(days.first, days.last)
    )
    return table.coverage(validated, spec, declared, needing.collect())


def _whole_days(span: timedelta) -> timedelta:
    return timedelta(days=-(-span // timedelta(days=1)))


def write(clients: Clients, spec: SourceSpec, result: SplitResult, days: DayRange | None, run_id: str, summary: ValidationSummary) -> None:
    """Replaces the days' rows in both tables, or the whole tables of a source without days. Of `validated`, days that are
    not acceptable stay as they are: the `bad_days`, or all where the failures are about everything."""
    metadata, key = {"run_id": run_id}, ("validated", spec.name)
    clients.lake.replace(("quarantine", spec.name), result.quarantined, days, metadata)
    validated = result.validated
    if summary.bad_days:
        bad = pl.col("event_date").is_in(list(summary.bad_days))
        validated = validated.filter(~bad)
        if clients.lake.exists(key):
            validated = pl.concat([validated, clients.lake.read(key, days).filter(bad).select(validated.columns)])
    elif summary.failures:
        return
    clients.lake.replace(key, validated, days, metadata)


def _reference_dep(spec: SourceSpec, other: SourceSpec) -> dg.AssetDep:
    key = policy.key("validated", other.name)
    if spec.partitioned and other.partitioned:
        return dg.AssetDep(key, partition_mapping=partitions.lookback(timedelta(0)))
    return dg.AssetDep(key)


def _reference_rows(clients: Clients, source: str) -> pl.DataFrame:
    try:
        return clients.lake.read(("validated", source))
    except MissingTableError as missing:
        raise dg.Failure(f"{missing} (asset validated/{source}, which others refer to)") from missing


def _checks(
    clients: Clients,
    spec: SourceSpec,
    summary: ValidationSummary,
    covers: Sequence[table.CoverageResult],
    suite: "SuiteResult | None",
    key: dg.AssetKey,
) -> Iterator[dg.AssetCheckResult]:
    warn = dg.AssetCheckSeverity.WARN
    yield dg.AssetCheckResult(
        asset_key=key,
        check_name="contract",
        passed=not summary.failures,
        description="; ".join(summary.failures) or "within the contract's limits",
        metadata={"accounting": dg.MetadataValue.md(_accounting(summary))},
    )
    for rule in rules_of(spec.contract):
        if not rule.quarantines:
            found = summary.warned.get(rule.name, 0)
            yield dg.AssetCheckResult(
                asset_key=key, check_name=describe.check_name(rule.name), passed=not found, severity=warn, metadata={"rows": found}
            )
    found_covers = {c.name: c for c in covers}
    for declared in spec.contract.coverage:
        cover = found_covers.get(f"coverage:{declared.source}")
        yield dg.AssetCheckResult(
            asset_key=key,
            check_name=describe.check_name(f"coverage:{declared.source}"),
            passed=cover is not None and not cover.missing,
            severity=warn,
            metadata={"needed": cover.needed, "missing": cover.missing} if cover else {"not_measured": "the day is not complete yet"},
        )
    yield dg.AssetCheckResult(
        asset_key=key,
        check_name=SUITE,
        passed=suite is None or suite.success,
        severity=warn,
        description="not run yet: it is run once the day is complete" if suite is None else "; ".join(suite.failed),
        metadata=_docs(clients, suite),
    )


def _metadata(clients: Clients, spec: SourceSpec, summary: ValidationSummary, suite: "SuiteResult | None") -> dict[str, Any]:
    return {
        "dagster/partition_row_count" if spec.partitioned else "dagster/row_count": summary.validated,
        "accounting": dg.MetadataValue.md(_accounting(summary)),
        "quarantined": summary.quarantined,
        "redelivered": summary.redelivered,
        "path": dg.MetadataValue.path(clients.lake.uri(("validated", spec.name))),
        **_docs(clients, suite),
    }


def _docs(clients: Clients, suite: "SuiteResult | None") -> dict[str, dg.MetadataValue]:
    return {"data_docs": publish(clients, suite.docs_path)} if suite and suite.docs_path else {}


def _accounting(summary: ValidationSummary) -> str:
    rows = [
        ("received", summary.rows_in),
        ("validated", summary.validated),
        ("quarantined", summary.quarantined),
        ("redelivered (exact repeats, dropped)", summary.redelivered),
        *((f"broken: {name}", n) for name, n in summary.broken.items()),
        *((f"warned: {name}", n) for name, n in summary.warned.items()),
    ]
    return md_table(("", "rows"), rows)
