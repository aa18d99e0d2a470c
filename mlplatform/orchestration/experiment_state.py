"""The experiment of a model that runs: its records read and its result computed.

Belongs here: which records count, and rows to show. Does not belong here: the statistics (`deployment.experiment`).
"""

import contextlib
from typing import Any

from pydantic import ValidationError

from mlplatform.contracts import NO_RULES, PRODUCTION, TRAFFIC_TAG, TrafficRules
from mlplatform.deployment.experiment import ExperimentResult, evaluate, overlaps, running
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DayRange
from mlplatform.specs import ModelSpec
from mlplatform.sticky import entity_fields


def experiment_result(clients: Clients, spec: ModelSpec) -> ExperimentResult | None:
    """The result so far, from the table of outcomes as it was last written; None where no experiment runs, nobody is champion, or
    no outcome was ever written."""
    found = running(clients.ledger.entries(spec.name))
    champion = clients.registry.by_alias(spec.name, PRODUCTION) if found is not None else None
    if found is None or champion is None or not clients.lake.exists(("outcomes", spec.name)):
        return None
    rules, since = found
    assert rules.experiment is not None
    fields = entity_fields(rules, clients.registry.contract_of(champion))
    now = clients.clock.now()
    outcomes = clients.lake.read(("outcomes", spec.name), DayRange(since.date(), max(since, now).date()))
    return evaluate(spec, rules.experiment, fields, outcomes, since, spec.canary.window, now, spec.canary.alpha)


def layer_reasons(clients: Clients, model: str, wanted: TrafficRules) -> tuple[str, ...]:
    """Why an experiment must not begin: another model's holds a part of its part of a layer, or draws that layer by other fields, so that
    their parts could not exclude each other."""
    experiment = wanted.experiment
    if experiment is None or experiment.layer is None:
        return ()
    fields = _drawn_by(clients, model, wanted)
    reasons: list[str] = []
    for other in clients.registry.models():
        text = clients.registry.model_tags(other).get(TRAFFIC_TAG, "") if other != model else ""
        rules = NO_RULES
        with contextlib.suppress(ValidationError):  # rules that are none hold nobody
            rules = TrafficRules.model_validate_json(text) if text.strip() else NO_RULES
        if rules.experiment is None or rules.experiment.layer is None or rules.experiment.layer.name != experiment.layer.name:
            continue
        reasons += overlaps([(model, experiment), (other, rules.experiment)])
        theirs = _drawn_by(clients, other, rules)
        if fields and theirs and fields != theirs:
            told = f"{other}/{rules.experiment.name} draws it by {', '.join(theirs)}, {model}/{experiment.name} by {', '.join(fields)}"
            reasons.append(f"layer {experiment.layer.name}: {told}: set the same `sticky_on`, or give it a layer of its own")
    return tuple(reasons)


def _drawn_by(clients: Clients, model: str, rules: TrafficRules) -> tuple[str, ...]:
    """The fields that are the entity; none where nobody is champion, who alone tells what is asked."""
    champion = clients.registry.by_alias(model, PRODUCTION)
    return () if champion is None else entity_fields(rules, clients.registry.contract_of(champion))


def effect_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    """One row per arm and metric, numbers as text with the sign."""
    return [
        {
            "arm": effect.arm,
            "metric": effect.metric,
            "pairs": effect.n,
            "arm less control": "-" if effect.estimate is None else f"{effect.estimate:+.4g}",
            "low": f"{effect.low:+.4g}",
            "high": f"{effect.high:+.4g}",
            "differs": "yes" if effect.differs else "not shown",
        }
        for effect in result.effects
    ]
