"""Prometheus and Grafana ask for what the service exports, where it exports it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric

from mlplatform.feature_store.pipe import Pipe
from serving_app.metrics import Metrics
from serving_app.prediction_log import PredictionLog

_NAME = re.compile(r"\b(?:mlplatform|envoy)_[a-z_]+")
_SUFFIXES = {"counter": ("_total", "_created"), "histogram": ("_bucket", "_sum", "_count", "_created"), "gauge": ("",)}


def families() -> Iterator[Metric]:
    metrics = Metrics()
    metrics.watch_log(PredictionLog(Pipe("redis://127.0.0.1", timeout_s=1), capacity=1).counts)
    return iter(metrics.registry.collect())


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Series name → its labels, of a service that has answered nothing yet."""
    labels = {c._name: set(c._labelnames) for c in vars(Metrics()).values() if hasattr(c, "_labelnames")}
    return {f.name + suffix: labels.get(f.name, set()) for f in families() for suffix in _SUFFIXES[f.type]}


@pytest.fixture(scope="module")
def dashboards(root) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (root / "deploy/grafana/dashboards").glob("*.json")}


@pytest.fixture(scope="module")
def expressions(root, dashboards) -> list[str]:
    alerts = yaml.safe_load((root / "deploy/prometheus/alerts.yml").read_text())
    rules = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    queries = [target["expr"] for board in dashboards.values() for panel in board["panels"] for target in panel["targets"]]
    variables = [v["query"]["query"] for board in dashboards.values() for v in board["templating"]["list"]]
    return [*rules, *queries, *variables]


def test_dashboards_and_alerts_name_only_exported_series(expressions, exported) -> None:
    assert expressions
    for expression in expressions:
        assert set(_NAME.findall(expression)) <= set(exported), expression


def test_dashboards_and_alerts_select_only_by_labels_the_series_have(expressions, exported) -> None:
    for expression in expressions:
        for series, selectors in re.findall(r"(mlplatform_[a-z_]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", selectors)) <= exported[series] | {"job", "instance"}, expression


def test_every_exported_series_is_on_a_dashboard(expressions) -> None:
    text = " ".join(expressions)
    assert [family.name for family in families() if family.name not in text] == []


def test_panels_have_their_own_place_and_id(dashboards) -> None:
    for board in dashboards.values():
        cells = [
            (x, y)
            for g in (panel["gridPos"] for panel in board["panels"])
            for x in range(g["x"], g["x"] + g["w"])
            for y in range(g["y"], g["y"] + g["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))


def test_the_dashboard_uses_the_provisioned_data_source(root, dashboards, resolved) -> None:
    [source] = yaml.safe_load((root / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for board in dashboards.values() for panel in board["panels"]}
    assert used == {source["uid"]}
    host = re.fullmatch(r"http://([\w-]+):9090", source["url"]).group(1)
    assert host in resolved["services"]


def test_grafana_finds_dashboards_where_they_are_mounted(root, resolved, dashboards) -> None:
    [provider] = yaml.safe_load((root / "deploy/grafana/provisioning/dashboards/mlplatform.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in resolved["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = resolved["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.removeprefix(f"{provider['options']['path']}/") in dashboards


def test_prometheus_scrapes_every_replica_itself(root, resolved) -> None:
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    replicas = sorted(name for name in resolved["services"] if name.startswith("serving-"))
    assert sorted(jobs["serving"]) == [f"{name}:8000" for name in replicas]
    assert {target.split(":")[0] for targets in jobs.values() for target in targets} - {"127.0.0.1"} <= set(resolved["services"])
    for file in config["rule_files"]:
        assert (root / "deploy/prometheus" / file).exists()


def test_every_alert_says_how_to_mend(root) -> None:
    alerts = yaml.safe_load((root / "deploy/prometheus/alerts.yml").read_text())
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["mend"]
        assert rule["labels"]["severity"] in ("warning", "critical")
