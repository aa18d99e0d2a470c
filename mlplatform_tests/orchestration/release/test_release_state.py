"""Aliases moved by hand, sign-offs, and the guard that looks, on a real MLflow store and a real ledger."""

import json
import shutil
from datetime import date, timedelta

import dagster as dg
import polars as pl
import pytest

from mlplatform.clients.lake import Lake
from mlplatform.contracts import (
    CANARY,
    EVALUATION_TAG,
    GATE_RESULTS_TAG,
    GATES_TAG,
    LEDGER_HEAD_TAG,
    PRODUCTION,
    SHADOW,
    STATE_TAG,
    TRAFFIC_TAG,
    VERIFIED_TAG,
    CanaryRule,
    TrafficRules,
)
from mlplatform.deployment.decide import NothingToRollBackToError
from mlplatform.deployment.history import latest
from mlplatform.orchestration import release_state, resources
from mlplatform.orchestration.assets.evaluation import cost_of, record
from mlplatform.orchestration.automation.approvals import release_judgement
from mlplatform.orchestration.automation.guard import guard_sensor
from mlplatform.orchestration.canary_state import finish_canary, set_canary
from mlplatform.orchestration.recording import verify_ledger
from mlplatform.orchestration.release_state import ReleaseRefusedError, approve, found_differences, reject, settle
from mlplatform.orchestration.resources import PlatformResource
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.records import Evaluation, GateResult
from mlplatform.settings import load_settings
from mlplatform.specs import ModelSpec, Split


def told(clients, model):
    return [(e.action, e.alias, e.version, e.previous_version, e.actor) for e in clients.ledger.entries(model)]


def carried(clients, model):
    return {alias: v.version for v in clients.registry.versions(model) for alias in v.aliases}


def by_tag(clients, model):
    return {v.version: v.tags[STATE_TAG] for v in clients.registry.versions(model)}


def rewrite(clients, model, change):
    """The ledger's files written anew by somebody whom Delta does not hold."""
    key = clients.ledger.key(model)
    rows = change(clients.lake.read(key))
    shutil.rmtree(clients.lake.uri(key))
    Lake(clients.lake.root).replace(key, rows)
    clients.lake._open.clear()
    clients.lake._kept.clear()


@pytest.fixture
def needs(monkeypatch):
    """`needs("person")`: what every model asks for."""
    return lambda approval: monkeypatch.setattr(release_state, "approval_needed", lambda _: approval)


# --- by hand in MLflow ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", [PRODUCTION, CANARY])
def test_an_alias_given_by_hand_to_a_version_that_failed_is_put_back_recorded_and_alerted(clients, model, notices, alias):
    promote(clients, model, 1, "ann")
    set_canary(clients, model, 2, 5, "ann", "trial")
    notices()
    clients.registry.set_alias(model, alias, 3)
    settle(clients, model, "guard")
    assert carried(clients, model) == {PRODUCTION: 1, CANARY: 2}
    assert told(clients, model)[-1] == ("restore", alias, {PRODUCTION: 1, CANARY: 2}[alias], 3, "guard")
    assert "gates did not pass (recorded: refused)" in clients.ledger.entries(model)[-1].reason
    assert notices() == [model]
    assert clients.alerts.sent["log"] == 1
    assert settle(clients, model, "guard") == ()


@pytest.mark.parametrize("alias", [PRODUCTION, CANARY])
def test_an_alias_given_by_hand_to_a_rejected_version_is_put_back_though_its_seal_is_right(clients, model, alias):
    promote(clients, model, 1, "ann")
    set_canary(clients, model, 2, 5, "ann", "trial")
    finish_canary(clients, model, 2, "reject", "judge", "slow")
    clients.registry.set_alias(model, alias, 2)
    settle(clients, model, "guard")
    assert carried(clients, model) == {PRODUCTION: 1}
    assert told(clients, model)[-1][0] == "restore"
    assert "version 2 was rejected by judge: slow" in clients.ledger.entries(model)[-1].reason
    approve(clients, model, 2, "zoe", "it was the machine")
    clients.registry.set_alias(model, alias, 2)
    settle(clients, model, "guard")
    assert carried(clients, model)[alias] == 2


def test_an_alias_given_by_hand_to_a_version_that_waits_for_approval_is_put_back_and_one_that_served_before_is_not(clients, model, needs):
    promote(clients, model, 1, "ann")
    needs("person")
    clients.registry.set_alias(model, PRODUCTION, 2)
    settle(clients, model, "guard")
    assert carried(clients, model)[PRODUCTION] == 1
    approve(clients, model, 2, "zoe", "read")
    promote(clients, model, 2, "ann")
    clients.registry.set_alias(model, PRODUCTION, 1)
    settle(clients, model, "guard")
    assert carried(clients, model)[PRODUCTION] == 1


@pytest.mark.parametrize(
    "tags", [{GATES_TAG: "passed"}, {GATES_TAG: "passed", EVALUATION_TAG: '{"auc": 0.99}', VERIFIED_TAG: "sha256:" + "0" * 64}]
)
def test_tags_written_by_hand_make_no_verified_version(clients, model, tags):
    promote(clients, model, 1, "ann")
    clients.registry.set_tags(clients.registry.version(model, 3), tags)
    clients.registry.set_alias(model, PRODUCTION, 3)
    assert promote(clients, model, 3, "ann", by_hand=True).action == "refuse"
    assert carried(clients, model)[PRODUCTION] == 1
    assert [action for action, *_ in told(clients, model)] == ["promote", "restore", "refuse"]


def test_a_seal_of_another_version_and_an_edited_evaluation_are_seen(clients, model):
    seal = clients.registry.version(model, 1).tags[VERIFIED_TAG]
    clients.registry.set_tags(clients.registry.version(model, 3), {GATES_TAG: "passed", VERIFIED_TAG: seal})
    clients.registry.set_tags(clients.registry.version(model, 2), {EVALUATION_TAG: '{"auc": 0.99}'})
    for version in (2, 3):
        assert "its seal does not fit" in promote(clients, model, version, "ann", by_hand=True).reason


def test_a_first_alias_by_hand_on_an_unverified_version_is_taken_away(clients, model):
    clients.registry.set_alias(model, PRODUCTION, 3)
    settle(clients, model, "guard")
    assert carried(clients, model) == {}


def test_a_deleted_production_alias_comes_back_and_deleted_side_aliases_are_recorded(clients, model):
    promote(clients, model, 1, "ann")
    set_canary(clients, model, 2, 5, "ann", "trial")
    for alias in (PRODUCTION, CANARY):
        clients.registry.delete_alias(model, alias)
    settle(clients, model, "guard")
    assert carried(clients, model) == {PRODUCTION: 1}
    assert told(clients, model)[-2:] == [("restore", PRODUCTION, 1, None, "guard"), ("canary", CANARY, None, 2, "guard")]


def test_moves_by_hand_among_verified_versions_are_recorded_late(clients, model, registry):
    promote(clients, model, 1, "ann")
    registry.set_alias(model, PRODUCTION, 2)
    registry.set_alias(model, SHADOW, 3)
    rules = TrafficRules(canary=CanaryRule(weight=7), shadow_share=50)
    registry.set_model_tag(model, TRAFFIC_TAG, rules.canonical_json())
    assert len(found_differences(clients, model)) == 3
    settle(clients, model, "guard")
    found = latest(clients.ledger.entries(model))
    assert (found.production, found.shadow, found.rules) == (2, 3, rules)
    assert found_differences(clients, model) == ()
    assert by_tag(clients, model) == {1: "retired", 2: "production", 3: "candidate"}


def test_a_version_promoted_before_there_were_seals_gets_one_and_another_does_not(clients, model, registry, tick):
    promote(clients, model, 1, "ann")
    rewrite(clients, model, lambda rows: rows.drop("previous_hash", "hash"))
    for version in (1, 2):
        registry._open().delete_model_version_tag(model, str(version), VERIFIED_TAG)
    tick(model)
    assert not release_state.unverified(clients, registry.version(model, 1))
    assert "no seal" in release_state.unverified(clients, registry.version(model, 2))


# --- approvals ------------------------------------------------------------------------------------------------------


def test_a_model_that_asks_for_a_person_waits_for_one(clients, model, needs):
    needs("person")
    assert "waits for approval" in promote(clients, model, 1, "dagster").reason
    assert "waits for approval" in set_canary(clients, model, 1, 5, "judge", "go").reasons[0]
    assert approve(clients, model, 1, "tom", "looks right")
    assert not approve(clients, model, 1, "tom", "again")
    assert by_tag(clients, model)[1] == "approved"
    entry = clients.ledger.entries(model)[-1]
    assert (entry.action, entry.actor, entry.reason) == ("approve", "tom", "looks right")
    assert entry.evidence["mlflow_run"] == clients.registry.version(model, 1).run_id
    assert promote(clients, model, 1, "dagster").action == "promote"


def test_where_it_must_be_somebody_else_the_trainer_does_not_count(clients, model, needs):
    needs("other_person")
    with pytest.raises(ReleaseRefusedError, match="trained by tom: somebody else"):
        approve(clients, model, 1, "tom", "mine")
    approve(clients, model, 1, "ann", "checked")
    assert promote(clients, model, 1, "dagster").action == "promote"


def test_a_rejected_version_comes_back_only_by_approval_and_what_answers_is_not_rejected(clients, model):
    promote(clients, model, 1, "ann")
    with pytest.raises(ReleaseRefusedError, match="roll back first"):
        reject(clients, model, 1, "bob", "bad")
    assert reject(clients, model, 2, "bob", "bad")
    assert not reject(clients, model, 2, "bob", "bad")
    assert "rejected by bob: bad" in promote(clients, model, 2, "ann", by_hand=True).reason
    assert "is rejected" in set_canary(clients, model, 2, 5, "judge", "go").reasons[0]
    with pytest.raises(ReleaseRefusedError, match="gates did not pass"):
        approve(clients, model, 3, "ann", "please")
    approve(clients, model, 2, "ann", "was a mistake")
    assert promote(clients, model, 2, "ann").action == "promote"


@pytest.mark.parametrize(("approved", "action"), [(True, "approve"), (False, "reject")])
def test_a_dagster_run_judges_with_approver_and_reason(clients, model, approved, action):
    def run(**changed):
        config = {"model": model, "version": 1, "approved": approved, "approver": "zoe", "reason": "read it", **changed}
        return release_judgement.execute_in_process(
            run_config={"ops": {"judge_version": {"config": config}}}, resources={"platform": PlatformResource()}, raise_on_error=False
        )

    assert not run(reason=" ").success
    done = run()
    assert done.success
    entry = clients.ledger.entries(model)[-1]
    assert (entry.action, entry.actor, entry.reason, entry.run_id) == (action, "zoe", "read it", done.run_id)


def test_a_rollback_to_a_version_that_must_not_answer_any_more_is_refused(clients, model, registry):
    promote(clients, model, 1, "ann")
    promote(clients, model, 2, "ann")
    reject(clients, model, 1, "bob", "leaks")
    with pytest.raises(NothingToRollBackToError, match="it was rejected since; promote another"):
        roll_back(clients, model, "worse", "ann")
    approve(clients, model, 1, "bob", "no")
    registry.set_tags(registry.version(model, 1), {VERIFIED_TAG: ""})
    with pytest.raises(NothingToRollBackToError, match="no seal"):
        roll_back(clients, model, "worse", "ann")
    assert carried(clients, model)[PRODUCTION] == 2


def test_what_a_version_costs_is_measured_on_its_own_file(clients, model, registry, booster):
    cost = cost_of(clients, registry.version(model, 1), pl.DataFrame({"x": [0.5, -1.0, None]}))
    assert cost.model_bytes == len(booster)
    assert cost.cpu_ms > 0
    assert cost.cpu_ms_100 > 0


def test_the_gates_verdict_seals_a_version_or_takes_its_seal_and_both_are_entries(clients, model, registry):
    def judged(passed):
        version = registry.version(model, 2)
        gate = GateResult("auc_minimum", passed, 0.7, ">= 0.6", "measured")
        record(clients, version, Evaluation(model, 2, 9, {"auc": 0.7}, {}, None, None, (), (gate,)), {}, f"run-{passed}")
        return release_state.unverified(clients, registry.version(model, 2))

    assert judged(True) == ""
    (told,) = json.loads(registry.version(model, 2).tags[GATE_RESULTS_TAG])
    assert (told["name"], told["passed"], told["reason"], told["bound"]) == ("auc_minimum", True, "measured", ">= 0.6")
    judged(True)
    assert "did not pass" in judged(False)
    assert [(e.action, e.actor, e.version) for e in clients.ledger.entries(model)] == [("pass", "gates", 2), ("refuse", "gates", 2)]
    assert by_tag(clients, model)[2] == "rejected"


# --- canary ---------------------------------------------------------------------------------------------------------


def test_another_canary_does_not_inherit_the_share_of_the_one_before(clients, model):
    promote(clients, model, 1, "ann")
    promote(clients, model, 2, "ann")
    set_canary(clients, model, 1, 50, "ann", "compare")
    approve(clients, model, 1, "ann", "fine")
    entries = len(clients.ledger.entries(model))
    finish_canary(clients, model, 1, "end", "ann", "over")
    assert set_canary(clients, model, 3, 5, "ann", "x").refused
    assert latest(clients.ledger.entries(model)).canary_weight == 0
    assert [e.action for e in clients.ledger.entries(model)[entries:]] == ["traffic", "canary"]


def test_a_canary_judged_worse_is_out_at_once_and_does_not_come_back_by_itself(clients, model):
    promote(clients, model, 1, "ann")
    set_canary(clients, model, 2, 5, "judge", "begins")
    assert finish_canary(clients, model, 2, "reject", "judge", "worse", evidence={"verdict": "worse"}) == ()
    assert carried(clients, model) == {PRODUCTION: 1}
    assert by_tag(clients, model) == {1: "production", 2: "rejected", 3: "candidate"}
    assert clients.ledger.entries(model)[-1].evidence["verdict"] == "worse"
    assert set_canary(clients, model, 2, 5, "judge", "again").refused
    assert clients.alerts.sent["log"] == 1


# --- the guard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tick(clients):
    """Evaluates the guard of a model once: (what it says, new cursor)."""

    def evaluate(model, cursor=None):
        spec = ModelSpec(
            name=model,
            description="Is x positive?",
            feature_service="none",
            inputs={"x": timedelta(days=1)},
            rows=lambda tables: pl.DataFrame(),
            row_key=("x",),
            request_fields=(),
            split=Split(train_start=date(2024, 1, 1), validate_start=date(2024, 3, 1), test_start=date(2024, 4, 1), end=date(2024, 4, 20)),
        )
        with dg.build_sensor_context(cursor=cursor, resources={"platform": PlatformResource()}) as context:
            data = guard_sensor(spec).evaluate_tick(context)
        return data.skip_message, data.cursor

    return evaluate


def test_the_guard_puts_back_at_once_and_records_a_verified_move_at_its_second_look(clients, model, registry, tick):
    assert "no version is registered" in tick("nobody")[0]
    promote(clients, model, 1, "ann")
    assert tick(model)[0] == "registry and ledger agree"
    registry.set_alias(model, PRODUCTION, 3)
    assert "version 3 must not answer" in tick(model)[0]
    assert carried(clients, model) == {PRODUCTION: 1}
    registry.set_alias(model, PRODUCTION, 2)
    said, cursor = tick(model)
    assert "names version 2, the ledger says version 1" in said
    assert len(told(clients, model)) == 2
    tick(model, cursor)
    assert told(clients, model)[-1] == ("promote", PRODUCTION, 2, 1, "guard")


def test_the_guard_alerts_of_an_altered_ledger_once(clients, model, tick):
    promote(clients, model, 1, "ann")
    promote(clients, model, 2, "ann")
    rewrite(clients, model, lambda rows: rows.with_columns(actor=pl.lit("eve")))
    _, cursor = tick(model)
    tick(model, cursor)
    assert clients.alerts.sent["log"] == 1


def test_with_a_key_the_head_in_mlflow_must_be_signed(clients, model, registry, environment):
    environment.setenv("MLPLATFORM_SIGNING_KEY", "secret")
    load_settings.cache_clear()
    resources._CACHE.clear()
    keyed = PlatformResource().clients
    version = registry.version(model, 1)
    registry.set_tags(version, release_state.sealed_tags(keyed, version, "{}"))
    assert promote(keyed, model, 1, "ann").action == "promote"
    assert "made without the key" in promote(keyed, model, 2, "ann").reason
    assert verify_ledger(keyed, model).holds
    head = registry.model_tags(model)[LEDGER_HEAD_TAG]
    registry.set_model_tag(model, LEDGER_HEAD_TAG, head.rpartition(":")[0])
    assert "was not signed" in verify_ledger(keyed, model).faults[0]
