"""Training assets of one model: `training_set`, `tuning`, `model`.

Belongs here: the order in which records go from one room to the next. Does not belong here: what the rooms do.
"""

import importlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg

from mlplatform.addresses import without_password
from mlplatform.clients import fingerprints
from mlplatform.code_version import code_version
from mlplatform.contracts import ONLINE_PROJECT, TRAINED_BY_TAG
from mlplatform.features.plan import ViewPlan
from mlplatform.orchestration import policy
from mlplatform.orchestration.automation import conditions
from mlplatform.orchestration.ingredients import INGREDIENTS_TAG, ingredients
from mlplatform.orchestration.joins import Versions, model_rows, with_features
from mlplatform.orchestration.metadata import md_table, numbers, picture
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange, TrainingManifest, TuningResult
from mlplatform.specs import Catalog, ModelSpec, RequestFunction, Split
from mlplatform.training import dataset as datasets
from mlplatform.training import fitting, plots
from mlplatform.training.contract import build_contract, view_layout
from mlplatform.training.dataset import MANIFEST
from mlplatform.training.trainers import base as trainers
from mlplatform.training.trainers.base import Resources
from mlplatform.training.tuning import tune

# Run tag: who asked for the run, where that is not who runs the daemon.
ACTOR = "mlplatform/actor"


class TrainingWindow(dg.Config):
    """Which days to train, validate and test on. Empty: the model's declared split.

    `end` alone moves the declared split so that its test ends there, as a retraining does.
    """

    train_start: str = ""
    validate_start: str = ""
    test_start: str = ""
    end: str = ""

    def split(self, declared: Split) -> Split:
        if self.end and not (self.train_start or self.validate_start or self.test_start):
            return declared.moved_to(date.fromisoformat(self.end))
        given = {
            name: date.fromisoformat(value)
            for name in ("train_start", "validate_start", "test_start", "end")
            if (value := str(getattr(self, name)))
        }
        return Split(**{**declared.model_dump(), **given})


def training_assets(catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan]) -> Sequence[dg.AssetsDefinition]:
    return [_training_set(catalog, spec, plans), _tuning(spec), _model(catalog, spec, plans)]


def _training_set(catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan]) -> dg.AssetsDefinition:
    upstream = [policy.key("validated", s) for s in spec.inputs] + [policy.key("offline", v) for v in plans]
    deps = [dg.AssetDep(k, partition_mapping=dg.AllPartitionMapping()) for k in upstream]

    @dg.multi_asset(
        specs=[
            policy.spec(
                "training_set",
                spec.name,
                description=f"Labelled rows of `{spec.name}` with every feature as it was known at T; one row in, one row out.",
                owner=spec.owner,
                deps=[*deps, dg.AssetDep(policy.key("feature_registry", catalog.name))],
            )
        ],
        name=f"training_set_{spec.name}",
        check_specs=[
            dg.AssetCheckSpec(
                "no_row_lost",
                asset=policy.key("training_set", spec.name),
                blocking=True,
                description="labelled rows in = rows out + rows accounted for",
            )
        ],
    )
    def training_set(context: dg.AssetExecutionContext, config: TrainingWindow, platform: PlatformResource) -> dg.MaterializeResult:
        manifest, version = write_training_set(
            platform.clients, catalog, spec.model_copy(update={"split": config.split(spec.split)}), plans, context.run.run_id
        )
        counts = manifest.rows_by_part
        accounted = sum(n for part, n in counts.items() if part != "labelled_in")
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.content_hash[:16]),
            metadata={
                "dagster/row_count": manifest.rows,
                "delta_version": version,
                "content_hash": manifest.content_hash,
                "base_rate": manifest.base_rate,
                "rows": dg.MetadataValue.md(md_table(("part", "rows"), counts.items())),
                "split": dg.MetadataValue.json(dict(manifest.split)),
                "null_shares": dg.MetadataValue.md(
                    md_table(("column", "null"), ((c, f"{s:.1%}") for c, s in manifest.null_shares.items()))
                ),
                "delta_versions": dg.MetadataValue.json({t: list(v) for t, v in manifest.delta_versions.items()}),
                "feature_fingerprints": dg.MetadataValue.json(dict(manifest.feature_fingerprints)),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="no_row_lost",
                    passed=accounted == manifest.labelled_in,
                    metadata={"in": manifest.labelled_in, "accounted_for": accounted},
                )
            ],
        )

    return training_set


def write_training_set(
    clients: Clients, catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan], run_id: str
) -> tuple[TrainingManifest, int]:
    """Joins, splits, and writes the training set; the manifest lies in the commit. Returns it with the Delta version."""
    lake = clients.lake
    tables = [("validated", s) for s in spec.inputs] + [("offline", v) for v in plans]
    # First the versions, then the rows of just these: streams write the tables meanwhile.
    versions = {"/".join(key): lake.identity(key) for key in tables}
    data = read_training_data(clients, spec, plans, {key: versions["/".join(key)][1] for key in tables})
    prints = {f"offline/{v}": fingerprints.of_table(lake, ("offline", v), versions[f"offline/{v}"][1]).hash for v in plans}
    manifest = datasets.manifest(spec, data, versions, definition_sources(catalog, plans), prints)
    version = lake.replace(
        ("training_set", spec.name), data.frame, metadata={"run_id": run_id, MANIFEST: json.dumps(manifest.to_dict(), default=str)}
    )
    return manifest, version


def read_training_data(clients: Clients, spec: ModelSpec, plans: Mapping[str, ViewPlan], versions: Versions) -> datasets.Dataset:
    """The labelled rows of the spec's split with their features, from tables as they were at `versions`."""
    rows = model_rows(clients, spec, DayRange(spec.split.train_start, spec.split.end), versions)
    used = {key: version for key, version in versions.items() if key[0] == "offline" and key[1] in service_views(clients, spec)}
    features = with_features(clients, spec, rows, used)
    # Feature names are unique over a package's views; a service may give them in full.
    defaults = {key: v for p in plans.values() for f, v in p.recipe.defaults.items() for key in (f, f"{p.name}__{f}")}
    return datasets.assemble(spec, rows, features, service_columns(clients, spec), defaults)


def open_training_set(clients: Clients, spec: ModelSpec) -> tuple[datasets.Dataset, TrainingManifest, ModelSpec]:
    """The stored training set, its manifest, and the spec with the split it was made for."""
    key = ("training_set", spec.name)
    text = clients.lake.last_metadata(key, MANIFEST)
    if text is None:
        raise dg.Failure(f"There is no training set of {spec.name}: materialize training_set/{spec.name} first.")
    raw: dict[str, Any] = json.loads(text)
    raw["delta_versions"] = {t: (v[0], int(v[1])) for t, v in raw["delta_versions"].items()}
    raw["columns"] = tuple(raw["columns"])
    manifest = TrainingManifest(**raw)
    used = spec.model_copy(update={"split": Split(**{k: date.fromisoformat(v) for k, v in manifest.split.items()})})
    # Reading and hashing takes seconds, and one run opens the same set several times. A Delta version never changes.
    identity = clients.lake.identity(key)
    if clients.opened.get(spec.name, (None,))[0] != identity:
        clients.opened[spec.name] = (identity, datasets.reopen(used, clients.lake.read(key), manifest))
    return clients.opened[spec.name][1], manifest, used


def _tuning(spec: ModelSpec) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "tuning",
                spec.name,
                description=f"Optuna study over time-ordered folds for `{spec.name}`; a killed study goes on where it stopped.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("training_set", spec.name))],
                condition=conditions.after_gates(),
            )
        ],
        name=f"tuning_{spec.name}",
    )
    def tuning(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
        result = run_study(context, platform.clients, spec)
        trials = [(t.number, t.state, "" if t.value is None else t.value, json.dumps(dict(t.params))) for t in result.trials]
        return dg.MaterializeResult(
            metadata={
                "study": result.study,
                result.metric: result.best_value,
                "best_params": dg.MetadataValue.json(dict(result.best_params)),
                "trials": dg.MetadataValue.md(md_table(("trial", "state", result.metric, "parameters"), trials)),
                "importances": dg.MetadataValue.json(dict(result.importances)),
                "history": picture(plots.optimization_history(result), "trials"),
            }
        )

    return tuning


def run_study(context: dg.AssetExecutionContext, clients: Clients, spec: ModelSpec) -> TuningResult:
    """Runs the study, or reads it where it is complete already (a finished study costs no new trial)."""
    data, manifest, used = open_training_set(clients, spec)
    return tune(
        used,
        data,
        trainers.get(spec.trainer),
        storage=clients.settings.optuna_uri,
        training_set_hash=manifest.content_hash,
        resources=fit_resources(clients, spec, manifest),
        workers=clients.settings.tuning_workers,
        on_trial=lambda trial, done, wanted: context.log.info(f"trial {done} of {wanted}: {trial.state} {trial.value}"),
    )


def _model(catalog: Catalog, spec: ModelSpec, plans: Mapping[str, ViewPlan]) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            policy.spec(
                "model",
                spec.name,
                description=f"{spec.description}\n\nA version in the MLflow registry, in a native format; it serves once promoted.",
                owner=spec.owner,
                deps=[dg.AssetDep(policy.key("tuning", spec.name)), dg.AssetDep(policy.key("training_set", spec.name))],
                condition=conditions.after_gates(),
                extra_kinds=frozenset({trainers.get(spec.trainer).framework}),
            )
        ],
        name=f"model_{spec.name}",
        # Resources by key: dagster-mlflow's is of the old kind, and the two ways do not mix in one asset.
        required_resource_keys={"mlflow", "platform"},
    )
    def model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from mlplatform.clients.registry import NewVersion

        clients: Clients = context.resources.platform.clients
        result = run_study(context, clients, spec)
        data, manifest, used = open_training_set(clients, spec)
        trainer = trainers.get(spec.trainer)
        resources = fit_resources(clients, spec, manifest)
        made_of = ingredients(spec, plans, request_functions(catalog), result.best_params, resources, clients.settings.code_version)
        trained = fitting.fit(used, data, trainer, result.best_params, resources)
        with tempfile.TemporaryDirectory() as folder:
            saved = fitting.save(trained.fitted, Path(folder))
            contract = build_contract(
                used,
                data,
                trained,
                saved,
                framework=trainer.framework,
                tolerance=trainer.tolerance(used.quantiles),
                views=[view_layout(p.name, p.join_keys, p.features, p.ttl, p.recipe) for p in plans.values()],
                functions=request_functions(catalog),
                training_set_hash=manifest.content_hash,
                project=ONLINE_PROJECT,
            )
            curves = plots.learning_curves(trained.curves, trained.fitted.rounds)
            importance = plots.feature_importance(trained.fitted.importances)
            version = clients.registry.log_version(
                NewVersion(
                    contract=contract,
                    manifest=manifest,
                    files=Path(folder),
                    params=trained.fitted.params,
                    metrics={"rounds": trained.fitted.rounds, f"validation_{fitting.default_metric(used)}": trained.score},
                    curves=trained.curves,
                    plots={"learning_curves": curves, "feature_importance": importance, "trials": plots.optimization_history(result)},
                    tags={
                        **version_tags(manifest, context.run.run_id, context.run.tags.get(ACTOR) or clients.settings.acts_as),
                        INGREDIENTS_TAG: json.dumps(made_of, sort_keys=True),
                    },
                ),
                run_id=context.resources.mlflow.active_run().info.run_id,
            )
        # The version is registered: nothing is left to go on with.
        shutil.rmtree(resources.folder or "", ignore_errors=True)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(contract.model_sha256[:16]),
            metadata={
                "version": version.version,
                "mlflow": dg.MetadataValue.url(clients.registry.model_ui_url(version) or without_password(clients.settings.mlflow_uri)),
                "model_sha256": contract.model_sha256,
                "inputs": len(contract.features),
                **numbers({"rounds": trained.fitted.rounds, f"validation_{fitting.default_metric(used)}": trained.score}),
                "learning_curves": picture(curves, "learning curves"),
                "importance": picture(importance, "feature importance"),
            },
        )

    return model


def fit_resources(clients: Clients, spec: ModelSpec, manifest: TrainingManifest) -> Resources:
    """What a fit of the model may use; a killed one goes on from its folder, which belongs to one training set."""
    settings = clients.settings
    folder = settings.home.absolute() / "fits" / spec.name / manifest.content_hash[:12]
    device = clients.device_for(trainers.get(spec.trainer).framework)
    return Resources(device=device, workers=settings.training_workers, folder=folder, engine=clients.engine)


def service_views(clients: Clients, spec: ModelSpec) -> set[str]:
    """The names of the feature views behind the model's feature service."""
    service = clients.feature_store.get_feature_service(spec.feature_service)
    return {projection.name for projection in service.feature_view_projections}


def service_columns(clients: Clients, spec: ModelSpec) -> list[str]:
    """The feature columns of the model's feature service, in its declared order."""
    service = clients.feature_store.get_feature_service(spec.feature_service)
    return [feature.name for projection in service.feature_view_projections for feature in projection.features]


def request_functions(catalog: Catalog) -> tuple[RequestFunction, ...]:
    found: tuple[RequestFunction, ...] = importlib.import_module(f"{catalog.feature_package}.request_functions").REQUEST_FUNCTIONS
    return found


def definition_sources(catalog: Catalog, plans: Mapping[str, ViewPlan]) -> list[str]:
    """What decides the features' values: the fingerprints of the views and the sources of the request functions."""
    return [f"{p.name}:{p.fingerprint}" for p in plans.values()] + [inspect.getsource(f.function) for f in request_functions(catalog)]


def version_tags(manifest: TrainingManifest, run_id: str, trained_by: str) -> dict[str, str]:
    commit, dirty = code_version(os.environ.get("MLPLATFORM_CODE_VERSION", ""))
    return {
        "training_set_hash": manifest.content_hash,
        "definition_hash": manifest.definition_hash,
        "delta_versions": json.dumps({t: v[1] for t, v in manifest.delta_versions.items()}, sort_keys=True),
        "feature_fingerprints": json.dumps(dict(manifest.feature_fingerprints), sort_keys=True),
        "dagster_run_id": run_id,
        TRAINED_BY_TAG: trained_by,
        "code_commit": commit,
        "code_dirty": str(dirty).lower(),
    }
