"""The command line: `mlplatform …`.

Belongs here: commands, options, printing, and faults in one line with their mend. Does not belong here: any work of the
platform. Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mlplatform import cli_features, cli_rebuild, cli_release
from mlplatform.cli_bench import bench
from mlplatform.cli_faults import explain
from mlplatform.cli_keys import keys
from mlplatform.cli_online import online
from mlplatform.cli_options import HERE, AsJson, Home, Model, within
from mlplatform.cli_options import now as _now
from mlplatform.cli_options import settings_of as _settings
from mlplatform.cli_stream import stream
from mlplatform.cli_traffic import traffic
from mlplatform.printing import print_json, say, short_time, table

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
app.command()(cli_release.history)
app.command()(cli_release.deployment)
app.command()(cli_release.approve)
app.command()(cli_release.reject)
app.command()(cli_release.judge)
app.command()(cli_release.experiment)
app.command()(cli_release.promote)
app.command()(cli_release.rollback)
app.command()(cli_rebuild.rebuild)

_STOPPED = (129, 130, 143)  # by SIGHUP, SIGINT or SIGTERM


def main() -> None:
    """Entry point. Faults end with status 1 and say what is wrong and its mend (`cli_faults`); `MLPLATFORM_DEBUG=1` shows the trace."""
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
    told = explain(fault)
    for line in told.errors:
        typer.echo(f"error: {line}", err=True)
    for line in told.details:
        typer.echo(f"  {line}", err=True)
    for line in told.mends:
        typer.echo(f"mend:  {line}", err=True)


# --- running it ------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    days: Annotated[int | None, typer.Option(min=1, max=30, help="Days of September 2013 that pass; 2 unless given.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running, as `up` does.")] = False,
    trials: Annotated[int | None, typer.Option(min=1, max=10_000, help="Tuning trials, instead of the model's own number.")] = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="Train and serve every model, not the first alone.")] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Instead: a slow version, one with shuffled labels and a good one, each as canary.")
    ] = False,
    home: Home = HERE,
) -> None:
    """The whole loop on real flights, in minutes: from source systems to a served prediction to a drift report.

    It begins from nothing: tables, models and history that lie under HOME are removed. Not where a platform runs.
    """
    if release:
        if days is not None or all_models:
            raise typer.BadParameter("takes neither --days nor --all-models: it lasts until the judge has decided", param_hint="--release")
        from mlplatform.local.demo_release import run_release

        raise typer.Exit(run_release(home, keep, trials))
    from mlplatform.local.demo import run_demo

    raise typer.Exit(run_demo(home, 2 if days is None else days, keep, trials, all_models))


@app.command()
def up(
    speed: Annotated[float, typer.Option(callback=within(0, 86_400), help="How many simulated seconds pass in a second.")] = 1.0,
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
    from mlplatform.cli_faults import require
    from mlplatform.local.feast_command import run_feast

    settings = _settings(home)
    require("feast")
    run_feast(settings, context.args)


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
    shown = ("auc", "log_loss", "ece", "saving", "pinball_p50", "mae", "coverage")
    metrics = [f"{name} {value:.4f}" for name in shown if isinstance(value := row["metrics"].get(name), int | float)]
    stopped = ", ".join(gate["name"] for gate in row["gate_results"] if gate["blocking"] and not gate["passed"])
    short = {name: row[name] for name in ("version", "aliases", "gates")} | ({"gates": f"{row['gates']}: {stopped}"} if stopped else {})
    return {**short, "created": short_time(row["created_at"]), "metrics": ", ".join(metrics)}


@app.command()
def version(as_json: AsJson = False) -> None:
    """Versions of the platform and of Python."""
    from importlib.metadata import version as installed

    found = {"mlplatform": installed("mlplatform"), "python": ".".join(map(str, sys.version_info[:3]))}
    if as_json:
        print_json(found)
    else:
        typer.echo(f"mlplatform {found['mlplatform']} (Python {found['python']})")


if __name__ == "__main__":
    main()
