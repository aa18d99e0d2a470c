"""How a run's figures are shown.

Belongs here: from measurements to tables and JSON. Does not belong here: what must be reached (`targets`).
"""

import os
import platform as machine
from statistics import median
from typing import Any

from mlplatform.local.bench_serving.cases import CASES, Case, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS, OURS
from mlplatform.local.bench_serving.profile import Share
from mlplatform.local.bench_serving.targets import Judged, Taken
from mlplatform.printing import print_json, say, table
from mlplatform.printing import show as print_table

_SHOWN = 0.005  # smaller shares of a profile are left out


def rows(taken: Taken) -> list[dict[str, Any]]:
    """One per contender and case: medians over the rounds."""
    pairs = dict.fromkeys((m.contender, m.case) for m in taken.measured)
    return [_row(taken, contender, case) for contender, case in pairs]


def _row(taken: Taken, contender: str, case: str) -> dict[str, Any]:
    runs = taken.of(contender, case)
    ratio, cpu_ratio = (None, None) if contender == OURS else (taken.ratio(contender, case), taken.cpu_ratio(contender, case))
    return {
        "service": CONTENDERS[contender].title,
        "load": CASES[case].title,
        "per_s": round(median(m.load.per_s for m in runs), 1),
        "ours_to_it": None if ratio is None else round(ratio, 2),
        "its_cpu_to_ours": None if cpu_ratio is None else round(cpu_ratio, 2),
        "p50_ms": _ms(runs, "p50_ms"),
        "p95_ms": _ms(runs, "p95_ms"),
        "p99_ms": _ms(runs, "p99_ms"),
        "cpu_s_per_1000": round(median(m.cpu_s_per_1000 for m in runs), 4),
        "mb": round(max(m.rss_mb for m in runs)),
        "ready_s": round(median(taken.ready_s[contender]), 2),
        "errors": sum(m.load.errors for m in runs),
        "others_cores": round(median(m.others_cores for m in runs), 2),
    }


def _ms(runs: list[Measured], name: str) -> float:
    figures: list[float] = [getattr(m.load, name) for m in runs]
    return round(median(figures), 2)


def to_dict(taken: Taken, judged: list[Judged]) -> dict[str, Any]:
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": machine.python_version()},
        "services": rows(taken),
        "wrong_answers": taken.wrong,
        "prediction_log": {**taken.balance.counts, "in_stream": taken.balance.in_stream},
        "targets": [
            {"what": j.what, "figure": j.figure, "target": j.limit, "at_least": j.at_least, "met": j.met, "why": j.why} for j in judged
        ],
        "held": held(judged),
    }


def held(judged: list[Judged]) -> bool:
    """Whether no judged target was missed."""
    return all(j.met is not False for j in judged)


def show(model: str, taken: Taken, judged: list[Judged]) -> None:
    print_table(_services(model, taken))
    print_table(_targets(judged))
    counts = ", ".join(f"{name} {count:,}" for name, count in taken.balance.counts.items())
    say(f"prediction log: {counts}; added to the stream {taken.balance.in_stream:,}")
    if unlike := {name: count for name, count in taken.wrong.items() if count and name != OURS}:
        say(f"peers' predictions unlike Booster.predict: {', '.join(f'{name} {count}' for name, count in unlike.items())}")
    say("[green]every judged target is met[/green]" if held(judged) else "[red]a target is missed[/red]", markup=True)


def _services(model: str, taken: Taken) -> Any:
    from rich.table import Table

    shown = Table(title=f"Prediction service and peers, one process, model {model}", title_justify="left", header_style="bold")
    names = ("service", "load", "req/s", "ours ×", "CPU ×", "p50 ms", "p95", "p99", "CPU s/1k", "MB", "ready s", "errors", "others")
    for name in names:
        shown.add_column(name, justify="left" if name in ("service", "load") else "right", no_wrap=name != "service")
    for row in rows(taken):
        shown.add_row(*("" if value is None else f"{value:,}" if isinstance(value, int | float) else value for value in row.values()))
    return shown


def _targets(judged: list[Judged]) -> Any:
    from rich.table import Table

    shown = Table(title="Targets", title_justify="left", header_style="bold")
    for name in ("what", "figure", "target", "met"):
        shown.add_column(name, justify="left" if name in ("what", "met") else "right")
    for j in judged:
        figure = "-" if j.figure is None else f"{j.figure:,.3g}" if j.figure < 1000 else f"{j.figure:,.0f}"
        met = {True: "[green]yes[/green]", False: "[red]no[/red]", None: f"not judged: {j.why}"}[j.met]
        shown.add_row(j.what, figure, f"{'≥' if j.at_least else '≤'} {j.limit:,g}", met)
    return shown


def show_profile(case: Case, packages: list[Share], functions: list[Share], as_json: bool) -> None:
    """Percent of the samples; what is below half a percent is left out."""
    found = {
        "by package": [_share(s) for s in packages if s.own >= _SHOWN],
        "by function": [_share(s) for s in functions if s.own >= _SHOWN],
    }
    if as_json:
        print_json({"case": case.title} | found)
        return
    for name, shares in found.items():
        table(f"Where the time goes, {name}: {case.title}", shares, empty="no samples")


def _share(share: Share) -> dict[str, Any]:
    return {"where": share.where, "own %": round(100 * share.own, 1), "within %": round(100 * share.within, 1)}
