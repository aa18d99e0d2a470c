"""Gates: what a model version must reach before it may serve.

Belongs here: comparing metrics with declared bounds and with the champion. Does not belong here: moving an alias.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from mlplatform.evaluation.paired import CONFIDENCE, MIN_DAYS, Paired
from mlplatform.gate_specs import ChampionGate, Gate
from mlplatform.records import GateResult, SkewSummary

CHAMPION_GATE = "champion"
SKEW_GATE = "skew"


def gate_names(gates: Sequence[Gate]) -> tuple[str, ...]:
    """A unique name per gate, in order, stable under changes of the bounds: `auc_minimum`, `ece_maximum`, `auc_range`, …

    Asset checks are declared under these names before any evaluation exists.
    """
    seen: Counter[str] = Counter()
    names = []
    for gate in gates:
        kind = "range" if None not in (gate.minimum, gate.maximum) else "minimum" if gate.minimum is not None else "maximum"
        name = f"{gate.metric}_{kind}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(names)


def judge(gates: Sequence[Gate], metrics: Mapping[str, float]) -> tuple[GateResult, ...]:
    """Each gate's result, in order, under its `gate_names`."""
    return tuple(_judge(name, gate, metrics) for name, gate in zip(gate_names(gates), gates, strict=True))


def _judge(name: str, gate: Gate, metrics: Mapping[str, float]) -> GateResult:
    value = metrics.get(gate.metric)
    low = -math.inf if gate.minimum is None else gate.minimum
    high = math.inf if gate.maximum is None else gate.maximum
    bound = " and ".join(
        text for text, used in ((f">= {gate.minimum}", gate.minimum is not None), (f"<= {gate.maximum}", gate.maximum is not None)) if used
    )
    verdict, passed = _verdict(gate, value, metrics, low, high, bound)
    finite = value if value is not None and math.isfinite(value) else None
    return GateResult(name, passed, finite, bound, f"{verdict} ({gate.reason})", gate.blocking)


def _verdict(gate: Gate, value: float | None, metrics: Mapping[str, float], low: float, high: float, bound: str) -> tuple[str, bool]:
    if value is None:
        return f"no metric named '{gate.metric}' was measured", False
    if not math.isfinite(value):
        return f"{gate.metric} is {value}: it could not be measured", False
    # What is held against the maximum and the minimum: the figure, or the nearer end of its interval.
    ends = [metrics.get(f"{gate.metric}{end}", math.nan) if gate.beyond_doubt else value for end in ("_low", "_high")]
    if not all(map(math.isfinite, ends)):
        return f"{gate.metric} {value:.4f} has no interval: whether it is beyond doubt cannot be told", False
    told = f"{gate.metric} {value:.4f}" + (f", between {ends[0]:.4f} and {ends[1]:.4f}," if gate.beyond_doubt else "")
    if ends[0] > high:
        # A ranking nobody can reach honestly is read as a leak before it is read as a success.
        return f"{'suspected leak: ' if gate.metric == 'auc' else ''}{told} is above {gate.maximum}", False
    if ends[1] < low:
        return f"{told} is below {gate.minimum}", False
    return f"{told} is {'not proven to break ' if gate.beyond_doubt else ''}{bound or 'not bounded'}", True


def judge_against_champion(
    gate: ChampionGate,
    version: int,
    metrics: Mapping[str, float],
    champion_version: int | None,
    champion_metrics: Mapping[str, float] | None,
    paired: Paired | None = None,
) -> GateResult:
    """Whether the challenger is worse than the champion by more than the tolerance, both scored on the same rows.

    With `paired`, differences of the gate's loss, the tolerance is a margin of non-inferiority: the upper bound must lie within
    it. Without (too few days, or a metric that is no mean of row losses) the two metrics are compared, and the reason says so.

    Without a champion, or where the version is the champion itself, the gate passes and says so. Raises ValueError where
    there is a champion but no metrics of it.
    """
    value = metrics.get(gate.metric)
    finite = value if value is not None and math.isfinite(value) else None
    if champion_version is None:
        return GateResult(CHAMPION_GATE, True, finite, "", "no champion yet: nothing to compare with")
    if champion_version == version:
        return GateResult(CHAMPION_GATE, True, finite, "", f"version {version} is the champion itself")
    if champion_metrics is None:
        raise ValueError(f"champion version {champion_version} has no metrics on these rows")
    champion = champion_metrics.get(gate.metric)
    if finite is None:
        return GateResult(CHAMPION_GATE, False, None, "", f"{gate.metric} of version {version} could not be measured ({value})")
    if champion is None or not math.isfinite(champion):
        reason = f"{gate.metric} of champion version {champion_version} could not be measured ({champion}): not compared"
        return GateResult(CHAMPION_GATE, False, finite, "", reason)
    if paired is not None:
        found = f"{gate.metric} differs by {paired.difference:+.4f} from champion version {champion_version}, at most {paired.upper:+.4f}"
        reason = f"{found} with {CONFIDENCE:.0%} confidence, over {paired.days} days and {paired.rows} rows; tolerance {gate.tolerance}"
        limit = champion + gate.tolerance - (paired.upper - paired.difference)
        return GateResult(CHAMPION_GATE, paired.upper <= gate.tolerance, finite, f"<= {limit:.4f}", reason)
    sign = 1 if gate.higher_is_better else -1
    limit = champion - sign * gate.tolerance
    passed = sign * (finite - limit) >= 0
    bound = f"{'>=' if gate.higher_is_better else '<='} {limit:.4f}"
    reason = f"{gate.metric} {finite:.4f} against {champion:.4f} of champion version {champion_version}, tolerance {gate.tolerance}"
    reason += f"; points compared: no paired test without a loss per row on {MIN_DAYS} days"
    return GateResult(CHAMPION_GATE, passed, finite, bound, reason)


def judge_skew(newest: SkewSummary | None, version: int, champion_version: int | None) -> GateResult:
    """Whether what is served is what is trained on, as it was last proved; `promote` asks the same again when it is due.

    It is no property of the version, but a version that was fitted to other values than it will be given must not serve. The version that
    serves already is told, and not stopped: taking it away is a rollback, and somebody's decision.
    """
    if newest is None:
        return GateResult(SKEW_GATE, True, None, "", "never measured: nothing served yet")
    bound = f"<= {newest.max_rate:g}"
    if not newest.refusal:
        reason = f"{newest.told} from what the tables say, {newest.max_rate:.2%} may"
        return GateResult(SKEW_GATE, True, newest.rate, bound, reason)
    reason = f"{newest.refusal}; once it is mended, measure it and evaluate the version again"
    return GateResult(SKEW_GATE, False, newest.rate, bound, reason, blocking=version != champion_version)
