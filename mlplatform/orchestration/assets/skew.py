"""`skew/<model>`: logged predictions rebuilt from the tables, and the check that what was served is what is trained on.

Belongs here: which tables, contracts and functions the proof is made from, and what an analyst sees of it. Does not belong
here: the comparison (room `monitoring`), what a fault means for promotion (`serving_state`).
"""

import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from mlplatform.clients.lake import MissingTableError
from mlplatform.contracts import ContractView, ServingContract, source_hash
from mlplatform.features.plan import ViewPlan
from mlplatform.monitoring import skew
from mlplatform.monitoring.skew_faults import FAULTS, Judged
from mlplatform.monitoring.skew_plot import skew_plot
from mlplatform.monitoring.skew_requests import Function
from mlplatform.orchestration import policy
from mlplatform.orchestration.assets.training import request_functions
from mlplatform.orchestration.metadata import md_table, picture
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.summaries import store_summary
from mlplatform.records import DayRange, ModelVersion, SkewSummary
from mlplatform.specs import Catalog, ModelSpec
from mlplatform.training.contract import function_path
from mlplatform.training.scoring import load

CHECK = "served_equals_trained"
REACHED = "online_store_reached"


def skew_assets(catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan]) -> Sequence[dg.AssetsDefinition]:
    upstream = [policy.key("predictions", spec.name), *(policy.key("offline", name) for name in plans)]
    allowed = spec.skew.max_mismatch_rate

    @dg.multi_asset(
        specs=[
            policy.spec(
                "skew",
                spec.name,
                description=f"Features that `{spec.name}` was served, rebuilt from the tables as of the request and compared bit by bit.",
                owner=spec.owner,
                # No condition: it follows the drain, in the monitoring job, and not every tick of every view.
                deps=[dg.AssetDep(k, partition_mapping=dg.AllPartitionMapping()) for k in upstream],
            )
        ],
        name=f"skew_{spec.name}",
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=policy.key("skew", spec.name),
                blocking=True,
                description=f"at most {allowed:.2%} of the logged predictions differ from the tables; above that nothing is promoted",
            ),
            dg.AssetCheckSpec(
                REACHED,
                asset=policy.key("skew", spec.name),
                description=f"at most {spec.skew.max_fallback_share:.2%} of the logged predictions say that the online store was away",
            ),
        ],
    )
    def skew_asset(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        summary = measure(platform.clients, catalog, spec, plans)
        store_summary(platform.clients, "skew", summary, context.run.run_id)
        return dg.MaterializeResult(metadata=_metadata(summary), check_results=[_check(summary), _reached(summary)])

    return [skew_asset]


def measure(clients: Clients, catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan]) -> SkewSummary:
    """The proof over the declared window, up to the clock's now."""
    window = skew.judged_window(spec.skew, clients.clock.now())
    asked = _predictions(clients, spec, *window)
    parts: list[tuple[skew.Logged, Sequence[Judged]]] = []
    unresolved: list[str] = []
    for (number, digest), rows in skew.chosen(asked, spec.skew).partition_by("version", "contract_digest", as_dict=True).items():
        version, contract, why = _contract(clients, spec, int(number), str(digest))
        unresolved += why
        if version is None or contract is None:
            continue
        logged = skew.Logged.of(contract, rows)
        truth, missing = _truth(clients, catalog, plans, logged, version)
        unresolved += [f"version {number}: {reason}" for reason in missing]
        parts += [(part, skew.compare(part, truth)) for part in logged.by_given()]
    budgets = {name: plan.recipe.propagation_budget for name, plan in plans.items()}
    return skew.summarise(spec.name, spec.skew, window, asked.height, parts, budgets, unresolved)


def _predictions(clients: Clients, spec: ModelSpec, start: datetime, end: datetime) -> pl.DataFrame:
    try:
        rows = clients.lake.read(("predictions", spec.name), DayRange(start.date(), end.date()))
    except MissingTableError as missing:
        raise dg.Failure(f"{missing}. Materialize predictions/{spec.name} before skew/{spec.name}.") from missing
    return rows.filter((pl.col("requested_at") > start) & (pl.col("requested_at") <= end))


def _contract(clients: Clients, spec: ModelSpec, number: int, digest: str) -> tuple[ModelVersion | None, ServingContract | None, list[str]]:
    """The version and contract that predictions name, or why they cannot be had."""
    from mlplatform.clients.registry import UnknownModelError

    try:
        version = clients.registry.version(spec.name, number)
    except UnknownModelError:
        return None, None, [f"version {number}: the registry does not know it, so its predictions cannot be rebuilt"]
    contract = clients.registry.contract_of(version)
    if contract.digest() != digest:
        reason = f"version {number}: its contract is {contract.digest()[:12]}, but predictions were made under {digest[:12]}"
        return None, None, [reason]
    return version, contract, []


def _truth(
    clients: Clients, catalog: Catalog, plans: Mapping[str, ViewPlan], logged: skew.Logged, version: ModelVersion
) -> tuple[skew.Truth, list[str]]:
    """What the predictions are held against, and what of it cannot be had."""
    rows: dict[str, pl.DataFrame] = {}
    unresolved: list[str] = []
    for view in logged.contract.views if logged.predictions.height else ():
        if view.name not in plans:
            unresolved.append(f"view {view.name} is no longer declared")
            continue
        try:
            rows[view.name] = _rows(clients, logged, view)
        except (MissingTableError, pl.exceptions.ColumnNotFoundError) as error:
            unresolved.append(f"view {view.name} cannot be rebuilt: {str(error).splitlines()[0]}")
    functions, changed = _functions(catalog, logged.contract)
    with tempfile.TemporaryDirectory() as folder:
        scorer = load(clients.registry.download(version, Path(folder)), logged.contract)
    propagation = {name: plans[name].recipe.propagation_budget for name in rows}
    return skew.Truth(rows, propagation, functions, scorer.points), unresolved + changed


def _rows(clients: Clients, logged: skew.Logged, view: ContractView) -> pl.DataFrame:
    """The rows of the entities asked for, of every day from which a value may have been served or should have been."""
    first, last = logged.reach(view)
    table = clients.lake.scan(("offline", view.name), DayRange(first.date(), last.date()))
    table = table.select(*view.join_keys, "event_timestamp", "created", *view.features)
    if not view.join_keys:
        return table.collect()
    kinds = table.collect_schema()
    entities = logged.inputs.select(pl.col(key).cast(kinds[key]) for key in view.join_keys).unique()
    return table.join(entities.lazy(), on=list(view.join_keys), how="semi").collect()


def _functions(catalog: Catalog, contract: ServingContract) -> tuple[dict[str, Function], list[str]]:
    """The contract's request-time functions as the platform declares them now, and those that are no longer the same."""
    declared: dict[str, Any] = {function_path(f): f.function for f in request_functions(catalog)}
    found: dict[str, Function] = {}
    changed = []
    for function in contract.functions:
        if function.path not in declared:
            changed.append(f"request function {function.path} is no longer declared")
        elif (now := source_hash(declared[function.path])) != function.source_hash:
            was = function.source_hash
            changed.append(f"request_function_changed: the source of {function.path} is {now[:12]}, trained with {was[:12]}")
        else:
            found[function.path] = declared[function.path]
    return found, changed


def _check(summary: SkewSummary) -> dg.AssetCheckResult:
    if not summary.predictions:
        return dg.AssetCheckResult(
            check_name=CHECK,
            passed=True,
            severity=dg.AssetCheckSeverity.WARN,
            description="nothing to compare: no prediction in the window",
        )
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=summary.passed,
        description="; ".join((summary.told, *([summary.fallback_told] if summary.fallback else []), *summary.unresolved)),
        metadata={"compared": summary.compared, "mismatched": summary.mismatched, "kinds": dg.MetadataValue.json(dict(summary.kinds))},
    )


def _reached(summary: SkewSummary) -> dg.AssetCheckResult:
    """Declared fallbacks are no skew, and yet nobody wants them to be many."""
    return dg.AssetCheckResult(
        check_name=REACHED,
        passed=summary.fallback_share <= summary.max_fallback_share,
        severity=dg.AssetCheckSeverity.WARN,
        description=summary.fallback_told,
        metadata={"fallback": summary.fallback, "share": summary.fallback_share, "allowed_share": summary.max_fallback_share},
    )


def _metadata(summary: SkewSummary) -> dict[str, Any]:
    shown = ("source", "compared", "mismatches", "rate", "away", "behind", "lag_p50_s", "lag_p99_s", "lag_max_s", "budget_s")
    sources = ([_blank(s.get(c)) for c in shown] for s in summary.by_source)
    features = sorted(summary.by_feature, key=lambda f: -f["mismatches"])
    columns = ("source", "feature", "compared", "mismatches", "rate")
    examples = ("fault", "requested_at", "request_id", "source", "entity", "served", "rebuilt", "served_event", "expected_event")
    return {
        "predictions": summary.predictions,
        "compared": summary.compared,
        "mismatched": summary.mismatched,
        "with_given_features": summary.given,
        "fallback_store_away": summary.fallback,
        "mismatch_rate": summary.rate,
        "allowed_rate": summary.max_rate,
        "window": " … ".join(summary.window),
        "unresolved": dg.MetadataValue.json(list(summary.unresolved)),
        "faults": dg.MetadataValue.md(md_table(("fault", "predictions", "meaning"), ((k, n, FAULTS[k]) for k, n in summary.kinds.items()))),
        "sources": dg.MetadataValue.md(md_table(shown, sources)),
        "features": dg.MetadataValue.md(md_table(columns, ([f[c] for c in columns] for f in features))),
        "examples": dg.MetadataValue.md(md_table(examples, ([_blank(e.get(c)) for c in examples] for e in summary.examples))),
        "plot": picture(skew_plot(summary), "skew by source"),
    }


def _blank(value: object) -> object:
    return "" if value is None else value
