"""Models in MLflow: logging a version, aliases, tags, and files whose hashes are verified.

Belongs here: the MLflow client, and what its errors mean. Does not belong here: deciding which version serves.
Unknown is None, failure raises. Nothing global of MLflow is touched (no active run, no tracking URI): several registries
may be open in one process, in threads.
"""

import json
import os
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion as MlflowModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.exc import SQLAlchemyError

from mlplatform.addresses import with_credentials_apart, without_password
from mlplatform.clients import model_files
from mlplatform.clients.model_files import CorruptModelError, RegistryError
from mlplatform.contracts import CONTRACT_FILE, ServingContract
from mlplatform.records import ModelVersion, TrainingManifest

MANIFEST_FILE: Final = "training_manifest.json"
_BATCH: Final = 1000  # MLflow refuses more metrics in one call


class RegistryUnreachableError(RegistryError):
    """The MLflow server does not answer."""


class UnreadableStoreError(RegistryError):
    """The database that MLflow keeps its models in cannot be opened."""


class UnknownModelError(RegistryError, LookupError):
    """No such model, version or alias."""


@dataclass(frozen=True)
class NewVersion:
    """What is to be logged. `files` holds the model file the contract names. `curves` are logged as metrics with a step per
    round; `plots` are PNG bytes by name. `tags` go on the run and on the version."""

    contract: ServingContract
    manifest: TrainingManifest
    files: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    plots: Mapping[str, bytes] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """An MLflow tracking server by URL, or a database by URL (`sqlite:////…/mlflow.db`, its artifacts beside it)."""

    def __init__(self, tracking_uri: str, timeout_s: float = 5.0) -> None:
        self.tracking_uri = tracking_uri.rstrip("/")
        self._timeout_s = timeout_s
        self._opened: MlflowClient | None = None

    # --- writing -------------------------------------------------------------------------------------------------

    def ensure_experiment(self, name: str) -> str:
        """The experiment's id; made where missing. Call it before anything else starts runs in it (dagster-mlflow would
        otherwise make it with its artifacts in the working directory)."""
        with self._client() as client:
            found = client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(client.create_experiment(name, artifact_location=self._artifact_location(name)))
            except MlflowException as refused:
                # Another process made it between the two calls.
                if refused.error_code == "RESOURCE_ALREADY_EXISTS" and (made := client.get_experiment_by_name(name)):
                    return str(made.experiment_id)
                raise

    def log_version(self, new: NewVersion, run_id: str | None = None) -> ModelVersion:
        """Logs and registers a version, without pickle, and without an alias: it serves only once one is set.

        `run_id` is an MLflow run the caller has open; without it a run is made, in the experiment named after the model.
        The version appears in the registry only when all its files are there. Raises CorruptModelError where the model
        file is not the contract's.
        """
        contract = new.contract
        experiment = None if run_id else self.ensure_experiment(contract.model)
        with self._client() as client:
            run = client.get_run(run_id) if run_id else client.create_run(experiment, run_name=f"train {contract.model}")
            finished = False
            try:
                model_id = self._log_files(client, run.info.experiment_id, run.info.run_id, new)
                self._log_run(client, run.info.run_id, model_id, new)
                version = self._register(client, run.info.run_id, model_id, new)
                finished = True
            finally:
                if run_id is None:
                    client.set_terminated(run.info.run_id, "FINISHED" if finished else "FAILED")
            return self._record(version, {})

    def set_alias(self, model: str, alias: str, version: int) -> None:
        with self._client() as client, _unknown(model, version):
            client.set_registered_model_alias(model, alias, str(version))

    def delete_alias(self, model: str, alias: str) -> None:
        """Removes an alias; one that is not there is no error."""
        with self._client() as client, _unknown(model):
            client.delete_registered_model_alias(model, alias)

    def set_model_tag(self, model: str, key: str, value: str) -> None:
        """A tag of the registered model itself, not of a version. Raises UnknownModelError."""
        with self._client() as client, _unknown(model):
            client.set_registered_model_tag(model, key, value)

    def set_tags(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        with self._client() as client, _unknown(version.model, version.version):
            for key, value in tags.items():
                client.set_model_version_tag(version.model, str(version.version), key, value)

    def log_metrics(self, version: ModelVersion, metrics: Mapping[str, float], plots: Mapping[str, bytes] | None = None) -> None:
        """Adds metrics and plots to the version's run, as an evaluation does later."""
        with self._client() as client:
            at = int(time.time() * 1000)
            client.log_batch(version.run_id, metrics=[Metric(k, float(v), at, 0) for k, v in metrics.items()])
            _log_plots(client, version.run_id, plots or {})

    # --- reading -------------------------------------------------------------------------------------------------

    def models(self) -> tuple[str, ...]:
        """The names of all registered models."""
        with self._client() as client:
            return tuple(m.name for m in _all_pages(client.search_registered_models))

    def by_alias(self, model: str, alias: str) -> ModelVersion | None:
        """The version that carries the alias; None where the model or the alias is unknown."""
        with self._client() as client:
            try:
                found = client.get_model_version_by_alias(model, alias)
            except MlflowException as refused:
                if _is_unknown(refused):
                    return None
                raise
            return self._record(found, {alias: int(found.version)})

    def version(self, model: str, version: int) -> ModelVersion:
        """One version with its aliases. Raises UnknownModelError."""
        with self._client() as client, _unknown(model, version):
            return self._record(client.get_model_version(model, str(version)), self._aliases(client, model))

    def model_tags(self, model: str) -> dict[str, str]:
        """The tags of the registered model itself. Raises UnknownModelError."""
        with self._client() as client, _unknown(model):
            return dict(client.get_registered_model(model).tags)

    def versions(self, model: str) -> tuple[ModelVersion, ...]:
        """All versions, newest first. Raises UnknownModelError for a model that was never registered."""
        with self._client() as client, _unknown(model):
            aliases = self._aliases(client, model)
            found = _all_pages(client.search_model_versions, filter_string=f"name='{model}'")
            return tuple(sorted((self._record(v, aliases) for v in found), key=lambda v: -v.version))

    def metrics_of(self, version: ModelVersion) -> dict[str, float]:
        """The last value of every metric of the version's run."""
        with self._client() as client, _unknown(version.model, version.version, "run of "):
            return {k: float(v) for k, v in client.get_run(version.run_id).data.metrics.items()}

    def params_of(self, version: ModelVersion) -> dict[str, str]:
        with self._client() as client, _unknown(version.model, version.version, "run of "):
            return dict(client.get_run(version.run_id).data.params)

    def contract_of(self, version: ModelVersion) -> ServingContract:
        return ServingContract.model_validate_json(self._read(version, CONTRACT_FILE))

    def manifest_of(self, version: ModelVersion) -> dict[str, Any]:
        """The training manifest as JSON gives it."""
        content: dict[str, Any] = json.loads(self._read(version, MANIFEST_FILE))
        return content

    def download(self, version: ModelVersion, into: Path) -> Path:
        """The version's contract, manifest and model file in `into` (made where missing), the model file's hash verified.

        Raises CorruptModelError where the file is not the contract's; nothing usable is left behind then.
        """
        into.mkdir(parents=True, exist_ok=True)
        contract = self.contract_of(version)
        content = self._read(version, contract.model_file)
        model_files.verify(content, contract)
        (into / contract.model_file).write_bytes(content)
        (into / MANIFEST_FILE).write_bytes(self._read(version, MANIFEST_FILE))
        (into / CONTRACT_FILE).write_text(contract.canonical_json())
        return into

    def model_ui_url(self, version: ModelVersion) -> str | None:
        """The version's page in the MLflow UI; None where there is no server."""
        return f"{self._shown}/#/models/{version.model}/versions/{version.version}" if self._is_server else None

    def run_ui_url(self, version: ModelVersion) -> str | None:
        """The page of the training run in the MLflow UI; None where there is no server."""
        if not self._is_server:
            return None
        with self._client() as client:
            experiment = client.get_run(version.run_id).info.experiment_id
        return f"{self._shown}/#/experiments/{experiment}/runs/{version.run_id}"

    def check(self) -> None:
        """Raises RegistryUnreachableError where the server does not answer within the time limit."""
        if not self._is_server:
            return
        address, credentials = with_credentials_apart(f"{self.tracking_uri}/health")
        asked = urllib.request.Request(address, headers=credentials)  # noqa: S310 - http(s) only
        try:
            with urllib.request.urlopen(asked, timeout=self._timeout_s) as answer:  # noqa: S310 - as above
                answer.read()
        except (OSError, HTTPException) as down:
            why = getattr(down, "reason", None) or down
            raise RegistryUnreachableError(f"the MLflow server at {self._shown} does not answer: {why}") from down

    # --- inside --------------------------------------------------------------------------------------------------

    @property
    def _is_server(self) -> bool:
        return self.tracking_uri.startswith(("http://", "https://"))

    @property
    def _shown(self) -> str:
        """The address as links and messages may carry it; a browser asks for the password itself."""
        return without_password(self.tracking_uri)

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        # MLflow's own client retries a dead server for minutes; one look at its health page tells at once.
        self.check()
        if self._opened is None:
            self._opened = self._open()
        try:
            yield self._opened
        except MlflowException as fault:
            # MLflow's client wraps what its HTTP library says, and has no class for it (3.17).
            if "failed with exception" in str(fault) and "/api/" in str(fault):
                raise RegistryUnreachableError(
                    f"the MLflow server at {self._shown} answers its health page, but no question in time"
                ) from fault
            raise

    def _open(self) -> MlflowClient:
        # Progress bars and links for a notebook would fill the logs of a service; the environment has the last word.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        if folder := self._folder():
            folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # On a database, the client sets up MLflow's tables, whose declarations SQLAlchemy 2.1 finds out of date.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
                if folder:
                    client.search_experiments(max_results=1)
                    client.search_registered_models(max_results=1)
            except SQLAlchemyError as refused:
                why = str(refused).splitlines()[0]
                raise UnreadableStoreError(f"MLflow's store {self._shown} cannot be read: {why}") from refused
        return client

    def _folder(self) -> Path | None:
        return Path(self.tracking_uri.removeprefix("sqlite:///")).parent if self.tracking_uri.startswith("sqlite:///") else None

    def _artifact_location(self, experiment: str) -> str | None:
        # A database on its own would put artifacts under the working directory of whoever comes first.
        folder = self._folder()
        return str(folder.absolute() / "artifacts" / experiment) if folder else None

    def _log_files(self, client: MlflowClient, experiment: str, run_id: str, new: NewVersion) -> str:
        """Uploads the model's folder as an MLflow logged model and returns its id."""
        contract = new.contract
        model_files.verify((new.files / contract.model_file).read_bytes(), contract)
        logged = client.create_logged_model(
            experiment, name=contract.model, source_run_id=run_id, params=_texts(new.params), model_type=contract.task
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            model_files.write(folder, contract, new.files, run_id, logged.model_id)
            (folder / CONTRACT_FILE).write_text(contract.canonical_json())
            (folder / MANIFEST_FILE).write_text(json.dumps(new.manifest.to_dict(), sort_keys=True))
            client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def _log_run(self, client: MlflowClient, run_id: str, model_id: str, new: NewVersion) -> None:
        at = int(time.time() * 1000)
        metrics = [Metric(name, float(value), at, 0, model_id=model_id) for name, value in new.metrics.items()]
        metrics += [Metric(name, float(v), at, step) for name, values in new.curves.items() for step, v in enumerate(values)]
        client.log_batch(
            run_id,
            params=[Param(k, v) for k, v in _texts(new.params).items()],
            tags=[RunTag(k, v) for k, v in self._version_tags(new).items()],
        )
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        _log_plots(client, run_id, new.plots)
        client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])

    def _register(self, client: MlflowClient, run_id: str, model_id: str, new: NewVersion) -> MlflowModelVersion:
        contract = new.contract
        try:
            client.create_registered_model(contract.model, description=contract.description)
        except MlflowException as refused:
            if refused.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Without a server MLflow 3.17 looks a `models:/` source up through its global tracking URI, which is not ours to set.
        source = f"models:/{model_id}" if self._is_server else client.get_logged_model(model_id).artifact_location
        return client.create_model_version(
            contract.model, source=source, run_id=run_id, model_id=model_id, tags=self._version_tags(new), await_creation_for=0
        )

    def _version_tags(self, new: NewVersion) -> dict[str, str]:
        return {
            "training_set_hash": new.manifest.content_hash,
            "definition_hash": new.manifest.definition_hash,
            "delta_versions": json.dumps({table: list(v) for table, v in new.manifest.delta_versions.items()}, sort_keys=True),
            "model_sha256": new.contract.model_sha256,
            "contract_digest": new.contract.digest(),
            **new.tags,
        }

    def _aliases(self, client: MlflowClient, model: str) -> dict[str, int]:
        return {alias: int(version) for alias, version in client.get_registered_model(model).aliases.items()}

    def _record(self, version: MlflowModelVersion, aliases: Mapping[str, int]) -> ModelVersion:
        number = int(version.version)
        return ModelVersion(
            model=version.name,
            version=number,
            run_id=version.run_id or "",
            source=version.source,
            created_at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            aliases=tuple(sorted({alias for alias, n in aliases.items() if n == number}.union(version.aliases or ()))),
            tags=dict(version.tags or {}),
        )

    def _read(self, version: ModelVersion, name: str) -> bytes:
        """One file beside the model. Raises CorruptModelError where the version lacks it."""
        with self._client() as client, _unknown(version.model, version.version), tempfile.TemporaryDirectory() as scratch:
            uri = client.get_model_version_download_uri(version.model, str(version.version))
            model_files.require_server(uri, self._is_server)
            repository = get_artifact_repository(uri, tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
            if name not in {entry.path for entry in repository.list_artifacts()}:
                raise CorruptModelError(f"version {version.version} of {version.model} has no file {name}")
            return Path(repository.download_artifacts(name, dst_path=scratch)).read_bytes()


def _log_plots(client: MlflowClient, run_id: str, plots: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name, png in plots.items():
            path = Path(scratch) / f"{name}.png"
            path.write_bytes(png)
            client.log_artifact(run_id, os.fspath(path), "plots")


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _is_unknown(refused: MlflowException) -> bool:
    # An alias that is not there is answered with INVALID_PARAMETER_VALUE (MLflow 3.17), not with "does not exist".
    missing_alias = refused.error_code == "INVALID_PARAMETER_VALUE" and "alias" in str(refused) and "not found" in str(refused)
    return refused.error_code == "RESOURCE_DOES_NOT_EXIST" or missing_alias


@contextmanager
def _unknown(model: str, version: int | None = None, of: str = "") -> Iterator[None]:
    """`of`: what is asked for of the version, where it is not the version itself."""
    try:
        yield
    except MlflowException as refused:
        if not _is_unknown(refused):
            raise
        what = f"model '{model}'" if version is None else f"version {version} of model '{model}'"
        raise UnknownModelError(f"the registry knows no {of}{what}") from refused


def _all_pages(search: Any, **arguments: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = search(page_token=token, max_results=1000 if "filter_string" not in arguments else 10_000, **arguments)
        found += page
        token = page.token
        if not token:
            return found
