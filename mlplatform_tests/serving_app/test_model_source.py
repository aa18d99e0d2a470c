"""The cache of verified versions: what is stored is what is loaded, or nothing is."""

from pathlib import Path

import pytest

from mlplatform.contracts import CONTRACT_FILE, CanaryRule, TrafficRules
from serving_app.lineup import Lineup
from serving_app.model_handle import VersionRef
from serving_app.model_source import ModelCache

REF = VersionRef("basket", 1, "test")


@pytest.fixture
def cache(make_model, tmp_path) -> ModelCache:
    """A cache under a service's home with one good version, in production."""
    made = ModelCache(tmp_path / "serving" / "models")
    made.store(REF, make_model().files)
    made.remember("basket", Lineup(REF))
    return made


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95junk.")


def other_default(path: Path) -> None:
    """Still a valid contract, for the same model file, with the same examples; only what stands in for a missing value is another."""
    text = path.read_text()
    assert '"orders":5.0' in text
    path.write_text(text.replace('"orders":5.0', '"orders":6.0'))


@pytest.mark.parametrize(
    ("name", "spoil"), [(n, s) for n in (CONTRACT_FILE, "model.ubj") for s in (cut, flip, pickle)] + [(CONTRACT_FILE, other_default)]
)
def test_a_file_altered_in_the_cache_is_not_loaded(cache, open_service, name, spoil) -> None:
    spoil(cache.folder(REF) / name)
    client = open_service(wait=False, serving_models="basket")
    while "was refused" not in (told := client.get("/health/ready")).text:
        assert told.status_code == 503
    assert f"{name} in the cache is not the file that was stored" in told.json()["detail"]
    assert client.post("/v1/models/basket/predict", json={"inputs": [{}]}).status_code == 503


def test_an_untouched_cache_is_loaded(cache, open_service) -> None:
    assert open_service().get("/v1/models/basket").json()["version"] == 1


def test_a_file_that_is_gone_from_the_cache_is_told(cache, open_service) -> None:
    (cache.folder(REF) / "model.ubj").unlink()
    client = open_service(wait=False, serving_models="basket")
    while "the model cache cannot be used" not in (told := client.get("/health/ready")).text:
        assert told.status_code == 503


def test_what_was_asked_for_is_remembered_whole(cache) -> None:
    refs = [VersionRef("basket", number, f"s{number}") for number in (1, 2, 3)]
    lineup = Lineup(refs[0], refs[1], refs[2], TrafficRules(canary=CanaryRule(weight=5)))
    cache.remember("basket", lineup)
    assert cache.remembered("basket") == lineup
    assert cache.models() == ["basket"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"version": 1, "source": "test"}', Lineup(REF)),  # as services wrote it before there were rules
        ('{"version": 1, "source": "test", "traffic": {"canary": {"weight": 500}}, "canary": 7}', Lineup(REF)),
        ('{"version": 1, "source": "test", "arms": [null, null]}', Lineup(REF)),
        ("{", None),
        ("[]", None),
        ('{"version": "1"}', None),
    ],
)
def test_what_cannot_be_read_is_not_remembered(cache, tmp_path, text, wanted) -> None:
    (tmp_path / "serving" / "models" / "basket" / "serving.json").write_text(text)
    assert cache.remembered("basket") == wanted
