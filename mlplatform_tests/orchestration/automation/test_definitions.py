"""Jobs, schedules and sensors of the loaded definitions: what there is, and that it runs unless somebody stops it."""

import dagster as dg
import pytest

MODELS = ("flight_disruption", "arrival_delay")
JOBS = {
    "flights_reference",
    "flights_daily",
    "flights_windows",
    "flights_events",
    "flights_online_rebuild",
    "release_judgement",
    *(f"{model}_{job}" for model in MODELS for job in ("training", "monitoring", "canary")),
}
SCHEDULES = {
    "flights_reference_daily": ("flights_reference", "15 0 * * *"),
    "flights_ingestion_daily": ("flights_daily", "30 0 * * *"),
    "flights_ingestion_hourly": ("flights_windows", "5 * * * *"),
    "flights_online_rebuild_daily": ("flights_online_rebuild", "0 2 * * *"),
    **{f"{model}_training_weekly": (f"{model}_training", "0 3 * * 1") for model in MODELS},
    **{f"{model}_monitoring_hourly": (f"{model}_monitoring", "20 * * * *") for model in MODELS},
}
SENSORS = {
    "automation": set(),
    "flights_new_events": {"flights_events"},
    **{f"{model}_new_outcomes": {f"{model}_monitoring"} for model in MODELS},
    **{f"{model}_retrain": {f"{model}_training"} for model in MODELS},
    **{f"{model}_guard": set() for model in MODELS},
    **{f"{model}_canary": {f"{model}_canary"} for model in MODELS},
}


@pytest.fixture(scope="session")
def loaded(definitions: dg.Definitions):
    return definitions.get_repository_def()


def test_the_jobs_are_the_named_ones(loaded):
    assert {name for name in loaded.job_names if not name.startswith("__")} == JOBS


def test_every_schedule_has_its_job_and_cron_and_runs(loaded):
    found = {s.name: s for s in loaded.schedule_defs}
    assert {name: (s.job_name, s.cron_schedule) for name, s in found.items()} == SCHEDULES
    assert {s.default_status for s in found.values()} == {dg.DefaultScheduleStatus.RUNNING}
    assert {s.execution_timezone for s in found.values()} == {"UTC"}


def test_every_sensor_has_its_job_and_runs(loaded):
    found = {s.name: s for s in loaded.sensor_defs}
    assert {name: {t.job_name for t in s.targets if t.job_name in JOBS} for name, s in found.items()} == SENSORS
    assert {s.default_status for s in found.values()} == {dg.DefaultSensorStatus.RUNNING}


def test_everything_automated_is_described(loaded):
    for automated in (*loaded.schedule_defs, *loaded.sensor_defs):
        assert automated.description, automated.name


@pytest.mark.parametrize(
    ("job", "stages"),
    [
        ("flights_daily", {"raw", "validated", "quarantine"}),
        ("flights_events", {"raw", "validated", "quarantine"}),
        ("flights_online_rebuild", {"online"}),
        ("flight_disruption_training", {"training_set", "tuning", "model", "evaluation", "deployment"}),
        (
            "flight_disruption_monitoring",
            {"predictions", "outcomes", "shadow", "experiment", "performance", "data_drift", "prediction_drift", "skew"},
        ),
    ],
)
def test_a_job_materializes_its_stages(loaded, job, stages):
    keys = loaded.get_job(job).asset_layer.selected_asset_keys
    assert {key.path[0] for key in keys} == stages


def test_event_and_window_jobs_together_are_the_daily_job(loaded):
    keys = {name: set(loaded.get_job(name).asset_layer.selected_asset_keys) for name in JOBS if name.startswith("flights")}
    assert keys["flights_events"] | keys["flights_windows"] == keys["flights_daily"]
    assert not keys["flights_events"] & keys["flights_windows"]
    assert not keys["flights_reference"] & keys["flights_daily"]


def test_daily_jobs_have_the_catalogs_days(loaded):
    assert loaded.get_job("flights_daily").partitions_def.get_partition_keys()[0] == "2013-01-01"
    assert loaded.get_job("flights_reference").partitions_def is None
