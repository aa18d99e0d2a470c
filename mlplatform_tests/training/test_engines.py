"""The choice of an engine: what is refused, and that the one that is not chosen costs nothing."""

import importlib.util
import subprocess
import sys

import pytest

from mlplatform.orchestration.assets.training import fit_resources
from mlplatform.orchestration.ingredients import CIRCUMSTANCES, ingredients
from mlplatform.orchestration.resources import Clients
from mlplatform.records import TrainingManifest
from mlplatform.settings import Settings
from mlplatform.training import engines
from mlplatform.training.engines import Engine, EngineError
from mlplatform.training.trainers.base import Resources


def test_without_ray_the_mend_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'mlplatform\[ray\]'"), engines.caller(Resources(engine=Engine("ray")), 0) as call:
        call(len, "")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ENGINE": "spark"}, "'local' or 'ray'"),
        ({"RAY_ADDRESS": "ray://head:10001"}, "no address as HOST:PORT"),
        ({"RAY_ADDRESS": "head"}, "no address as HOST:PORT"),
        ({"ENGINE": "ray", "DEVICE": "cuda:1"}, "MLPLATFORM_DEVICE may be auto, cpu or cuda"),
    ],
)
def test_settings_no_engine_can_follow_are_refused(monkeypatch, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(f"MLPLATFORM_{name}", value)
    with pytest.raises(ValueError, match=told):
        Settings()


def test_what_the_settings_say_reaches_the_fit_and_the_record(monkeypatch, spec):
    monkeypatch.setenv("MLPLATFORM_ENGINE", "ray")
    monkeypatch.setenv("MLPLATFORM_RAY_ADDRESS", "[fd00::1]:6379")
    clients = Clients(Settings())
    used = fit_resources(clients, spec, TrainingManifest("breakdown", "breakdown_v1", 0, 0, (), "abc", {}, "def", {}, {}, 0.5, {}))
    assert used.engine == Engine("ray", "[fd00::1]:6379")
    assert ingredients(spec, {}, (), {}, used)["engine"] == "ray"
    assert "engine" in CIRCUMSTANCES


def test_ray_is_imported_only_where_it_was_chosen():
    code = "import sys; import mlplatform.training.tuning, mlplatform.training.fitting; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
