"""The command line: `mlplatform …`.

Belongs here: commands, options, printing, and faults in one line with their mend. Does not belong here: any work of the
platform. Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlplatform import cli_features
from mlplatform.cli_bench import bench
from mlplatform.cli_keys import keys
from mlplatform.cli_online import online
from mlplatform.cli_options import HERE, AsJson, Home
from mlplatform.cli_options import now as _now
from mlplatform.cli_options import settings_of as _settings
from mlplatform.cli_stream import stream
from mlplatform.cli_traffic import traffic
from mlplatform.printing import print_json, say, table

if TYPE_CHECKING:
    from mlplatform.deployment.decide import Decision
    from mlplatform.orchestration.resources import Clients

app = typer.Typer(
    help="The ML platform on this machine: run it, ask it, deploy with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Typer's own rich panels would import rich for every --help.
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.command()(cli_features.features)
app.command()(cli_features.fingerprint)
app.add_typer(online, name="online")
app.add_typer(keys, name="keys")
app.command()(stream)
app.command()(traffic)

Model = Annotated[str, typer.Argument(help="Name of the model, as flight_disruption.")]

# What to do about a fault, by the name of its class or of a base class of it: naming classes here would import their libraries.
_MENDS = {
    "RegistryUnreachableError": "is the platform running? `mlplatform up`, or look with `mlplatform doctor`",
    "UnknownModelError": "`mlplatform models` lists what is registered",
    "NoPreviousGenerationError": "`mlplatform online status` shows the generations there are",
    "TakenOverError": "`mlplatform online status` shows what is read; nothing else is to be done",
    "VerificationError": "readers are not affected; `mlplatform doctor`, then try again",
    "Failure": "",
    "NothingToRollBackToError": "`mlplatform history MODEL` shows what served",
    "HomeInUseError": "`mlplatform down` ends it, or take another --home",
    "ServiceFailedError": "the log named above tells why; `mlplatform doctor` looks at the rest",
    "StreamDownError": "is the platform running? `mlplatform up`, or look with `mlplatform doctor`",
    "RedisError": "is the platform running? `mlplatform up`, or look with `mlplatform doctor`",
    "MissingTableError": "nothing is built yet: `mlplatform demo`, or materialize the asset in the Dagster UI",
    "ValidationError": "mend the MLPLATFORM_* variables named; `mlplatform doctor` lists them all",
    "NothingBuiltError": "`mlplatform demo` or `mlplatform up` builds one there; or name the --home that is meant",
    "PortTakenError": "take another --metrics-port, or end what listens there; `mlplatform status` shows a worker that runs",
    "QuestionError": "",
    "KeysFileError": "restore it, or name another with --file",
    "ModuleNotFoundError": "`make install`",
}


_STOPPED = (129, 130, 143)  # by SIGHUP, SIGINT or SIGTERM


def main() -> None:
    """Entry point. Faults end with status 1 and two lines; `MLPLATFORM_DEBUG=1` shows the trace."""
    # Nothing asked here calls home, and MLflow would keep an id for that outside HOME.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        app()
    except SystemExit as end:
        if end.code in _STOPPED:
            typer.echo("stopped: what this command started has ended; the same command begins again", err=True)
        raise
    except Exception as fault:  # the outermost boundary: a person reads this, not a program
        if os.environ.get("MLPLATFORM_DEBUG") == "1":
            raise
        _complain(fault)
        sys.exit(1)


def _complain(fault: Exception) -> None:
    lines = str(fault).strip().splitlines() or [type(fault).__name__]
    names = [kind.__name__ for kind in type(fault).__mro__]
    mend = next((_MENDS[name] for name in names if name in _MENDS), "MLPLATFORM_DEBUG=1 shows where it comes from")
    if "ValidationError" in names and isinstance(fault, ValueError):
        from mlplatform.doctor import in_one_line

        lines = [in_one_line(fault)]
    typer.echo(f"error: {lines[0]}", err=True)
    # The end of a service's log is the cause; anything else in further lines is for the trace.
    for line in lines[1:] if "ServiceFailedError" in names else ():
        typer.echo(f"  {line}", err=True)
    if mend:
        typer.echo(f"mend:  {mend}", err=True)


# --- running it ------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    days: Annotated[int, typer.Option(min=1, max=30, help="Days of September 2013 that pass in fast motion.")] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running, as `up` does.")] = False,
    trials: Annotated[int | None, typer.Option(min=1, help="Tuning trials, instead of the model's own number.")] = None,
    home: Home = HERE,
) -> None:
    """The whole loop on real flights, in minutes: from source systems to a served prediction to a drift report.

    It begins from nothing: tables, models and history that lie under HOME are removed. Not where a platform runs.
    """
    from mlplatform.local.demo import run_demo

    raise typer.Exit(run_demo(home, days, keep, trials))


@app.command()
def up(
    speed: Annotated[float, typer.Option(min=0, help="How many simulated seconds pass in a second.")] = 1.0,
    home: Home = HERE,
) -> None:
    """Start the platform and leave it running: lineage UI, MLflow, prediction service, schedules and sensors."""
    from mlplatform.local.up import run_up

    raise typer.Exit(run_up(home, speed))


@app.command()
def down(home: Home = HERE) -> None:
    """Stop what `up` or `demo --keep` left running."""
    from mlplatform.local.up import run_down

    raise typer.Exit(run_down(home))


@app.command()
def replay(
    model: Model,
    start: Annotated[str, typer.Option("--from", help="First moment, as 2013-09-03 or 2013-09-03T12:00 (UTC).")],
    end: Annotated[str, typer.Option("--to", help="The moment after the last.")],
    home: Home = HERE,
) -> None:
    """Ask again for every flight of past days, by HTTP, with the features of now."""
    from mlplatform.local.replay import run_replay
    from mlplatform.queries import QuestionError, moment

    now = _now(_settings(home))
    first, last = moment(start, now), moment(end, now)
    if last <= first:
        raise QuestionError(f"--to {end} is not after --from {start}: nothing would pass")
    raise typer.Exit(run_replay(model, first, last, home))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def feast(context: typer.Context, home: Home = HERE) -> None:
    """Feast's own command line on our feature repository, as `mlplatform feast -- feature-views list`."""
    from mlplatform.local.feast_command import run_feast

    run_feast(_settings(home), context.args)


# --- asking it -------------------------------------------------------------------------------------------------------


@app.command()
def status(home: Home = HERE, as_json: AsJson = False) -> None:
    """What runs where, what serves, and when each stage was last written."""
    from mlplatform.queries import status as ask
    from mlplatform.queries_stream import told as streaming

    found = ask(home, _settings(home))
    if as_json:
        print_json(found)
        return
    table(f"services under {home}", found["services"], empty="nothing runs: `make up`")
    clock = found["clock"]
    say(f"clock  {clock['now'] or 'not set yet'}{' (simulated)' if clock['simulated'] else ''}")
    table(
        "serving",
        found["serving"] or [],
        empty=found["serving_fault"] or "no model is loaded",
    )
    say(f"streaming worker  {streaming(found['stream'])}")
    table(
        "last written (wall time)",
        found["stages"] or [],
        empty="the lake is not on this machine" if found["stages"] is None else "nothing yet",
    )


@app.command()
def doctor(home: Home = HERE, as_json: AsJson = False) -> None:
    """Look at configuration, services, device and versions, and say how to mend each fault. Status 1 where there is one."""
    from mlplatform.doctor import diagnose, worst

    findings = diagnose(home)
    verdict = worst(findings)
    if as_json:
        print_json({"status": verdict, "checks": [vars(finding) for finding in findings]})
    else:
        from rich.markup import escape

        marks = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}
        for finding in findings:
            say(f"{marks[finding.level]} [bold]{finding.check:<17}[/] {escape(finding.detail)}", markup=True)
            if finding.mend and finding.level != "ok":
                say(f"  {'':<17} [dim]→[/] {escape(finding.mend)}", markup=True)
    raise typer.Exit(1 if verdict == "fail" else 0)


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help="One model's versions.")] = None, home: Home = HERE, as_json: AsJson = False
) -> None:
    """The registered models, or the versions of one with their gates and metrics."""
    from mlplatform import queries

    settings = _settings(home)
    rows = queries.models(settings) if model is None else queries.versions(settings, model)
    if as_json:
        print_json(rows)
        return
    if model is not None:
        rows = [_version_line(row) for row in rows]
    empty = "no model is registered yet" if model is None else "no version is registered yet"
    table(model or "models", rows, empty=f"{empty}: `make demo`, or materialize model/… in the Dagster UI")


def _version_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """What fits a terminal; hashes and addresses are in the JSON."""
    shown = ("auc", "log_loss", "ece", "saving")
    metrics = [f"{name} {value:.4f}" for name in shown if isinstance(value := row["metrics"].get(name), int | float)]
    short = {name: row[name] for name in ("version", "aliases", "gates")}
    return {**short, "created": _short_time(row["created_at"]), "metrics": ", ".join(metrics)}


def _short_time(iso: str) -> str:
    return iso[:19].replace("T", " ")


@app.command()
def history(
    model: Model,
    at: Annotated[str | None, typer.Option(help="Also say what served then: 2013-09-01T14:03, 2013-09-01, or 14:03 of today.")] = None,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """What was deployed when, by whom and why; with --at, what served at that moment (UTC)."""
    from mlplatform import queries

    settings = _settings(home)
    entries = queries.history(settings, model)
    rows = [queries.entry_row(entry) for entry in entries]
    asked = None if at is None else queries.moment(at, _now(settings))
    found = None if asked is None else queries.served_at(entries, asked)
    if as_json:
        answer: dict[str, Any] = {"model": model, "entries": rows}
        if asked is not None:
            answer |= {"at": asked.isoformat(), "served": None if found is None else queries.entry_row(found)}
        print_json(answer)
        return
    short = ("at", "action", "version", "previous_version", "actor", "reason")
    lines = [{name: row[name] for name in short} | {"at": _short_time(row["at"])} for row in rows]
    table(f"{model}: deployments (UTC)", lines, empty="never deployed")
    if asked is not None:
        answer_text = (
            "nothing served yet"
            if found is None
            else f"version {found.version} served, since {found.at:%Y-%m-%d %H:%M:%S} ({found.action} by {found.actor})"
        )
        say(f"at {asked:%Y-%m-%d %H:%M:%S} UTC: {answer_text}")


@app.command()
def version(as_json: AsJson = False) -> None:
    """Versions of the platform and of Python."""
    from importlib.metadata import version as installed

    found = {"mlplatform": installed("mlplatform"), "python": ".".join(map(str, sys.version_info[:3]))}
    if as_json:
        print_json(found)
    else:
        typer.echo(f"mlplatform {found['mlplatform']} (Python {found['python']})")


# --- deploying -------------------------------------------------------------------------------------------------------


@app.command()
def promote(
    model: Model, number: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="The version that shall serve.")], home: Home = HERE
) -> None:
    """Let a version serve that passed its gates. Status 1 where it is refused; either is recorded."""
    clients = _clients(home, model)
    from mlplatform.orchestration.serving_state import promote as move
    from mlplatform.queries import actor

    decision = move(clients, model, number, actor=actor(), by_hand=True)
    _tell(decision)
    raise typer.Exit(1 if decision.action == "refuse" else 0)


@app.command()
def rollback(model: Model, reason: Annotated[str, typer.Option(help="Why: it goes into the history.")], home: Home = HERE) -> None:
    """Back to the version that served before, in one step; recorded."""
    clients = _clients(home, model)
    from mlplatform.orchestration.serving_state import roll_back
    from mlplatform.queries import actor

    _tell(roll_back(clients, model, reason, actor=actor()))


def _clients(home: Path, model: str) -> "Clients":
    """The platform's clients, after a look whether everything that is about to be written to answers: no half moves.

    The name first, so that a misspelt one is told as such, whatever is down.
    """
    settings = _settings(home)
    from mlplatform.orchestration.resources import Clients
    from mlplatform.queries import require_known

    clients = Clients(settings)
    require_known(settings, model)
    clients.redis.ping()
    clients.registry.check()
    return clients


def _tell(decision: "Decision") -> None:
    before = "nothing" if decision.before is None else f"version {decision.before}"
    now = {
        "promote": f"version {decision.version} serves, instead of {before}",
        "rollback": f"version {decision.version} serves again, instead of {before}",
        "refuse": f"version {decision.version} is refused; {before} goes on serving",
        "none": "nothing changed",
    }[decision.action]
    say(f"{decision.model}: {now} ({decision.reason})")


if __name__ == "__main__":
    main()
