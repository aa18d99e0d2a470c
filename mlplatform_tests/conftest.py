"""What tests of several folders share: the asset graph, loaded once a session because importing Feast takes seconds."""

import os
import warnings

# Before Feast, which sets a variable at its import that puts this library into multi-process mode for good.
import prometheus_client  # noqa: F401
import pytest
from hypothesis import settings

# How long one example takes tells of what else this machine does, not of the code.
settings.register_profile("mlplatform", deadline=None)
settings.load_profile("mlplatform")

# Read when the libraries are imported, so before any of them: nothing of a test run calls home.
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "yes")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# Threads that spin while they wait for each other take the cores from the other worker's tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def feast_imported() -> None:
    """Feast, with the filters for warnings as they were: at its import it asks for every deprecation to be printed once,
    which would let those pass that are errors here."""
    with warnings.catch_warnings():
        import feast  # noqa: F401


@pytest.fixture(scope="session")
def definitions(feast_imported: None) -> object:
    """The definitions Dagster loads (`dg.Definitions`), with every catalog of the installation."""
    from mlplatform.catalog.discover import catalogs
    from mlplatform.orchestration.build import build

    return build(catalogs())
