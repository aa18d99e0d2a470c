"""A model's files as MLflow stores them: native formats, verified, never pickle.

Belongs here: writing the folder of a logged model, and its hash. Does not belong here: the registry's service.
"""

import hashlib
import shutil
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final

from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema

from mlplatform.contracts import ServingContract

_PICKLES: Final = (".pkl", ".pickle", ".joblib", ".pt", ".pth")


class RegistryError(RuntimeError):
    """The registry cannot do what was asked, and says why."""


class NoServerError(RegistryError):
    """The files are an MLflow server's to give, and only its database is at hand."""


class CorruptModelError(RegistryError):
    """Stored files are not what the contract says."""


def write(folder: Path, contract: ServingContract, files: Path, run_id: str, model_id: str) -> None:
    """Makes `folder` an MLflow model around the contract's model file in `files`.

    Raises RegistryError for a framework nobody taught it, CorruptModelError where the written file is not the contract's.
    """
    if contract.framework == "torch":
        _write_torch(folder, contract, files, run_id, model_id)
    elif contract.framework == "xgboost":
        _write_xgboost(folder, contract, files, run_id, model_id)
    else:
        raise RegistryError(f"no way to log a model of framework '{contract.framework}' is known")
    verify((folder / contract.model_file).read_bytes(), contract)
    _refuse_pickle(folder)


def _write_torch(folder: Path, contract: ServingContract, files: Path, run_id: str, model_id: str) -> None:
    """The folder as it is, with MLflow's description of it and no flavour: MLflow's own for torch would unpickle to load it."""
    folder.mkdir(parents=True)
    for path in sorted(files.iterdir()):
        shutil.copyfile(path, folder / path.name)
    described = Model(run_id=run_id, model_id=model_id, signature=_signature(contract))
    described.add_flavor("mlplatform", framework=contract.framework, model_file=contract.model_file)
    described.save(str(folder / "MLmodel"))


def _signature(contract: ServingContract) -> ModelSignature:
    answers = contract.quantile_names or ("probability",)
    return ModelSignature(
        inputs=Schema([ColSpec("double", f.name, required=False) for f in contract.features]),
        outputs=Schema([ColSpec("double", name) for name in answers]),
    )


def _write_xgboost(folder: Path, contract: ServingContract, files: Path, run_id: str, model_id: str) -> None:
    # Here, not at the top: the flavour's import takes another second, and reading the registry does not need it.
    with warnings.catch_warnings():
        # MLflow warns about its own type hints while it is imported.
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
    import mlflow.xgboost
    import xgboost

    booster = xgboost.Booster()
    booster.load_model(files / contract.model_file)
    # Signature and requirements given: MLflow would otherwise spend seconds inferring them in a subprocess.
    mlflow.xgboost.save_model(
        booster,
        str(folder),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        signature=_signature(contract),
        pip_requirements=[f"xgboost=={xgboost.__version__}", f"numpy=={installed_version('numpy')}"],
        model_format="ubj",
    )


def verify(content: bytes, contract: ServingContract) -> None:
    """Raises CorruptModelError where `content` is not the model file the contract names."""
    found = hashlib.sha256(content).hexdigest()
    if found != contract.model_sha256:
        raise CorruptModelError(
            f"{contract.model_file} of {contract.model} has SHA-256 {found[:12]}…, its contract says {contract.model_sha256[:12]}…"
        )


def require_server(uri: str, server: bool) -> None:
    """Raises NoServerError for files that only an MLflow server can give, where what one talks to is its database (not `server`)."""
    if uri.startswith("mlflow-artifacts:") and not server:
        raise NoServerError("the version's files lie behind the MLflow server, which does not run")


def _refuse_pickle(folder: Path) -> None:
    if pickles := [p.name for p in folder.rglob("*") if p.suffix in _PICKLES]:
        raise RegistryError(f"models are stored without pickle, but {pickles} would be logged")
