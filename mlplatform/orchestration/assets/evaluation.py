"""`evaluation/<model>`: the newest version on the test rows, beside baselines and champion, with its gates as checks.

Belongs here: which version is judged on which rows, and what is recorded. Does not belong here: metrics and gates.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import dagster as dg
import polars as pl

from mlplatform.addresses import without_password
from mlplatform.contracts import EVALUATION_TAG, GATE_RESULTS_TAG, GATES_TAG, PRODUCTION, VERIFIED_TAG
from mlplatform.deployment.decide import decide, ledger_entries
from mlplatform.deployment.states import GATES
from mlplatform.evaluation import plots, quantile_plots
from mlplatform.evaluation.budget import BATCH, judge_budget, measure_cost
from mlplatform.evaluation.evaluate import Champion, all_gate_names, evaluate
from mlplatform.evaluation.gates import judge_skew
from mlplatform.evaluation.measures import baselines_of, label_of, shown_metrics
from mlplatform.orchestration import policy
from mlplatform.orchestration import recording as ledger
from mlplatform.orchestration.assets.training import open_training_set
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.metadata import md_table, numbers, picture
from mlplatform.orchestration.release_state import sealed_tags, write_states
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.orchestration.serving_state import serving_state
from mlplatform.orchestration.summaries import newest_summary
from mlplatform.records import Evaluation, LedgerEntry, ModelVersion, PredictionCost, SkewSummary
from mlplatform.specs import ModelSpec
from mlplatform.training.scoring import load
from mlplatform.training.trainers.base import Floats
from mlplatform.verified import evaluation_sha256


def evaluation_assets(spec: ModelSpec) -> Sequence[dg.AssetsDefinition]:
    asset_key = policy.key("evaluation", spec.name)

    @dg.multi_asset(
        specs=[
            policy.spec(
                "evaluation",
                spec.name,
                description=f"Metrics, slices, calibration and cost of the newest version of `{spec.name}` on test rows it never saw.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("model", spec.name)), dg.AssetDep(policy.key("training_set", spec.name))],
                condition=conditions.after_gates(),
            )
        ],
        name=f"evaluation_{spec.name}",
        check_specs=[
            dg.AssetCheckSpec(
                "gates", asset=asset_key, blocking=True, description="Every blocking gate of the model: " + ", ".join(all_gate_names(spec))
            ),
        ],
    )
    def evaluation(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        clients = platform.clients
        version = newest_version(clients, spec)
        result, pictures = evaluate_version(clients, spec, version)
        record(clients, version, result, pictures, context.run.run_id)
        return dg.MaterializeResult(
            metadata={
                "version": result.version,
                "champion": result.champion_version or "none",
                "rows": result.rows,
                "mlflow": dg.MetadataValue.url(clients.registry.run_ui_url(version) or without_password(clients.settings.mlflow_uri)),
                "gates": dg.MetadataValue.md(_gate_table(result)),
                **{name: picture(png, name.replace("_", " ")) for name, png in pictures.items()},
                "slices": dg.MetadataValue.md(_slice_table(result)),
                **numbers(result.metrics),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="gates",
                    passed=result.passed,
                    description="; ".join(g.reason for g in result.gates if g.blocking and not g.passed) or "every blocking gate passed",
                    metadata={"gates": dg.MetadataValue.md(_gate_table(result))},
                )
            ],
        )

    return [evaluation]


def newest_version(clients: Clients, spec: ModelSpec) -> ModelVersion:
    """The version registered last."""
    from mlplatform.clients.registry import UnknownModelError

    try:
        versions = clients.registry.versions(spec.name)
    except UnknownModelError:
        versions = ()
    if not versions:
        raise dg.Failure(f"No version of {spec.name} is registered: materialize model/{spec.name} first.")
    return versions[0]


def evaluate_version(clients: Clients, spec: ModelSpec, version: ModelVersion) -> tuple[Evaluation, dict[str, bytes]]:
    """The evaluation on the test part of the training set, and its pictures."""
    data, manifest, used = open_training_set(clients, spec)
    made_from = clients.registry.contract_of(version).training_set_hash
    if made_from != manifest.content_hash:
        raise dg.Failure(
            f"Version {version.version} of {spec.name} was trained on another training set: materialize model/{spec.name} again."
        )
    test, train = data.part("test"), data.part("train")
    labels = test["label"].to_numpy()
    predictions = score_version(clients, version, test)
    champion = clients.registry.by_alias(spec.name, PRODUCTION)
    rival = Champion(champion.version, score_version(clients, champion, test)) if champion else None
    newest = newest_summary(clients, "skew", spec.name, SkewSummary)
    result = evaluate(
        used,
        version.version,
        labels,
        predictions,
        test,
        champion=rival,
        baselines=baselines_of(used, train, test, data.numeric, data.categorical),
        beside=(
            *judge_budget(spec.budget, cost_of(clients, version, test)),
            judge_skew(newest, version.version, champion.version if champion else None),
        ),
    )
    pictures = {"comparison": plots.comparison(result, shown_metrics(spec))}
    draw = _quantile_pictures if spec.quantiles else _pictures
    return result, pictures | draw(spec, result, labels, predictions, rival)


def _pictures(spec: ModelSpec, result: Evaluation, labels: Floats, predictions: Floats, rival: Champion | None) -> dict[str, bytes]:
    pictures = {
        "reliability": plots.reliability_diagram(labels, predictions, rival.predictions if rival else None),
        "scores": plots.score_histogram(labels, predictions),
        **{f"slices_by_{column}": plots.slice_bars(result.slices, column, result.metrics["auc"]) for column in spec.slices},
    }
    return pictures | ({"cost": plots.cost_plot(labels, predictions, spec.cost)} if spec.cost else {})


def _quantile_pictures(spec: ModelSpec, result: Evaluation, labels: Floats, answers: Floats, rival: Champion | None) -> dict[str, bytes]:
    levels, measured = spec.quantiles, label_of(spec, labels)
    inside = levels[-1] - levels[0]
    return {
        "calibration": quantile_plots.quantile_calibration(measured, answers, levels, rival.predictions if rival else None),
        "errors": quantile_plots.error_histogram(measured, answers, levels),
        **{f"slices_by_{column}": quantile_plots.quantile_slice_bars(result.slices, column, inside) for column in spec.slices},
    }


def score_version(clients: Clients, version: ModelVersion, frame: pl.DataFrame) -> Floats:
    """A registered version's predictions for training-set rows, its files verified on the way."""
    with tempfile.TemporaryDirectory() as folder:
        files = clients.registry.download(version, Path(folder))
        return load(files, clients.registry.contract_of(version)).predict(frame)


def cost_of(clients: Clients, version: ModelVersion, frame: pl.DataFrame) -> PredictionCost:
    """What serving a registered version costs, timed on some of the rows, on one thread of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        files = clients.registry.download(version, Path(folder))
        contract = clients.registry.contract_of(version)
        scorer = load(files, contract, threads=1)
        return measure_cost(scorer.predict_matrix, scorer.inputs(frame.head(BATCH)), (files / contract.model_file).stat().st_size)


def record(clients: Clients, version: ModelVersion, result: Evaluation, pictures: dict[str, bytes], run_id: str) -> None:
    """Writes the verdict where others look for it: the version's tags and run; a refusal also into the ledger."""
    clients.registry.log_metrics(version, {f"test_{k}": v for k, v in result.metrics.items()}, pictures)
    evaluation = json.dumps({k: round(float(v), 6) for k, v in result.metrics.items()})
    seal = sealed_tags(clients, version, evaluation) if result.passed else {VERIFIED_TAG: ""}
    told = {GATE_RESULTS_TAG: json.dumps([asdict(gate) for gate in result.gates]), EVALUATION_TAG: evaluation}
    clients.registry.set_tags(version, {**told, GATES_TAG: "passed" if result.passed else "refused", **seal})
    asked = "; ".join(f"{gate.name} {gate.bound}".strip() for gate in result.gates if gate.blocking) or "none"
    evidence = {**result.metrics, "gates_asked": asked, "evaluation_sha256": evaluation_sha256(evaluation), "mlflow_run": version.run_id}
    if result.passed:
        blocking = sum(gate.blocking for gate in result.gates)
        reason = f"every blocking gate passed ({blocking})"
        entry = LedgerEntry(
            clients.clock.now(), version.model, "pass", "", version.version, result.champion_version, GATES, reason, run_id, evidence
        )
        ledger.record(clients, entry, entry_id=f"pass-{version.version}-{run_id}")
    decision = decide(result, serving_state(clients, version.model))
    if decision.action == "refuse" and not result.passed:
        for entry in ledger_entries(decision, clients.clock.now(), GATES, run_id, evidence):
            ledger.record(clients, entry, entry_id=f"refuse-{version.version}-{run_id}-{entry.action}-{entry.version}")
    write_states(clients, version.model)


def _gate_table(result: Evaluation) -> str:
    rows = (
        (
            "passed" if g.passed else "FAILED",
            g.name,
            "not measured" if g.value is None else g.value,
            g.bound,
            g.reason,
            "" if g.blocking else "advisory",
        )
        for g in result.gates
    )
    return md_table(("", "gate", "value", "bound", "reason", ""), rows)


def _slice_table(result: Evaluation) -> str:
    if not result.slices:
        return ""
    left_out = ("pooled", "small")
    shown = tuple(name for name in result.slices[0] if name not in left_out and not name.endswith(("_low", "_high")))
    rows = ([("" if s.get(c) is None else s[c]) for c in shown] for s in result.slices)
    return md_table(shown, rows)
