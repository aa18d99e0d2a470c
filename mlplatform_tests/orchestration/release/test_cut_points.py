"""Killed between any two writes, what is found is completed or undone, and registry and ledger agree."""

from collections.abc import Callable

import pytest

from mlplatform.contracts import CANARY, PREVIOUS, PRODUCTION, STATE_TAG
from mlplatform.deployment.history import latest
from mlplatform.deployment.states import State, states
from mlplatform.orchestration.canary_state import finish_canary, record_verdict, release, set_canary
from mlplatform.orchestration.recording import verify_ledger
from mlplatform.orchestration.release_state import approve, found_differences, settle
from mlplatform.orchestration.resources import Clients
from mlplatform.orchestration.serving_state import promote, roll_back
from mlplatform.release_policy import CanaryPolicy

WRITES = (
    ("registry", ("set_alias", "delete_alias", "set_tags", "set_model_tag")),
    ("ledger", ("append",)),
    ("redis", ("publish",)),
)


class Killer:
    """Kills before the n-th write from now on, whatever writes it."""

    def __init__(self, clients: Clients, patch: pytest.MonkeyPatch) -> None:
        self.left, self.done = -1, 0
        for part, names in WRITES:
            kind = type(getattr(clients, part))
            for name in names:
                patch.setattr(kind, name, self._counted(getattr(kind, name)))

    def _counted(self, write: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.done += 1
            return write(*args, **kwargs)

        return counted


def first_serves(clients: Clients, model: str) -> None:
    promote(clients, model, 1, "ann")


def canary_at_five(clients: Clients, model: str) -> None:
    first_serves(clients, model)
    set_canary(clients, model, 2, 5, "judge", "begins")


def second_serves(clients: Clients, model: str) -> None:
    first_serves(clients, model)
    promote(clients, model, 2, "ann")


def back_to_one(clients: Clients, model: str) -> None:
    """A person who asks again after a fault looks first."""
    found = clients.registry.by_alias(model, PRODUCTION)
    if found is not None and found.version == 2:
        roll_back(clients, model, "bad", "ann")


DIRECT = CanaryPolicy(rollout="direct")

STEPS = {
    "first promotion": (lambda clients, model: None, first_serves, {PRODUCTION: 1}, (1, None, 0)),
    "promotion": (first_serves, lambda c, m: promote(c, m, 2, "ann"), {PRODUCTION: 2, PREVIOUS: 1}, (2, None, 0)),
    "rollback": (second_serves, back_to_one, {PRODUCTION: 1}, (1, None, 0)),
    "approval": (first_serves, lambda c, m: approve(c, m, 2, "ann", "good"), {PRODUCTION: 1}, (1, None, 0)),
    "canary": (first_serves, lambda c, m: set_canary(c, m, 2, 5, "judge", "go"), {PRODUCTION: 1, CANARY: 2}, (1, 2, 5)),
    "release": (first_serves, lambda c, m: release(c, m, CanaryPolicy(), 2, "dagster"), {PRODUCTION: 1, CANARY: 2}, (1, 2, 1)),
    "direct release": (first_serves, lambda c, m: release(c, m, DIRECT, 2, "dagster"), {PRODUCTION: 2, PREVIOUS: 1}, (2, None, 0)),
    "step": (canary_at_five, lambda c, m: set_canary(c, m, 2, 25, "judge", "on"), {PRODUCTION: 1, CANARY: 2}, (1, 2, 25)),
    "good end": (canary_at_five, lambda c, m: finish_canary(c, m, 2, "promote", "judge", "ok"), {PRODUCTION: 2, PREVIOUS: 1}, (2, None, 0)),
    "bad end": (canary_at_five, lambda c, m: finish_canary(c, m, 2, "reject", "judge", "worse"), {PRODUCTION: 1}, (1, None, 0)),
    "no end": (canary_at_five, lambda c, m: finish_canary(c, m, 2, "end", "ann", "later"), {PRODUCTION: 1}, (1, None, 0)),
}


def agrees(clients: Clients, model: str) -> None:
    """Registry and ledger say one thing, the chain holds, and every state tag is the ledger's."""
    assert found_differences(clients, model) == ()
    found = verify_ledger(clients, model)
    assert found.faults == ()
    if found.head is not None:
        assert found.anchored == found.head.sequence
    by_version = states(clients.ledger.entries(model))
    told = {v.version: v.tags.get(STATE_TAG) for v in clients.registry.versions(model)}
    assert told == {v: str(by_version.get(v, State.CANDIDATE)) for v in told}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_killed_between_any_two_writes_is_settled_and_done_again_to_the_same_end(
    clients: Clients, new_model: Callable[[], str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before, step, aliases, served = STEPS[name]
    killer = Killer(clients, monkeypatch)
    cut, whole = 0, False
    while not whole:
        model = new_model()
        before(clients, model)
        settle(clients, model, "sensor")
        killer.left, killer.done = cut, 0
        try:
            step(clients, model)
            whole = True
        except KeyboardInterrupt:
            pass
        killer.left = -1
        settle(clients, model, "sensor")
        agrees(clients, model)
        step(clients, model)
        agrees(clients, model)
        found = latest(clients.ledger.entries(model))
        assert (found.production, found.canary, found.canary_weight) == served
        assert {a: v.version for v in clients.registry.versions(model) for a in v.aliases} == aliases
        cut += 1
    assert cut > 2


def test_a_look_of_the_judge_is_one_entry_however_often_it_is_told(clients: Clients, model: str) -> None:
    canary_at_five(clients, model)
    for _ in range(2):
        record_verdict(clients, model, 2, "cannot tell", "too little traffic", {"samples": 12}, verdict_id="step-1-look-4")
    told = [e for e in clients.ledger.entries(model) if e.action == "verdict"]
    assert [(e.version, e.previous_version, e.evidence) for e in told] == [(2, 1, {"verdict": "cannot tell", "samples": 12})]
