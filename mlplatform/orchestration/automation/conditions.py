"""Every automation condition by name, each with the incident it prevents.

Belongs here: when an asset is materialized by itself. Does not belong here: schedules and sensors (own files).
"""

from typing import Any

import dagster as dg


def after_gates() -> dg.AutomationCondition[Any]:
    """Follow upstream, but only past its blocking checks.

    Prevents: a partition whose validation failed flowing on at the next tick. Plain `eager()` does not look at checks,
    and a failed blocking check stops only the run it failed in.
    """
    return (dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed()).with_label("after_gates")


def after_gates_any_day() -> dg.AutomationCondition[Any]:
    """As `after_gates`, for daily partitions of any day.

    Prevents: late data of yesterday being ignored. `eager()` looks at the latest time window only; with late events (and
    with a simulated clock, whose "today" is not the scheduler's) the day that changed is another one.
    """
    return (
        dg.AutomationCondition.eager().without(dg.AutomationCondition.in_latest_time_window())
        & dg.AutomationCondition.all_deps_blocking_checks_passed()
    ).with_label("after_gates_any_day")


def newest_values() -> dg.AutomationCondition[Any]:
    """For an unpartitioned asset below a partitioned one: whenever any day was updated and passed its gates.

    Prevents: online values never refreshed. `eager()` asks for all upstream partitions to be there, the days of the
    future and of long ago included.
    """
    return (
        dg.AutomationCondition.any_deps_updated().since_last_handled()
        & dg.AutomationCondition.all_deps_blocking_checks_passed()
        & ~dg.AutomationCondition.any_deps_in_progress()
        & ~dg.AutomationCondition.in_progress()
    ).with_label("newest_values")


def when_declared() -> dg.AutomationCondition[Any]:
    """For what is made from declarations alone: once, and again whenever its code version changes.

    Prevents: a new installation training against an empty feature registry, or a changed view being read as it was
    declared before. A failed attempt waits for a person or the next change, and is not repeated at every tick.
    """
    changed: dg.AutomationCondition[Any] = dg.AutomationCondition.missing() | dg.AutomationCondition.code_version_changed()
    return (changed.since_last_handled() & ~dg.AutomationCondition.in_progress() & ~dg.AutomationCondition.execution_failed()).with_label(
        "when_declared"
    )
