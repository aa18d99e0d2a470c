"""The torch family: no crossing quantiles, the same file for the same seed and world size, and a fit that outlives its ranks."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlplatform.training.dataset import to_matrix
from mlplatform.training.trainers.base import Resources, Target, cuda_devices
from mlplatform.training.trainers.torch_tabular import EXPORT_FILE, MODEL_FILE, TRAINER

QUANTILES = Target((0.1, 0.5, 0.9))
SMALL = {"width": 16, "depth": 1}


@pytest.fixture(scope="module")
def parts(dataset):
    return [to_matrix(dataset.part(p), dataset.numeric, dataset.categories()) for p in ("train", "validate", "test")]


@pytest.fixture(scope="module")
def delays(parts):
    """The same rows with a label that is a number: a signal, and noise that grows with another column."""
    rng = np.random.default_rng(3)

    def label(m):
        x = np.nan_to_num(m.values)
        return replace(m, label=20 * x[:, 0] + (5 + 10 * (x[:, 1] > 0)) * rng.normal(size=m.rows))

    return [label(m) for m in parts]


def fit(matrices, target=None, params=None, **given):
    metric = "pinball" if target else "log_loss"
    resources = Resources(threads=1, **given)
    return TRAINER.fit(SMALL | (params or {}), *matrices[:2], seed=7, target=target or Target(), metric=metric, resources=resources)


@pytest.fixture(scope="module")
def classifier(parts):
    return fit(parts, params={"learning_rate": 1e-2})


@pytest.fixture(scope="module")
def quantiles(delays):
    return fit(delays, QUANTILES, {"learning_rate": 1e-2})


def test_it_learns_a_probability(classifier, parts):
    p, y = classifier.predict(parts[2].values), parts[2].label
    constant = np.full(len(y), parts[0].label.mean())
    assert p.shape == y.shape
    assert _log_loss(y, p) < 0.95 * _log_loss(y, constant)
    assert max(classifier.importances, key=classifier.importances.__getitem__) == "x0"
    assert sum(classifier.importances.values()) == pytest.approx(1)


def test_it_learns_quantiles_that_follow_the_spread(quantiles, delays):
    test = delays[2]
    answers = quantiles.predict(test.values)
    assert answers.shape == (test.rows, 3)
    below = (test.label[:, None] <= answers).mean(axis=0)
    assert below == pytest.approx([0.1, 0.5, 0.9], abs=0.1)
    width = answers[:, 2] - answers[:, 0]
    wide = np.nan_to_num(test.values)[:, 1] > 0
    assert width[wide].mean() > 1.2 * width[~wide].mean()


def test_quantiles_never_cross_whatever_comes_in(quantiles):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5000, 7)) * 10.0 ** rng.integers(-3, 30, (5000, 1))
    values[rng.random(values.shape) < 0.3] = np.nan
    answers = quantiles.predict(values)
    assert np.isfinite(answers).all()
    assert (np.diff(answers, axis=1) >= 0).all()


def test_a_category_never_seen_is_answered_as_unknown(classifier, parts):
    row = parts[2].values[:1].copy()
    answers = []
    for code in (np.nan, 99.0, -5.0):
        row[0, -1] = code
        answers.append(classifier.predict(row)[0])
    assert answers[0] == answers[1] == answers[2]


def test_the_same_seed_gives_the_same_file_and_leaves_the_callers_random_numbers_alone(classifier, parts, tmp_path):
    import torch

    torch.manual_seed(5)
    again = fit(parts, params={"learning_rate": 1e-2})
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert _sha(again, tmp_path / "a") == _sha(classifier, tmp_path / "b")


def test_the_file_is_data_only_and_predicts_the_same_bits(quantiles, delays, tmp_path):
    from mlplatform.networks import NetworkFileError, from_bytes, predict

    quantiles.save(tmp_path)
    raw = (tmp_path / MODEL_FILE).read_bytes()
    values = delays[2].values
    assert np.array_equal(predict(from_bytes(raw), values).astype(np.float64), quantiles.predict(values))
    for broken in (b"", raw[:100], b"\x80\x04" + raw, raw.replace(b'\\"width\\": 16', b'\\"width\\": 17')):
        with pytest.raises(NetworkFileError):
            from_bytes(broken)


def test_the_pt2_beside_it_answers_alike_and_its_weights_are_no_pickles(quantiles, delays, tmp_path):
    import torch

    quantiles.save(tmp_path)
    values = torch.from_numpy(delays[2].values.astype(np.float32))
    module = torch.export.load(tmp_path / EXPORT_FILE).module()
    np.testing.assert_allclose(module(values).detach().numpy(), quantiles.predict(delays[2].values), rtol=1e-4, atol=1e-4)
    with zipfile.ZipFile(tmp_path / EXPORT_FILE) as archive:
        (config,) = [n for n in archive.namelist() if n.endswith("model_weights_config.json")]
        assert not any(entry["use_pickle"] for entry in json.loads(archive.read(config))["config"].values())


def test_early_stopping_keeps_the_best_epoch(classifier, parts):
    curve = classifier.curves["validate_log_loss"]
    assert classifier.rounds == int(np.argmin(curve)) + 1
    assert classifier.score == min(curve)
    assert _log_loss(parts[1].label, classifier.predict(parts[1].values)) == pytest.approx(classifier.score, rel=1e-5)


def test_without_validation_rows_the_rounds_decide(parts):
    fitted = TRAINER.fit(SMALL, parts[0], None, seed=7, rounds=2, resources=Resources(threads=1))
    assert (fitted.rounds, fitted.score) == (2, None)
    with pytest.raises(ValueError, match="number of rounds"):
        TRAINER.fit(SMALL, parts[0], None, seed=7)
    with pytest.raises(ValueError, match="not one of the target"):
        TRAINER.fit(SMALL, parts[0], parts[1], seed=7, target=QUANTILES)


def test_a_fit_in_one_process_ends_where_its_caller_says(parts):
    def stop(epoch: int, value: float) -> None:
        if epoch == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        TRAINER.fit(SMALL, parts[0], parts[1], seed=7, resources=Resources(threads=1), on_round=stop)


def test_two_ranks_give_the_same_file_each_time_and_nearly_the_answers_of_one(parts, tmp_path):
    params = {"dropout": 0.0}
    one, two, again = (fit(parts, params=params, workers=w) for w in (1, 2, 2))
    assert _sha(two, tmp_path / "a") == _sha(again, tmp_path / "b")
    np.testing.assert_allclose(two.predict(parts[2].values), one.predict(parts[2].values), atol=1e-3)
    assert two.params["workers"] == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_fit_outlives_the_kill_of_any_rank_and_ends_with_the_same_file(parts, tmp_path, victim):
    undisturbed = fit(parts, workers=2)
    killed: list[int] = []

    def kill(epoch: int, value: float) -> None:
        if epoch == 2 and not killed:
            rank = _ranks(psutil.Process())[victim]
            killed.append(rank.pid)
            rank.send_signal(signal.SIGKILL)

    resources = Resources(threads=1, workers=2, folder=tmp_path / "job")
    fitted = TRAINER.fit(SMALL, *parts[:2], seed=7, resources=resources, on_round=kill)
    assert killed
    assert len(fitted.curves["validate_log_loss"]) == len(undisturbed.curves["validate_log_loss"])
    assert _sha(fitted, tmp_path / "a") == _sha(undisturbed, tmp_path / "b")


def test_under_several_ranks_a_caller_that_says_stop_ends_the_fit_without_a_hang(parts, tmp_path):
    def stop(epoch: int, value: float) -> None:
        if epoch == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        TRAINER.fit(SMALL, *parts[:2], seed=7, resources=Resources(threads=1, workers=2, folder=tmp_path / "job"), on_round=stop)
    assert not _ranks(psutil.Process())


def test_a_killed_process_leaves_no_rank_running_and_another_world_goes_on_from_its_checkpoint(parts, tmp_path):
    script = tmp_path / "killed.py"
    np.savez(tmp_path / "parts.npz", **{f"{name}{i}": getattr(m, name) for i, m in enumerate(parts[:2]) for name in ("values", "label")})
    script.write_text(KILLED)
    arguments = [
        str(tmp_path / "parts.npz"),
        str(tmp_path / "job"),
        json.dumps([list(parts[0].columns), sorted(parts[0].categorical), dict(parts[0].sizes)]),
    ]
    started = subprocess.Popen([sys.executable, str(script), *arguments], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        _wait_until(lambda: any((tmp_path / "job").glob("epoch-00002.safetensors")), started)
        ranks = _ranks(psutil.Process(started.pid))
        assert len(ranks) == 2
    finally:
        started.kill()
        started.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    resources = Resources(threads=1, folder=tmp_path / "job")
    fitted = TRAINER.fit(SMALL, *parts[:2], seed=7, resources=resources)
    assert fitted.params["workers"] == 2  # some epochs were run by two ranks, the rest by one
    assert len(fitted.curves["validate_log_loss"]) > 2


KILLED = """
import json, sys, time
import numpy as np
from mlplatform.training.trainers.base import Matrix, Resources
from mlplatform.training.trainers.torch_tabular import TRAINER

if __name__ == "__main__":
    stored = np.load(sys.argv[1])
    columns, categorical, sizes = json.loads(sys.argv[3])
    parts = [Matrix(stored[f"values{i}"], stored[f"label{i}"], tuple(columns), frozenset(categorical), sizes) for i in range(2)]
    slow = lambda epoch, value: time.sleep(1.0)
    resources = Resources(threads=1, workers=2, folder=__import__("pathlib").Path(sys.argv[2]))
    TRAINER.fit({"width": 16, "depth": 1}, *parts, seed=7, resources=resources, on_round=slow)
"""


def test_importing_the_trainer_imports_no_torch():
    code = "import sys; import mlplatform.training.trainers.torch_tabular; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False).returncode
        == 0
    )


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a CUDA device")
def test_asking_for_cuda_where_there_is_none_fails_loudly(parts):
    with pytest.raises(RuntimeError, match="cuda was asked for"):
        TRAINER.fit(SMALL, parts[0], parts[1], seed=7, resources=Resources(device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA device")
def test_a_fit_on_cuda_answers_as_its_file_does_on_the_processor(parts):
    fitted = TRAINER.fit(SMALL, parts[0], parts[1], seed=7, resources=Resources(device="cuda", threads=1))
    assert _log_loss(parts[1].label, fitted.predict(parts[1].values)) == pytest.approx(fitted.score, abs=1e-4)


def _ranks(process):
    """The ranks among a process's children, in their order."""
    return sorted((c for c in process.children() if any("spawn_main" in part for part in _command(c))), key=lambda c: c.create_time())


def _command(process: psutil.Process) -> list[str]:
    """Empty for one that has ended, of whatever test."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie's, too
        return []


def _wait_until(condition, process, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the fit ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.05)


def _sha(fitted, folder: Path) -> str:
    folder.mkdir()
    return hashlib.sha256((folder / fitted.save(folder)).read_bytes()).hexdigest()


def _log_loss(label: np.ndarray, p: np.ndarray) -> float:
    return float(-np.mean(np.where(label == 1, np.log(p), np.log(1 - p))))
