"""Gates on slices: whether a version that is good on the whole is broken for somebody.

Belongs here: which slices are judged, and by what. Does not belong here: cutting and scoring slices (`slices`).

A slice fails where its whole 95 % interval lies beyond the bound, so where it is proven to be there, and not where its figure is: of
twenty slices of two hundred rows some figure is always bad, and a gate that stops a version for noise is one that people learn to
overrule. So a bound here says what no slice may be, and is set well below what a good fit gives. The intervals are the ones that `slices`
computes. They take rows as independent, and one slice in forty whose truth is the bound itself fails by chance.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlplatform.gate_specs import SliceGate
from mlplatform.records import GateResult


def slice_gate_names(gates: Sequence[SliceGate]) -> tuple[str, ...]:
    """A unique name per gate, in order: `auc_minimum_by_carrier`, …"""
    seen: Counter[str] = Counter()
    names = []
    for gate in gates:
        name = f"{gate.metric}_{'maximum' if gate.minimum is None else 'minimum'}_by_{gate.column}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(names)


def judge_slices(gates: Sequence[SliceGate], slices: Sequence[Mapping[str, Any]]) -> tuple[GateResult, ...]:
    """Each gate's result, in order, under its `slice_gate_names`; its value is the worst slice's. `slices` as `slice_metrics` or
    `quantile_slices` gives them."""
    return tuple(_judge(name, gate, slices) for name, gate in zip(slice_gate_names(gates), gates, strict=True))


def _judge(name: str, gate: SliceGate, slices: Sequence[Mapping[str, Any]]) -> GateResult:
    found = [s for s in slices if s["column"] == gate.column]
    judged = [s for s in found if s["rows"] >= gate.min_rows]
    few = f"; {len(found) - len(judged)} of fewer rows not judged" if len(found) > len(judged) else ""
    at_least = gate.minimum is not None
    bound = f"{'>=' if at_least else '<='} {gate.minimum if at_least else gate.maximum} in each {gate.column} of {gate.min_rows} rows"
    if not judged:
        text = f"no {gate.column} has {gate.min_rows} rows{few}"
        return GateResult(name, True, None, bound, f"{text} ({gate.reason})", gate.blocking)
    if unmeasured := [s for s in judged if None in _interval(gate, s)]:
        text = f"{gate.metric} could not be measured for {gate.column} {_named(unmeasured)}"
        return GateResult(name, False, None, bound, f"{text}{few} ({gate.reason})", gate.blocking)
    # By how far a slice may at best be on the good side: negative where it is proven to be on the bad one.
    judged.sort(key=lambda s: _room(gate, s))
    broken = [s for s in judged if _room(gate, s) < 0]
    worst = judged[0]
    told = f"{gate.metric} of {gate.column} {worst['value']} is {worst[gate.metric]:.4f}, {_between(gate, worst)} over {worst['rows']} rows"
    if broken:
        side = f"{'below' if at_least else 'above'} {gate.minimum if at_least else gate.maximum} beyond doubt"
        others = f"; so is {_named(broken[1:])}" if broken[1:] else ""
        text = f"{told}: {side}{others}"
    else:
        text = f"the worst of {len(judged)}: {told}"
    return GateResult(name, not broken, float(worst[gate.metric]), bound, f"{text}{few} ({gate.reason})", gate.blocking)


def _interval(gate: SliceGate, entry: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    return entry.get(gate.metric), entry.get(f"{gate.metric}_low"), entry.get(f"{gate.metric}_high")


def _room(gate: SliceGate, entry: Mapping[str, Any]) -> float:
    if gate.minimum is not None:
        return float(entry[f"{gate.metric}_high"]) - gate.minimum
    assert gate.maximum is not None
    return gate.maximum - float(entry[f"{gate.metric}_low"])


def _between(gate: SliceGate, entry: Mapping[str, Any]) -> str:
    return f"between {entry[f'{gate.metric}_low']:.4f} and {entry[f'{gate.metric}_high']:.4f}"


def _named(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(s["value"]) for s in entries)
