"""Medians over the rounds, and how they are shown.

Belongs here: from measurements to tables. Does not belong here: what must be reached (`targets`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mlplatform.local.bench_serving.cases import CASES, Measured
from mlplatform.local.bench_serving.contenders import CONTENDERS
from mlplatform.printing import table


@dataclass(frozen=True)
class Report:
    """`ready_s` and `wrong` by contender."""

    measured: Sequence[Measured]
    ready_s: Mapping[str, float]
    wrong: Mapping[str, int]

    @property
    def held(self) -> bool:
        return not self.wrong["ours"] and not any(m.load.errors for m in self.measured if m.contender == "ours")

    def rows(self) -> list[dict[str, Any]]:
        """One per contender and case."""
        pairs = dict.fromkeys((m.contender, m.case) for m in self.measured)
        return [self._row(contender, [m for m in self.measured if (m.contender, m.case) == (contender, case)]) for contender, case in pairs]

    def _row(self, contender: str, runs: list[Measured]) -> dict[str, Any]:
        return {
            "service": CONTENDERS[contender].title,
            "load": CASES[runs[0].case].title,
            "req/s": round(median(m.load.per_s for m in runs), 1),
            "p50 ms": round(median(m.load.p50_ms for m in runs), 2),
            "p95 ms": round(median(m.load.p95_ms for m in runs), 2),
            "p99 ms": round(median(m.load.p99_ms for m in runs), 2),
            "CPU s/1k": round(median(m.cpu_s_per_1000 for m in runs), 4),
            "MB": round(max(m.rss_mb for m in runs)),
            "ready s": round(self.ready_s[contender], 2),
            "errors": sum(m.load.errors for m in runs),
            "others": round(median(m.others_cores for m in runs), 2),
        }

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows(), "wrong_answers": dict(self.wrong), "held": self.held}


def show(report: Report) -> None:
    table("Prediction service", report.rows(), empty="nothing was measured")
