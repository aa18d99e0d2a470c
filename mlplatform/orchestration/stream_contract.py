"""How many rows of each day keep their contract, as a streaming worker has them so far, and which days break its limit.

Belongs here: counting by day, and the gate over it. Does not belong here: judging rows (room `validation`), stopping views
(`stream_faults`).

The gate is the one of the batch (check `contract`): more rows set aside on a day than `max_quarantine_share` allows. Two of its
parts need what a worker does not have: entries that cannot be read have no time of their own, and shares of nulls are judged
when the day is in. Both stay with the batch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from mlplatform.features.plan import ViewPlan
from mlplatform.specs import SourceSpec
from mlplatform.validation.split import DAY, SplitResult
from mlplatform.validation.table import quarantine_allowed

# (day, whether the rows were set aside) → how many
Days = Counter[tuple[date, bool]]


class ContractBreachError(ValueError):
    """More rows of a day break their contract than it allows: what is computed from the rest may be wrong."""


@dataclass(frozen=True)
class DayRows:
    """One source's rows of one day: those that keep the contract, and those set aside."""

    kept: int
    broken: int

    @property
    def share(self) -> float:
        return self.broken / (self.kept + self.broken) if self.broken else 0.0


@dataclass
class ContractWatch:
    """`lateness`: days that reach no further back are still being written."""

    sources: Mapping[str, SourceSpec]
    lateness: timedelta
    _days: dict[str, Days] = field(default_factory=dict)

    def restart(self) -> None:
        self._days = {}

    def move(self, source: str, before: Days, after: Days) -> None:
        """Rows of some groups were judged as `before` and are judged as `after`."""
        days = self._days.setdefault(source, Counter())
        days.subtract(before)
        days.update(after)

    def of(self, source: str, day: date) -> DayRows:
        days = self._days.get(source, Counter())
        return DayRows(days[day, False], days[day, True])

    def breaches(self, now: datetime) -> dict[str, str]:
        """The sources with a day that is still being written and breaks the limit, each with the days in words."""
        first = (now - self.lateness).date()
        found: dict[str, list[str]] = {}
        for source, days in self._days.items():
            for day in sorted({day for day, broken in days if broken and day >= first}):
                rows, contract = self.of(source, day), self.sources[source].contract
                if rows.broken > quarantine_allowed(contract, rows.kept + rows.broken):
                    told = f"{day}: {rows.broken} of {rows.kept + rows.broken} rows ({rows.share:.1%})"
                    found.setdefault(source, []).append(f"{told}, allowed {contract.max_quarantine_share:.1%}")
        return {source: "; ".join(told) for source, told in found.items()}

    def kept_back(self, plans: Sequence[ViewPlan], now: datetime) -> dict[str, BaseException]:
        """The views that may not be computed now, and why."""
        breaches = self.breaches(now)
        found: dict[str, BaseException] = {}
        for plan in plans if breaches else ():
            if told := [f"{source} breaks its contract, {breaches[source]}" for source in plan.recipe.inputs if source in breaches]:
                found[plan.name] = ContractBreachError("; ".join(told))
        return found

    def forget(self, before: date) -> None:
        for source, days in self._days.items():
            self._days[source] = Counter({key: n for key, n in days.items() if key[0] >= before})


def by_day(result: SplitResult) -> Days:
    days: Days = Counter()
    for frame, broken in ((result.validated, False), (result.quarantined, True)):
        if not frame.is_empty():
            days.update({(day, broken): n for day, n in frame[DAY].value_counts().iter_rows() if day is not None})
    return days
