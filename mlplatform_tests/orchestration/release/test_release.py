"""The first step of a version past its gates: on trial beside what serves, at once where nothing does; a real MLflow store and ledger."""

from types import SimpleNamespace

import pytest

from mlplatform.contracts import CANARY
from mlplatform.deployment.history import latest
from mlplatform.deployment.states import State, states
from mlplatform.orchestration import canary_state, release_state
from mlplatform.orchestration.canary_state import finish_canary, release, release_approved
from mlplatform.orchestration.release_state import approve
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.orchestration.summaries import store_summary
from mlplatform.records import SkewSummary
from mlplatform.release_policy import CanaryPolicy

POLICY = CanaryPolicy(steps=(10, 50))


def shares(clients: Clients, model: str) -> list[tuple[int | None, float]]:
    return [(version, percent) for _, version, percent in latest(clients.ledger.entries(model)).shares()]


def test_the_first_version_serves_at_once_and_the_next_one_is_on_trial_with_the_first_steps_share(clients, model, notices) -> None:
    first = release(clients, model, POLICY, 1, "dagster")
    assert (first.action, first.serves) == ("promote", 1)
    notices()
    second = release(clients, model, POLICY, 2, "dagster")
    assert (second.action, second.serves) == ("canary", 1)
    assert shares(clients, model) == [(1, 90), (2, 10)]
    assert states(clients.ledger.entries(model))[2] is State.CANARY
    assert model in notices()


def test_released_again_a_canary_goes_on_as_it_is_whatever_its_step(clients, model) -> None:
    release(clients, model, POLICY, 1, "dagster")
    release(clients, model, POLICY, 2, "dagster")
    before = clients.ledger.entries(model)
    again = release(clients, model, CanaryPolicy(steps=(5,)), 2, "dagster")
    assert (again.action, again.serves) == ("none", 1)
    assert clients.ledger.entries(model) == before
    assert release(clients, model, POLICY, 1, "dagster").action == "none"  # what serves is no candidate


def test_a_direct_rollout_has_no_trial(clients, model) -> None:
    release(clients, model, POLICY, 1, "dagster")
    assert release(clients, model, CanaryPolicy(rollout="direct"), 2, "dagster").action == "promote"
    assert shares(clients, model) == [(2, 100)]


@pytest.mark.parametrize("fault", ["gates", "rejected", "rolled back", "skew"])
def test_what_must_not_answer_callers_is_no_canary_either_and_that_is_recorded(clients, model, fault) -> None:
    release(clients, model, POLICY, 1, "dagster")
    version = 3 if fault == "gates" else 2
    if fault == "rejected":
        release(clients, model, POLICY, 2, "dagster")
        finish_canary(clients, model, 2, "reject", "judge", "worse")
    elif fault == "rolled back":
        promote(clients, model, 2, "ann")
        roll_back(clients, model, "slow", "ann")
    elif fault == "skew":
        store_summary(clients, "skew", SkewSummary(model, ("", ""), 9, 9, 9, 0.0, {"ttl_ignored": 9}), "run")
    told = release(clients, model, POLICY, version, "dagster")
    assert (told.action, told.serves) == ("refuse", 1)
    assert {"gates": "gates", "rejected": "rejected", "rolled back": "only a person", "skew": "skew"}[fault] in told.reason
    assert shares(clients, model) == [(1, 100)]
    assert CANARY not in {alias for v in clients.registry.versions(model) for alias in v.aliases}
    last = clients.ledger.entries(model)[-1]
    assert (last.action, last.alias, last.version, last.actor) == ("refuse", CANARY, version, "dagster")


def test_a_version_that_served_before_may_be_tried_again_once_another_serves(clients, model) -> None:
    release(clients, model, POLICY, 1, "dagster")
    promote(clients, model, 2, "ann")
    assert release(clients, model, POLICY, 1, "dagster").action == "canary"
    finish_canary(clients, model, 1, "end", "ann", "enough")
    assert release(clients, model, CanaryPolicy(steps=(50,)), 1, "dagster").action == "canary"
    assert shares(clients, model) == [(2, 50), (1, 50)]


def test_a_version_that_waits_for_a_person_is_on_trial_once_that_person_agreed(clients, model, monkeypatch) -> None:
    spec = SimpleNamespace(approval="other_person", canary=POLICY)
    for module in (canary_state, release_state):
        monkeypatch.setattr(module, "declared", lambda _: spec)
    approve(clients, model, 1, "ann", "read")
    assert release_approved(clients, model, 1, "ann").action == "promote"
    assert "waits for approval" in release(clients, model, POLICY, 2, "dagster").reason
    assert shares(clients, model) == [(1, 100)]
    approve(clients, model, 2, "ann", "read")
    assert release_approved(clients, model, 2, "ann").action == "canary"
    assert shares(clients, model) == [(1, 90), (2, 10)]


def test_where_the_gates_alone_decide_an_approval_starts_nothing(clients, model, monkeypatch) -> None:
    monkeypatch.setattr(canary_state, "declared", lambda _: SimpleNamespace(approval="gates", canary=POLICY))
    release(clients, model, POLICY, 1, "dagster")
    approve(clients, model, 2, "ann", "read")
    assert release_approved(clients, model, 2, "ann") is None
    assert shares(clients, model) == [(1, 100)]
