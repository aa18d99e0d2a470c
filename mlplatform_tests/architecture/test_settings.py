"""Settings: each is described, and the reference page is the one that would be generated now."""

from pathlib import Path

import pytest

from mlplatform.local.docs_settings import page, platform_settings, serving_settings
from mlplatform.settings import Settings
from serving_app.settings import ServingSettings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"


@pytest.mark.parametrize("model", [Settings, ServingSettings])
def test_every_setting_says_what_it_is(model):
    assert not [name for name, field in model.model_fields.items() if not field.description]


@pytest.mark.parametrize("model", [Settings, ServingSettings])
def test_refused_settings_and_their_text_form_tell_no_secret(model, monkeypatch: pytest.MonkeyPatch):
    for name in ("redis_url", "mlflow_url", "optuna_storage", "feast_registry", "source_weather", "s3_secret_access_key"):
        monkeypatch.setenv(f"MLPLATFORM_{name.upper()}", f"{'redis' if name == 'redis_url' else 'http'}://me:hush@host/1")
    assert "hush" not in repr(model())
    monkeypatch.setenv("MLPLATFORM_PROFILE", "production")
    monkeypatch.setenv("MLPLATFORM_CLOCK", "/a/file")
    with pytest.raises(ValueError, match="unsafe settings") as refused:
        model()
    assert "hush" not in str(refused.value)


def test_the_generator_reads_the_services_settings_as_they_are():
    described = {s.variable: s.description for s in serving_settings()}
    assert described == {f"MLPLATFORM_{name.upper()}": f.description for name, f in ServingSettings.model_fields.items()}


def test_every_setting_has_a_line_on_the_page():
    text = page()
    for setting in (*platform_settings(), *serving_settings()):
        assert f"`{setting.variable}`" in text


def test_the_committed_page_is_the_generated_one():
    assert PAGE.read_text() == page(), "renew it: python -m mlplatform.local.docs_settings > docs/settings.md"


def test_settings_of_both_sides_mean_the_same_type():
    shared = set(Settings.model_fields) & set(ServingSettings.model_fields)
    for name in shared - {"profile"}:  # an enum here, a literal there
        assert Settings.model_fields[name].annotation == ServingSettings.model_fields[name].annotation, name
        assert Settings.model_fields[name].default == ServingSettings.model_fields[name].default, name


@pytest.mark.parametrize("model", [Settings, ServingSettings])
def test_a_cluster_needs_an_address_of_its_own(model, monkeypatch):
    monkeypatch.setenv("MLPLATFORM_ONLINE_CLUSTER", "true")
    with pytest.raises(ValueError, match="needs MLPLATFORM_ONLINE_URL"):
        model()
    monkeypatch.setenv("MLPLATFORM_ONLINE_URL", "rediss://cluster:6379")
    assert model().online_redis_url == "rediss://cluster:6379"


@pytest.mark.parametrize("model", [Settings, ServingSettings])
def test_production_refuses_an_online_store_without_password(model, monkeypatch):
    monkeypatch.setenv("MLPLATFORM_PROFILE", "production")
    monkeypatch.setenv("MLPLATFORM_ONLINE_URL", "redis://online:6379/0")
    with pytest.raises(ValueError, match="MLPLATFORM_ONLINE_URL must carry a password"):
        model()
