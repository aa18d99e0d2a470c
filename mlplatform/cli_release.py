"""`mlplatform history | deployment | approve | reject | judge | experiment | promote | rollback`: what serves, and changing it.

Belongs here: options and printing. Does not belong here: whether a step may be (room `deployment`), carrying it out
(`orchestration`), gathering answers (`queries_release`).
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlplatform.cli_options import HERE, NEWEST_VERSION, Actor, AsJson, Home, Model, settings_of
from mlplatform.cli_options import now as time_now
from mlplatform.printing import print_json, say, short_time, table

if TYPE_CHECKING:
    from mlplatform.deployment.decide import Decision
    from mlplatform.orchestration.resources import Clients
    from mlplatform.specs import ModelSpec

Number = Annotated[int, typer.Argument(metavar="VERSION", min=1, max=NEWEST_VERSION, help="Number of the version.")]


def _reason(text: str) -> str:
    """One line with something in it."""
    told = " ".join(text.split())
    if not told:
        raise typer.BadParameter("say why: others will ask")
    return told


Reason = Annotated[str, typer.Option(help="Why: it goes into the history.", callback=_reason)]


def history(
    model: Model,
    at: Annotated[str | None, typer.Option(help="Also say what served then: 2013-09-01T14:03, 2013-09-01, or 14:03 of today.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every entry with its hash. Status 1 where one differs.")] = False,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """What was deployed when, by whom and why; with --at, what served at that moment (UTC); with --verify, whether that is unaltered."""
    from mlplatform import queries, queries_release

    settings = settings_of(home)
    entries = queries.history(settings, model)
    asked = None if at is None else queries.moment(at, time_now(settings))
    if asked is not None and asked > (today := time_now(settings)):
        raise queries.QuestionError(f"{asked:%Y-%m-%d %H:%M} has not come yet: the platform's clock stands at {today:%Y-%m-%d %H:%M} UTC")
    served = None if asked is None else queries_release.served(entries, asked)
    found = queries_release.verified(settings, model) if verify else None
    rows = [queries.entry_row(entry) for entry in entries]
    if as_json:
        answer: dict[str, Any] = {"model": model, "entries": rows}
        answer |= {} if served is None else served
        print_json(answer | ({} if found is None else {"verification": found}))
    else:
        _table(f"{model}: deployments (UTC)", rows)
        if asked is not None and served is not None:
            say(f"at {asked:%Y-%m-%d %H:%M:%S} UTC: {queries_release.served_text(served)}")
        for line in () if found is None else queries_release.verified_lines(found):
            say(line)
    raise typer.Exit(1 if found is not None and found["faults"] else 0)


def deployment(
    model: Model,
    last: Annotated[int, typer.Option(min=1, help="How many versions and entries are shown.")] = 8,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """What serves now: split, way back, states of the newest versions, the judge's last verdict, the last entries."""
    from mlplatform import queries_release

    told = queries_release.deployment(_there(home, model), model, last)
    if as_json:
        print_json(told)
        return
    table(f"{model}: who answers", [row | {"percent": f"{row['percent']:g}"} for row in told["variants"]], empty="nothing serves")
    say(f"previous      {_version(told['previous'])}")
    say(f"shadow        {_version(told['shadow'])}")
    verdict = told["verdict"]
    say(f"last verdict  {told['no_verdict'] if verdict is None else queries_release.verdict_text(verdict)}")
    for difference in told["differences"]:
        say(f"differs       {difference}")
    if told["rules_fault"]:
        say(f"fault         {told['rules_fault']}: the services keep the rules they had")
    table("newest versions", told["versions"], empty="no version is registered")
    _table("last entries (UTC)", told["entries"])


def approve(model: Model, number: Number, reason: Reason, actor: Actor = "", home: Home = HERE) -> None:
    """Sign a version off whose gates passed, with the evaluation it has now; recorded. Where it waited for that, its canary begins."""
    clients = _writing(home, model)
    from mlplatform.orchestration.canary_state import release_approved
    from mlplatform.orchestration.release_state import approve as sign_off

    who = actor or clients.settings.acts_as
    new = sign_off(clients, model, number, who, reason)
    say(f"{model}: version {number} is approved{'' if new else ' already'}")
    if (released := release_approved(clients, model, number, who)) is not None:
        say(f"{model}: {released.action} ({released.reason})")


def reject(model: Model, number: Number, reason: Reason, actor: Actor = "", home: Home = HERE) -> None:
    """Keep a version from serving until somebody approves it; recorded."""
    clients = _writing(home, model)
    from mlplatform.orchestration.release_state import reject as turn_down

    new = turn_down(clients, model, number, actor or clients.settings.acts_as, reason)
    say(f"{model}: version {number} is rejected{'' if new else ' already'}")


def promote(model: Model, number: Number, actor: Actor = "", home: Home = HERE) -> None:
    """Let a version serve that passed its gates. Status 1 where it is refused; either is recorded."""
    clients = _writing(home, model)
    from mlplatform.orchestration.serving_state import promote as move

    decision = move(clients, model, number, actor=actor or clients.settings.acts_as, by_hand=True)
    _tell(decision)
    raise typer.Exit(1 if decision.action == "refuse" else 0)


def judge(
    model: Model,
    act: Annotated[bool, typer.Option("--act", help="Also carry the next step out, as the sensor does.")] = False,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """What the judge says of the canary that answers now: each measure beside the champion's, the verdict, the next step."""
    clients = _writing(home, model)
    from dataclasses import asdict

    from mlplatform.orchestration.assets.canary import rows
    from mlplatform.orchestration.canary_trial import judge_canary

    told = judge_canary(clients, _spec(model), actor=clients.settings.acts_as, act=act)
    if told is None:
        print_json({"model": model, "canary": None}) if as_json else say(f"{model}: no canary answers")
        return
    lines = rows(told)
    if as_json:
        verdict = {"verdict": told.verdict.word, "reason": told.step.reason, "step": told.step.action, "percent": told.step.percent}
        measures = [asdict(finding) for finding in told.verdict.findings]
        print_json({"model": model, "canary": told.trial.canary, "champion": told.trial.champion, **verdict, "measures": measures})
        return
    table(f"{model}: canary {told.trial.canary} beside champion {told.trial.champion}, {told.progress.percent:g} %", lines, empty="")
    say(f"verdict  {told.verdict.word}: {told.verdict.reason}")
    more = "" if act or told.step.action == "hold" else "; --act carries it out"
    say(f"step     {told.step.action} ({told.step.reason}){more}")
    for reason in (*told.refused, *((told.unheard,) if told.unheard else ())):
        say(f"note     {reason}")


def experiment(model: Model, home: Home = HERE, as_json: AsJson = False) -> None:
    """The A/B experiment that runs: entities per arm, what differs from the control, and how sure that is. Readable at any time."""
    clients = _there(home, model)
    from dataclasses import asdict

    from mlplatform.orchestration.experiment_state import effect_rows, experiment_result

    told = experiment_result(clients, _spec(model))
    if as_json:
        print_json({"model": model, "result": None if told is None else asdict(told)})
        return
    if told is None:
        say(f"{model}: no experiment with outcomes runs; docs/traffic.md says how one is begun")
        return
    table(f"{model}: {told.experiment}, since {short_time(told.since.isoformat())}", effect_rows(told), empty="")
    say("entities  " + ", ".join(f"{arm} {n:,}" for arm, n in told.entities.items()))
    if told.mismatch:
        say(f"MISMATCH  these numbers cannot come from the arms' weights (e-value {told.srm_e:.3g}): believe no effect before you know why")
    if told.crossed:
        say(f"note      {told.crossed:,} entities were answered by more than one arm; each counts where it was first")


def rollback(model: Model, reason: Reason, actor: Actor = "", home: Home = HERE) -> None:
    """Back to the version that served before, in one step; recorded."""
    clients = _writing(home, model)
    from mlplatform.orchestration.serving_state import roll_back

    _tell(roll_back(clients, model, reason, actor=actor or clients.settings.acts_as))


def _spec(model: str) -> "ModelSpec":
    from mlplatform.orchestration.release_state import declared
    from mlplatform.queries import QuestionError

    if (spec := declared(model)) is None:
        raise QuestionError(f"{model} is registered, but no catalog declares it: there is no policy to judge it by")
    return spec


def _writing(home: Path, model: str) -> "Clients":
    """The platform's clients, after a look whether everything that is about to be written to answers: no half moves.

    The name first, so that a misspelt one is told as such, whatever is down.
    """
    clients = _reading(home, model)
    from mlplatform.queries import require_redis

    # Who types the command reads the answer; that a sink failed is still told.
    logging.getLogger("mlplatform.alerts").setLevel(logging.ERROR)
    require_redis(clients.settings)
    clients.registry.check()
    return clients


def _there(home: Path, model: str) -> "Clients":
    """The clients of a platform that is there, for what only reads it: a mistyped home must not become one."""
    clients = _reading(home, model)
    from mlplatform.queries import require_registry

    require_registry(clients.settings, home)
    return clients


def _reading(home: Path, model: str) -> "Clients":
    settings = settings_of(home)
    # MLflow's own client would go on for a quarter of an hour with a server whose health page answers and nothing else.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlplatform.orchestration.resources import Clients
    from mlplatform.queries import require_known

    require_known(settings, model)
    return Clients(settings)


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    from mlplatform.deployment.history import told_action

    shown = [
        {
            "at": short_time(row["at"]),
            "action": told_action(row["action"], row["evidence"]),
            **{name: row[name] for name in ("version", "previous_version", "actor", "reason")},
        }
        for row in rows
    ]
    table(title, shown, empty="never deployed")


def _tell(decision: "Decision") -> None:
    before = "nothing" if decision.before is None else _version(decision.before)
    now = {
        "promote": f"version {decision.version} serves, instead of {before}",
        "rollback": f"version {decision.version} serves again, instead of {before}",
        "refuse": f"version {decision.version} is refused; {before} goes on serving",
        "none": "nothing changed",
    }[decision.action]
    say(f"{decision.model}: {now} ({decision.reason})")


def _version(number: int | None) -> str:
    return "none" if number is None else f"version {number}"
