"""A canary on trial, on a real MLflow store, ledger and lake: good ones rise and are promoted, bad ones are rejected."""

import threading
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import polars as pl
import pytest

from mlplatform.clients.lake import with_day
from mlplatform.contracts import CANARY, PRODUCTION
from mlplatform.orchestration.canary_state import set_canary
from mlplatform.orchestration.canary_trial import judge_canary
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.release_policy import CanaryPolicy
from mlplatform.specs import ModelSpec, Split

POLICY = CanaryPolicy(steps=(5, 50), min_requests=50)
PAGE = """process_start_time_seconds 1.0
mlplatform_requests_total{{model="{model}",version="1",variant="champion",status="200"}} {good}
mlplatform_requests_total{{model="{model}",version="2",variant="canary",status="200"}} {good}
mlplatform_requests_total{{model="{model}",version="2",variant="canary",status="500"}} {bad}
"""


@pytest.fixture
def spec(model) -> ModelSpec:
    days = [date(2013, month, 1) for month in (1, 2, 3, 4)]
    split = Split(train_start=days[0], validate_start=days[1], test_start=days[2], end=days[3])
    given = {"description": "x", "feature_service": "s", "inputs": {}, "rows": lambda _: pl.DataFrame(), "row_key": ("id",)}
    return ModelSpec(name=model, request_fields=(), split=split, canary=POLICY, **given)


@pytest.fixture
def service(environment, model) -> Iterator[dict[str, int]]:
    """A service's counters, to be changed: requests of each arm, and those of the canary that failed."""
    counts = {"good": 0, "bad": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = PAGE.format(model=model, **counts).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    environment.setenv("MLPLATFORM_SERVING_URL", f"http://127.0.0.1:{server.server_port}")
    yield counts
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def traffic(service, clients, spec) -> Callable[..., None]:
    """`traffic(shift=0, errors=0)`: an hour in which both arms answer 1,000 requests whose labels come at once."""
    rng = np.random.default_rng(3)

    def hour(shift: float = 0.0, errors: int = 0) -> None:
        start, frames = clients.clock.now(), []
        for variant, version, pulled in (("champion", 1, 0.0), ("canary", 2, shift)):
            truth = rng.beta(1, 3, 1000)
            times = [start + timedelta(seconds=3.6 * k) for k in range(1000)]
            frames.append(
                pl.DataFrame(
                    {
                        "request_id": [f"{variant}{start.timestamp()}{k}" for k in range(1000)],
                        "requested_at": times,
                        "variant": variant,
                        "version": version,
                        "prediction": np.clip(truth + pulled * rng.choice([-1, 1], 1000), 0, 1),
                        "latency_ms": rng.lognormal(1, 0.5, 1000),
                        "state": "known",
                        "label": (rng.random(1000) < truth).astype(float),
                        "label_known_at": times,
                    }
                )
            )
        clients.lake.append(("outcomes", spec.name), with_day(pl.concat(frames), "requested_at"))
        service["good"], service["bad"] = service["good"] + 1000, service["bad"] + errors
        clients.clock.set(start + timedelta(hours=1))

    return hour


@pytest.fixture
def on_trial(traffic, clients, spec) -> None:
    promote(clients, spec.name, 1, "tom")
    assert not set_canary(clients, spec.name, 2, 5, "tom", "a try").reasons


def carried(clients, model) -> dict[str, int]:
    return {alias: v.version for v in clients.registry.versions(model) for alias in v.aliases}


def test_a_good_canary_rises_by_its_steps_and_is_promoted_and_the_ledger_tells_why(on_trial, traffic, clients, spec) -> None:
    steps = []
    for _ in range(12):
        traffic()
        told = judge_canary(clients, spec)
        if told is None:
            break
        assert not told.refused
        steps.append(told.step.action)
    assert steps.count("advance") == 1
    assert steps[-1] == "promote"
    assert carried(clients, spec.name)[PRODUCTION] == 2
    assert CANARY not in carried(clients, spec.name)
    [promotion] = [e for e in clients.ledger.entries(spec.name) if e.action == "promote" and e.version == 2]
    assert promotion.reason.endswith("every measure is within its margin")
    verdicts = [e for e in clients.ledger.entries(spec.name) if e.action == "verdict"]
    assert {"errors", "slow", "loss", "verdict", "step"} <= set(verdicts[-1].evidence)
    assert judge_canary(clients, spec) is None


@pytest.mark.parametrize("fault", [{"shift": 0.35}, {"errors": 60}])
def test_a_bad_canary_is_rejected_and_the_champion_goes_on(on_trial, traffic, clients, spec, fault) -> None:
    for _ in range(6):
        traffic(**fault)
        told = judge_canary(clients, spec)
        if told is None:
            break
        last = told
    assert last.step.action == "reject"
    assert last.verdict.word == "worse"
    assert carried(clients, spec.name) == {PRODUCTION: 1}
    assert [e.action for e in clients.ledger.entries(spec.name)][-1] == "reject"


def test_without_traffic_it_waits_and_the_same_judgement_is_told_once(on_trial, clients, spec) -> None:
    assert [judge_canary(clients, spec).step.action for _ in range(3)] == ["hold"] * 3
    assert [e.action for e in clients.ledger.entries(spec.name)].count("verdict") == 1


def test_a_canary_of_which_nothing_can_be_told_in_time_ends_and_somebody_is_told(on_trial, clients, spec) -> None:
    clients.clock.set(clients.clock.now() + POLICY.max_duration)
    assert judge_canary(clients, spec).step.action == "end"
    assert carried(clients, spec.name) == {PRODUCTION: 1}
    assert clients.alerts.sent["log"] == 1
    assert judge_canary(clients, spec) is None


def test_a_look_alone_changes_nothing(on_trial, traffic, clients, spec) -> None:
    traffic(shift=0.4)
    traffic(shift=0.4)
    before = len(clients.ledger.entries(spec.name))
    assert judge_canary(clients, spec, act=False).step.action == "reject"
    assert len(clients.ledger.entries(spec.name)) == before
    assert not clients.lake.exists(("canary", spec.name))


def test_a_service_that_does_not_tell_its_counters_is_named_and_nothing_is_promoted(on_trial, traffic, clients, spec, environment) -> None:
    from mlplatform.settings import load_settings

    environment.setenv("MLPLATFORM_SERVING_URL", "http://127.0.0.1:9")
    load_settings.cache_clear()
    clients.settings = load_settings()
    for _ in range(3):
        traffic()
        told = judge_canary(clients, spec)
    assert "does not tell its counters" in told.unheard
    assert told.step.action == "hold"
    assert "errors" in told.verdict.reason


def test_a_canary_promoted_by_hand_is_none_any_more_and_after_a_rollback_it_answers_nobody(on_trial, clients, spec) -> None:
    promote(clients, spec.name, 2, "tom", by_hand=True)
    assert CANARY not in carried(clients, spec.name)
    set_canary(clients, spec.name, 1, 50, "tom", "compare")
    promote(clients, spec.name, 1, "tom", by_hand=True)
    clients.registry.set_alias(spec.name, CANARY, 1)
    roll_back(clients, spec.name, "it is slow", "tom")
    assert (carried(clients, spec.name).get(PRODUCTION), carried(clients, spec.name).get(CANARY)) == (2, None)
