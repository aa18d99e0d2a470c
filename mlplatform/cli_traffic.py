"""`mlplatform traffic MODEL`: how a model's versions share its requests.

Belongs here: options, order of the changes, printing. Does not belong here: whether a change may be (`deployment.traffic`), carrying it
out (`orchestration.traffic_state`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlplatform.cli_faults import document
from mlplatform.cli_options import HERE, NEWEST_VERSION, AsJson, Home, settings_of, within
from mlplatform.printing import print_json, say, table

if TYPE_CHECKING:
    from mlplatform.deployment.traffic import TrafficState
    from mlplatform.orchestration.resources import Clients

_NONE = "none"


def traffic(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    canary: Annotated[float | None, typer.Option(callback=within(0, 100), help="Percent of the entities the canary shall answer.")] = None,
    canary_version: Annotated[str | None, typer.Option(metavar="VERSION", help="The canary's version, or 'none'.")] = None,
    shadow_version: Annotated[str | None, typer.Option(metavar="VERSION", help="The shadow's version, or 'none'.")] = None,
    rules: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A file with the whole rules as JSON: experiments, salts, sticky fields."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why: it goes into the history.")] = "by hand",
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Who answers which share of a model's requests; with options, change it. Status 1 where a change is refused."""
    changing = any(option is not None for option in (canary, canary_version, shadow_version, rules))
    from mlplatform.orchestration.resources import Clients
    from mlplatform.orchestration.traffic_state import traffic_state
    from mlplatform.queries import require_redis

    clients = Clients(settings_of(home))
    clients.registry.check()
    faults: list[str] = []
    if changing:
        require_redis(clients.settings)
        faults = _change(clients, model, canary, canary_version, shadow_version, rules, reason)
    state = traffic_state(clients, model)
    if as_json:
        print_json(_told(state) | {"refused": faults})
    else:
        _show(state, faults)
    raise typer.Exit(1 if faults else 0)


def _change(
    clients: "Clients",
    model: str,
    canary: float | None,
    canary_version: str | None,
    shadow_version: str | None,
    rules: Path | None,
    reason: str,
) -> list[str]:
    """Carries the changes out in an order that is right after each: a version first, then its weight. Stops at the first refusal."""
    from functools import partial

    from mlplatform.contracts import CANARY, SHADOW, TrafficRules
    from mlplatform.orchestration.traffic_state import set_canary_weight, set_rules, set_side

    who = (clients.settings.acts_as, reason)
    given = document(rules, TrafficRules) if rules is not None else None
    steps = []
    if canary_version == _NONE:
        steps.append(partial(set_canary_weight, clients, model, 0.0, *who))
    if canary_version is not None:
        steps.append(partial(set_side, clients, model, CANARY, _number(canary_version), *who))
    if shadow_version is not None:
        steps.append(partial(set_side, clients, model, SHADOW, _number(shadow_version), *who))
    if given is not None:
        steps.append(partial(set_rules, clients, model, given, *who))
    if canary is not None:
        steps.append(partial(set_canary_weight, clients, model, canary, *who))
    for step in steps:
        change = step()
        if change.refused:
            return list(change.reasons)
    return []


def _number(text: str) -> int | None:
    from mlplatform.queries import QuestionError

    if text == _NONE:
        return None
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:20]) <= NEWEST_VERSION:
        raise QuestionError(f"'{text}' is no version: write its number, or 'none'")
    return int(text)


def _told(state: "TrafficState") -> dict[str, Any]:
    from mlplatform.contracts import SHADOW

    return {
        "model": state.model,
        "variants": [{"variant": name, "version": version, "percent": percent} for name, version, percent in state.shares()],
        "shadow_version": state.aliases.get(SHADOW),
        "rules": state.rules.model_dump(mode="json") if state.rules else None,
        "fault": state.fault or None,
    }


def _show(state: "TrafficState", faults: list[str]) -> None:
    told = _told(state)
    rows = [row | {"percent": f"{row['percent']:g}"} for row in told["variants"]]
    table(f"{state.model}: who answers", rows, empty="nothing serves")
    shadow = told["shadow_version"]
    say(f"shadow  {'none' if shadow is None else f'version {shadow}'}")
    if state.fault:
        say(f"fault   {state.fault}: the services keep the rules they had")
    for fault in faults:
        say(f"refused {fault}")
