"""The service keeps to its own OpenAPI document, under requests made from it: no server error, nothing that is not documented."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from mlplatform import access_keys
from mlplatform.access_keys import AccessKeys
from serving_app.main import create_app
from serving_app.openapi import build_openapi
from serving_app.router import ModelRouter

schemathesis = pytest.importorskip("schemathesis", reason="the extra `dev` is not installed")

EXAMPLES = 40


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def ask_everything(client: httpx.Client, document: dict[str, Any], examples: int = EXAMPLES) -> Iterator[int]:
    """Every operation with data as the document describes it, and with data it excludes; yields the statuses answered."""
    schemathesis.checks.load_all_checks()
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)
    schema = schemathesis.openapi.from_dict(document)
    statuses: list[int] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                answer = case.call_and_validate(base_url=str(client.base_url), checks=checks)
                statuses.append(answer.status_code)

            # An operation without parameters and body has no data the document excludes.
            with contextlib.suppress(*((Unsatisfiable,) if mode is schemathesis.GenerationMode.NEGATIVE else ())):
                one()
    yield from statuses


@pytest.fixture
def start(make_model, open_service, tmp_path) -> Callable[..., httpx.Client]:
    def begin(**given: Any) -> httpx.Client:
        make_model().into_cache(tmp_path)
        client: httpx.Client = open_service(**given)
        return client

    return begin


def test_an_open_service_keeps_to_its_document(start) -> None:
    client = start()
    statuses = set(ask_everything(client, client.get("/openapi.json").json()))
    assert {200, 404, 422} <= statuses
    assert client.get("/health/ready").status_code == 200


def test_a_service_that_asks_for_keys_keeps_to_its_document_towards_strangers(start, tmp_path) -> None:
    (tmp_path / "serving").mkdir()
    access_keys.write(tmp_path / access_keys.KEYS_FILE, AccessKeys())
    document = build_openapi(create_app(), ModelRouter(), rows_limit=10)
    client = start(wait=False, serving_auth="keys", serving_webhook_secret="s")
    deadline = time.monotonic() + 10
    while client.get("/health/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert set(ask_everything(client, document, examples=5)) == {200, 401}  # health, and all the rest (the webhook asks for a signature)
