"""What the API says about itself: models, fields, OpenAPI, the offline page, health and metrics."""

import re
from typing import Any

import jsonschema
import pytest


@pytest.fixture
def client(make_model, open_service, tmp_path) -> Any:
    make_model().into_cache(tmp_path)
    return open_service()


def test_a_model_tells_its_fields_versions_views_and_an_example_that_works(client, make_model) -> None:
    contract = make_model().contract
    [summary] = client.get("/v1/models").json()["models"]
    assert (summary["name"], summary["version"], summary["refused"]) == ("basket", 1, None)
    model = client.get("/v1/models/basket").json()
    assert model["contract_digest"] == contract.digest()
    assert model["views"][0] == {
        "name": "shop_stats",
        "join_keys": ["shop"],
        "ttl_s": 3600.0,
        "on_stale": "impute",
        "features": ["orders", "returns"],
    }
    assert [v["role"] for v in model["versions"]] == ["current"]
    schema = model["input_schema"]
    assert "region" not in schema["properties"]
    assert schema["anyOf"] == [{"required": ["shop", "customer", "placed_at", "price", "items", "channel"]}, {"required": ["features"]}]
    assert list(schema["properties"]["features"]["properties"]) == model["features"]
    jsonschema.Draft202012Validator(schema).validate(model["example"]["inputs"][0])
    assert client.post("/v1/models/basket/predict", json=model["example"]).status_code == 200


def test_openapi_shows_the_models_own_fields_and_its_example(client) -> None:
    api = client.get("/openapi.json").json()
    operation = api["paths"]["/v1/models/basket/predict"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["inputs"]["items"]["$ref"] == "#/components/schemas/basket_input"
    assert api["components"]["schemas"]["basket_input"]["properties"]["price"]["minimum"] == 0
    assert body["example"]["inputs"][0]["shop"] == "s1"
    assert "/v1/models/{model}/predict" not in api["paths"]
    references = re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', client.get("/openapi.json").text)
    assert set(references) <= set(api["components"]["schemas"])


def test_the_examples_of_every_protocol_work(client) -> None:
    api = client.get("/openapi.json").json()
    tried = []
    for path in ("/v1/models/basket/predict", "/v1/models/basket/invocations", "/v2/models/basket/infer"):
        operation = api["paths"][path]["post"]
        assert "model" not in [p["name"] for p in operation["parameters"]]
        assert operation["description"].startswith("Will this basket be sent back?")
        for kind, told in operation["requestBody"]["content"].items():
            if "example" in told:
                body = {"content": told["example"]} if isinstance(told["example"], str) else {"json": told["example"]}
                answer = client.post(path, headers={"content-type": kind}, **body)
                assert answer.status_code == 200, answer.text
                tried.append(kind)
    assert tried == ["application/json", "application/json", "text/csv", "application/json"]
    assert "/v2/models/{model}/versions/{version}/infer" in api["paths"]


def test_openapi_lets_features_stand_in_for_fields(client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["basket_input"]
    validator = jsonschema.Draft202012Validator(schema)
    example = client.get("/v1/models/basket").json()["example"]["inputs"][0]
    for good in (example, {"features": {"orders": 1.5, "channel": "web"}}, example | {"features": {"orders": None, "channel": 0}}):
        validator.validate(good)
    for bad in ({}, {"features": {"nonsense": 1}}, {"features": {"orders": "many"}}, example | {"nonsense": 1}):
        assert not validator.is_valid(bad)


def test_the_docs_page_needs_nothing_from_elsewhere(client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    texts = [page.text] + [client.get(f"/{name}").text for name in ("docs.css", "docs.js")]
    assert not any(re.search(r"https?://", text) for text in texts)
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', page.text)) == {"data:,", "docs.css", "docs.js", "openapi.json"}
    assert client.get("/").headers["location"] == "docs"


def test_health_and_metrics(client) -> None:
    assert client.get("/health/live").json() == {"status": "alive"}
    ready = client.get("/health/ready")
    assert ready.json() == {"status": "ready", "models": {"basket": 1}, "device": "cpu", "warnings": []}
    example = client.get("/v1/models/basket").json()["example"]
    client.post("/v1/models/basket/predict", json=example)
    client.post("/v1/models/basket/predict", json={"inputs": [{}]})
    client.post("/v1/models/other/predict", json=example)
    text = client.get("/metrics").text
    for line in (
        'mlplatform_requests_total{model="basket",status="200",variant="champion",version="1"} 1.0',
        'mlplatform_requests_total{model="basket",status="422",variant="champion",version="1"} 1.0',
        'mlplatform_requests_total{model="unknown",status="404",variant="",version=""} 1.0',
        'mlplatform_predictions_total{model="basket",variant="champion",version="1"} 1.0',
        'mlplatform_imputed_views_total{model="basket",view="shop_stats"} 1.0',
        "mlplatform_prediction_log_accepted_total 1.0",
        "mlplatform_ready 1.0",
    ):
        assert line in text, line
    assert re.search(r'mlplatform_model_info\{.*model="basket",role="current".*version="1"\} 1.0', text)


def test_every_answer_carries_its_request_id_and_no_sniffing(client) -> None:
    first, second = client.get("/health/live"), client.get("/health/live", headers={"x-request-id": "mine"})
    assert first.headers["x-request-id"] != second.headers["x-request-id"] != "mine"
    assert first.headers["x-content-type-options"] == "nosniff"


def test_without_a_model_it_is_alive_but_not_ready(open_service) -> None:
    client = open_service(wait=False)
    assert client.get("/health/live").status_code == 200
    answer = client.get("/health/ready")
    assert answer.status_code == 503
    assert "no model is loaded" in answer.json()["detail"]
    assert "/v1/models/{model}/predict" in client.get("/openapi.json").json()["paths"]


def test_a_wanted_model_that_is_not_there_keeps_it_unready_and_predictions_at_503(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service(serving_models="basket, other")
    assert "model 'other' is not loaded" in client.get("/health/ready").json()["detail"]
    assert client.post("/v1/models/other/predict", json={"inputs": [{}]}).status_code == 503


def test_what_nobody_foresaw_is_a_problem_without_its_trace(client, monkeypatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("hush")

    monkeypatch.setattr("serving_app.routes.open_inference.metadata", fails)
    answer = client.get("/v2/models/basket")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["type"] == "urn:mlplatform:problem:internal-error"
    assert answer.json()["error"] == answer.json()["detail"]
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert "hush" not in answer.text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 422),
        ("/v1/models/basket", 422),
        ("/v2", 400),
        ("/v2/models/basket", 400),
        ("/v2/models/basket/versions/1", 400),
        ("/v2/models/basket/ready", 400),
        ("/v2/models/basket/versions/1/ready", 400),
        ("/health/live", 200),
        ("/v2/health/live", 200),
        ("/metrics", 200),
    ],
)
def test_a_parameter_nobody_knows_is_refused_where_models_are_told_of(path: str, status: int, make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    assert client.get(path).status_code == 200
    answer = client.get(path, params={"verbose": "1"})
    assert answer.status_code == status
    assert status == 200 or "verbose" in answer.text


def test_a_wrong_address_and_a_wrong_method_are_told_what_there_is(client) -> None:
    nowhere, method = client.get("/v1/predict"), client.delete("/v1/models/basket/predict")
    assert (nowhere.status_code, method.status_code) == (404, 405)
    assert nowhere.json()["detail"] == "there is nothing at /v1/predict; /openapi.json lists the addresses"
    assert method.json()["detail"] == f"/v1/models/basket/predict takes {method.headers['allow']}, not DELETE"
