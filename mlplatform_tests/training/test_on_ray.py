"""Trials and fits on a real Ray: the same outcomes as in processes of this machine, kills included, and nothing left behind."""

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest

from mlplatform.specs import TuningSpec
from mlplatform.training import engines, fitting, tuning
from mlplatform.training.dataset import to_matrix
from mlplatform.training.engines import Engine, EngineError
from mlplatform.training.trainers.base import Resources, get
from mlplatform.training.trainers.xgboost_classifier import TRAINER, XGBoostClassifier
from mlplatform.training.trials import TrialLostError

# Not by importing it: what it reads then, the fixture sets.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")

SMALL = {"width": 16, "depth": 1}
# A cluster's head, which ends with its process.
HEAD = """
import ray, sys
print(ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=sys.argv[1],
               log_to_driver=False).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
# A study on a Ray of its own. It tells its processes once a trial has ended, and waits for a word within the next.
ALONE = """
import importlib.util, subprocess, sys
import psutil
found = importlib.util.spec_from_file_location("synthetic", sys.argv[1])
synthetic = importlib.util.module_from_spec(found)
found.loader.exec_module(synthetic)
from mlplatform.training import tuning
from mlplatform.training.engines import Engine
from mlplatform.training.trainers.base import Resources
from mlplatform.training.trainers.xgboost_classifier import TRAINER

def tell(*_):
    processes = psutil.Process().children(recursive=True)
    listening = [c.laddr.ip for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    print(*(p.pid for p in processes), "|", *sorted(set(listening)), flush=True)
    sys.stdin.readline()

# A service of the platform, say, which ends with this process: none of Ray's.
bystander = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
spec, dataset = synthetic.make_dataset()
resources = Resources(threads=1, engine=Engine("ray"))
tuning.tune(spec, dataset, TRAINER, storage=sys.argv[2], training_set_hash="abc", resources=resources, on_trial=tell)
assert bystander.poll() is None
"""


@pytest.fixture(scope="module")
def address():
    """Of a cluster on this machine that is there already, reached by its token alone."""
    ours = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as folder:
        for name, value in (ours | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": os.pathsep.join(sys.path)}).items():
            patch.setenv(name, value)
        with subprocess.Popen([sys.executable, "-c", HEAD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
            yield head.stdout.readline().strip()
            head.stdin.close()


@pytest.fixture
def on_ray(address):
    return Resources(threads=1, engine=Engine("ray", address))


IN_PROCESSES = Resources(threads=1)


@pytest.fixture(scope="module")
def undisturbed(module_spec, dataset, tmp_path_factory):
    """The study as processes of this machine end it."""
    return run(module_spec, dataset, tmp_path_factory.mktemp("here") / "j.log", IN_PROCESSES)


def run(spec, dataset, journal, resources, trainer=TRAINER, **options):
    return tuning.tune(
        spec, dataset, trainer, storage=str(journal), training_set_hash="abc", resources=resources, **({"workers": 2} | options)
    )


def finished(result):
    return [(t.params, t.value, t.state) for t in result.trials if t.state in {"complete", "pruned"}]


class OnRayOnly(XGBoostClassifier):
    """Fits in Ray's processes alone, and in none of ours."""

    def __init__(self):
        self.ours = os.getpid()

    def fit(self, *args, **kwargs):
        assert "ray" in sys.modules
        assert os.getpid() != self.ours
        return super().fit(*args, **kwargs)


class Dying(XGBoostClassifier):
    """Ends its process in the middle of its first fits, as the kernel does when memory runs out."""

    def __init__(self, folder, times):
        self.folder, self.times = folder, times

    def fit(self, *args, on_round=None, **kwargs):
        def report(round_, value):
            on_round(round_, value)
            if round_ == 10:
                die(self.folder, self.times)

        return super().fit(*args, on_round=report, **kwargs)


def die(folder, times):
    if len(list(folder.iterdir())) < times:
        (folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_study_has_the_same_trials_and_the_same_winner_as_in_processes(spec, dataset, tmp_path, on_ray, undisturbed):
    remote = run(spec, dataset, tmp_path / "ray.log", on_ray, OnRayOnly())
    assert remote == undisturbed
    assert len(finished(remote)) == spec.tuning.trials


def test_a_study_goes_on_from_one_engine_to_the_other_and_repeats_no_trial(spec, dataset, tmp_path, on_ray, undisturbed):
    short = spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"trials": 2})})
    run(short, dataset, tmp_path / "j.log", IN_PROCESSES)
    seen: list[int] = []
    both = run(spec, dataset, tmp_path / "j.log", on_ray, on_trial=lambda trial, done, wanted: seen.append(trial.number))
    assert seen == [2, 3, 4, 5]
    assert both == undisturbed
    nobody = replace(on_ray, engine=Engine("ray", "127.0.0.1:1"))
    assert run(spec, dataset, tmp_path / "j.log", nobody) == both  # nothing to do: no Ray is asked for


def test_a_trial_whose_process_is_killed_is_run_again_and_the_study_ends_the_same(spec, dataset, tmp_path, on_ray, undisturbed):
    (tmp_path / "kills").mkdir()
    killed = run(spec, dataset, tmp_path / "ray.log", on_ray, Dying(tmp_path / "kills", times=1))
    assert len(list((tmp_path / "kills").iterdir())) == 1
    assert killed == undisturbed


def test_a_trial_that_is_lost_again_and_again_ends_the_run_and_the_study_can_be_gone_on_with(spec, dataset, tmp_path, on_ray):
    (tmp_path / "kills").mkdir()
    short = spec.model_copy(update={"tuning": TuningSpec(trials=2, folds=1, max_rows=400)})
    with pytest.raises(TrialLostError, match=r"lost 4 times.*it goes on"):
        run(short, dataset, tmp_path / "j.log", on_ray, Dying(tmp_path / "kills", times=100), workers=1)
    assert len(list((tmp_path / "kills").iterdir())) == 4
    result = run(short, dataset, tmp_path / "j.log", on_ray)
    assert [t.state for t in result.trials].count("fail") == 1
    assert len(finished(result)) == 2


class Unlucky(XGBoostClassifier):
    def fit(self, *args, **kwargs):
        raise ArithmeticError("no luck")


def test_an_error_of_a_fit_comes_to_the_caller_as_it_is(spec, dataset, tmp_path, on_ray):
    with pytest.raises(ArithmeticError, match=r"^no luck$"):
        run(spec, dataset, tmp_path / "j.log", on_ray, Unlucky())
    with pytest.raises(ArithmeticError, match=r"^no luck$") as raised:
        fitting.fit(spec, dataset, Unlucky(), {}, on_ray)
    assert type(raised.value) is ArithmeticError


def test_a_trial_is_pruned_on_ray(spec, dataset, tmp_path, on_ray):
    networks = get("torch_tabular")
    small = spec.model_copy(update={"trainer": "torch_tabular", "tuning": TuningSpec(trials=4, folds=1, max_rows=1500)})
    study = optuna.create_study(
        study_name=tuning.study_name(small, networks, "abc"), storage=tuning.open_storage(str(tmp_path / "j.log")), direction="minimize"
    )
    good = {"width": 64, "depth": 1, "dropout": 0.0, "learning_rate": 3e-3, "weight_decay": 1e-2}
    for number in range(3):
        told = {"params": good, "distributions": networks.search_space(), "intermediate_values": dict.fromkeys(range(6), 0.3)}
        study.add_trial(optuna.trial.create_trial(value=0.3 + number / 100, **told))
    study.enqueue_trial(good | {"learning_rate": 3e-4})
    assert run(small, dataset, tmp_path / "j.log", on_ray, networks).trials[-1].state == "pruned"


def test_a_final_fit_is_the_same_file_as_in_this_process(spec, dataset, tmp_path, on_ray):
    here, there = (
        fitting.save(fitting.fit(spec, dataset, trainer, {"max_depth": 3}, resources).fitted, tmp_path / resources.engine.name)
        for trainer, resources in ((TRAINER, IN_PROCESSES), (OnRayOnly(), on_ray))
    )
    assert here.sha256 == there.sha256


class Once:
    """A fit's `on_round` that ends the process which asks, once."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, epoch, value):
        if epoch == 2:
            die(self.folder, 1)


def test_a_network_whose_process_is_killed_goes_on_from_its_last_epoch_and_ends_as_the_same_file(dataset, tmp_path, on_ray):
    networks = get("torch_tabular")
    parts = [to_matrix(dataset.part(p), dataset.numeric, dataset.categories()) for p in ("train", "validate")]
    (tmp_path / "kills").mkdir()
    two = replace(on_ray, workers=2, folder=tmp_path / "job")
    with engines.caller(two, 0) as call:
        there = call(networks.fit, SMALL, *parts, seed=7, resources=engines.here(two), on_round=Once(tmp_path / "kills"))
    here = networks.fit(SMALL, *parts, seed=7, resources=replace(IN_PROCESSES, workers=2))
    assert len(list((tmp_path / "kills").iterdir())) == 1
    assert there.params["workers"] == 2
    assert fitting.save(there, tmp_path / "a").sha256 == fitting.save(here, tmp_path / "b").sha256


def test_a_fit_no_machine_has_room_for_is_refused(on_ray):
    wide = replace(on_ray, workers=64)
    with pytest.raises(EngineError, match=r"asks for 64 processors and 0 GPUs.*4 processors"), engines.caller(wide, 0) as call:
        call(len, "")


def test_an_address_where_no_ray_answers_is_told_at_once():
    away = Resources(engine=Engine("ray", "127.0.0.1:1"))
    with pytest.raises(EngineError, match=r"MLPLATFORM_RAY_ADDRESS=127.0.0.1:1: no Ray answers there"), engines.caller(away, 0) as call:
        call(len, "")


def test_a_cluster_that_does_not_know_the_token_is_told(address):
    code = """
import sys
from mlplatform.training.engines import Engine, caller
from mlplatform.training.trainers.base import Resources
with caller(Resources(engine=Engine("ray", sys.argv[1])), 0) as call:
    call(print)
"""
    stranger = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = subprocess.run([sys.executable, "-c", code, address], env=stranger, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 1
    assert f"EngineError: MLPLATFORM_RAY_ADDRESS={address}: Ray does not take this process" in refused.stderr


@pytest.mark.parametrize("how", ["", "SIGINT", "SIGKILL"])
def test_a_ray_of_this_machine_is_heard_by_it_alone_and_leaves_nothing_running(tmp_path, how):
    with tempfile.TemporaryDirectory(prefix="r") as short:  # Ray's sockets lie there
        environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": short, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
        conftest = Path(__file__).parent / "conftest.py"
        command = [sys.executable, "-c", ALONE, str(conftest), str(tmp_path / "j.log")]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone:
            pids, _, heard = alone.stdout.readline().partition("|")
            processes = []
            for pid in pids.split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes.append(psutil.Process(int(pid)))
            if how:
                alone.send_signal(getattr(signal, how))
            alone.communicate("\n" * 10, timeout=120)
            assert alone.returncode == {"": 0, "SIGINT": -signal.SIGINT, "SIGKILL": -signal.SIGKILL}[how]
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert len(processes) > 3
        assert not alive
        assert {ip.removeprefix("::ffff:") for ip in heard.split()} == {"127.0.0.1"}
        assert not (tmp_path / ".ray").exists()
        assert how == "SIGKILL" or not list(Path(short).glob("ray-*"))
