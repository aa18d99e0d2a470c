"""The experiment of a model that runs: its records read and its result computed.

Belongs here: which records count, and rows to show. Does not belong here: the statistics (`deployment.experiment`).
"""

import contextlib
from typing import Any

from pydantic import ValidationError

from mlplatform.contracts import NO_RULES, PRODUCTION, TRAFFIC_TAG, Experiment, TrafficRules
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


def layer_reasons(clients: Clients, model: str, experiment: Experiment | None) -> tuple[str, ...]:
    """Why an experiment must not begin: another model's rules hold a part of its part of a layer."""
    if experiment is None or experiment.layer is None:
        return ()
    reasons: list[str] = []
    for other in clients.registry.models():
        if other == model:
            continue
        text = clients.registry.model_tags(other).get(TRAFFIC_TAG, "")
        with contextlib.suppress(ValidationError):  # rules that are none hold nobody
            rules = TrafficRules.model_validate_json(text) if text.strip() else NO_RULES
            reasons += overlaps([(model, experiment), *([(other, rules.experiment)] if rules.experiment else [])])
    return tuple(reasons)


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
