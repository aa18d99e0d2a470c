"""Whether monitoring asks for a retrain.

Belongs here: the decision, and the cursor a sensor keeps between two of its ticks. Does not belong here: the sensor.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import isfinite

from mlplatform.records import DriftSummary, PerformanceSummary, RetrainDecision
from mlplatform.specs import RetrainPolicy

# A request whose run fails for a passing reason should be made again; one that fails for a lasting reason not for ever.
MAX_IN_VAIN = 3

# Metrics that get better as they fall; every other one gets better as it rises.
LOWER_IS_BETTER = frozenset({"log_loss", "brier", "ece", "cost_per_row", "pinball", "pinball_p50", "mae", "calibration_error"})


@dataclass(frozen=True)
class Cursor:
    """What the sensor remembers: when it last asked (ISO 8601 UTC), on which evidence, and how often in a row in vain."""

    requested_at: str | None = None
    evidence: str = ""
    in_vain: int = 0

    @classmethod
    def read(cls, text: str | None) -> "Cursor":
        """From a sensor's cursor; empty or None is a fresh start. Raises ValueError for any other text that is no cursor."""
        if not text:
            return cls()
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"not a retrain cursor: {text!r}") from error

    def write(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def decide_retrain(
    model: str,
    policy: RetrainPolicy,
    performance: PerformanceSummary | None,
    reference: Mapping[str, float] | None,
    drifts: Sequence[DriftSummary],
    cursor: str | None,
    now: datetime,
    came_to_nothing: bool = False,
) -> RetrainDecision:
    """Asks for a retrain where the served model got worse or its inputs drifted, at most once per cooldown and evidence.

    `came_to_nothing`: the run last asked for ended without a model version (a version its gates refused is one): neither
    cooldown nor evidence counts then, up to `MAX_IN_VAIN` times in a row.

    `performance`: the newest summary, None before the first; `reference`: the serving version's metrics in its evaluation,
    None where unknown; `drifts`: the newest summary of each kind (those that measured nothing left out). What could not be
    judged is said in the reason, never taken for fine. The decision's `cursor` is what to pass next time.
    """
    memory = Cursor.read(cursor)
    worse, notes = _worse(policy, performance, reference)
    causes = [worse] if worse else []
    for drift in drifts:
        text = f"{drift.kind}: {drift.drifted} of {drift.columns} columns drifted ({drift.method} >= {drift.threshold:g})"
        (causes if drift.columns and drift.drifted_share > policy.max_drifted_share else notes).append(text)
    if not drifts:
        notes.append("no drift was measured")
    if not causes:
        return RetrainDecision(model, False, "; ".join(notes), memory.write())
    reason = "; ".join(causes)
    evidence = _evidence(performance, drifts)
    again = came_to_nothing and memory.in_vain < MAX_IN_VAIN
    if memory.requested_at is not None and not again:
        until = datetime.fromisoformat(memory.requested_at) + policy.cooldown
        if now < until:
            return RetrainDecision(model, False, f"cooling down until {until:%Y-%m-%d %H:%M} UTC although {reason}", memory.write())
        if evidence == memory.evidence:
            return RetrainDecision(model, False, f"already asked on the same evidence: {reason}", memory.write())
    if again:
        reason = f"{reason} (the last request came to nothing)"
    in_vain = memory.in_vain + 1 if again else 0
    return RetrainDecision(model, True, reason, Cursor(now.astimezone(UTC).isoformat(), evidence, in_vain).write())


def _worse(
    policy: RetrainPolicy, performance: PerformanceSummary | None, reference: Mapping[str, float] | None
) -> tuple[str | None, list[str]]:
    """(why the model is worse, or None; what there is to say about it otherwise)."""
    if performance is None:
        return None, ["no outcomes yet"]
    if performance.outcomes < policy.min_outcomes:
        return None, [f"{performance.outcomes} of the {policy.min_outcomes} outcomes needed to judge"]
    value, expected = performance.metrics.get(policy.metric), (reference or {}).get(policy.metric)
    if value is None or expected is None or not (isfinite(value) and isfinite(expected)):
        return None, [f"{policy.metric} cannot be compared (now {value}, in evaluation {expected})"]
    drop = value - expected if policy.metric in LOWER_IS_BETTER else expected - value
    text = f"{policy.metric} {value:.4f} against {expected:.4f} in evaluation"
    if drop > policy.max_metric_drop:
        return f"{text}: worse by {drop:.4f}, more than {policy.max_metric_drop}", []
    return None, [text]


def _evidence(performance: PerformanceSummary | None, drifts: Sequence[DriftSummary]) -> str:
    """Names what was looked at: it changes with every new outcome and every new measurement of drift."""
    seen = [f"{performance.days[1]}:{performance.outcomes}" if performance else "-"]
    return "|".join([*seen, *(f"{d.kind}:{d.current_rows}:{d.drifted}" for d in drifts)])
