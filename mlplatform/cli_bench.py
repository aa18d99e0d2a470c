"""`mlplatform bench …`: the measurements behind the platform's promises.

Belongs here: commands and options. Does not belong here: measuring (`mlplatform.local.bench_*`).
"""

from typing import Annotated

import typer

from mlplatform.cli_options import HERE, AsJson, Home, within
from mlplatform.cli_stream import bench_stream

bench = typer.Typer(help="Measurements: what the platform's promises are checked with.", no_args_is_help=True, rich_markup_mode=None)
bench.command("stream")(bench_stream)


@bench.command()
def quality(
    walk: Annotated[bool, typer.Option("--walk", help="Instead: a retrain each month, through the gates and as a canary.")] = False,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Walks, each with retrains of another seed.")] = 1,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Model quality on a whole year, through the same assets, beside the baselines; or the year month by month."""
    if walk:
        from mlplatform.local.bench_walk import run_bench_walk

        raise typer.Exit(run_bench_walk(home, as_json, seeds))
    from mlplatform.local.bench_quality import run_bench_quality

    raise typer.Exit(run_bench_quality(home, as_json))


@bench.command("fingerprint")
def bench_fingerprint(as_json: AsJson = False) -> None:
    """Cells hashed in a second, beside a digest per row and MLflow's digest, and what each of them notices."""
    from mlplatform.local.bench_fingerprint import run_bench_fingerprint

    raise typer.Exit(run_bench_fingerprint(as_json))


@bench.command("judge")
def bench_judge(
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the canaries, fewer looks.")] = False,
    seed: Annotated[int, typer.Option(help="Of the simulated traffic.")] = 1,
    as_json: AsJson = False,
) -> None:
    """How often the canary judge is wrong, and how soon it is right, over simulated canaries."""
    from mlplatform.local.bench_judge import run_bench_judge

    raise typer.Exit(run_bench_judge(quick, seed, as_json))


@bench.command(name="online")
def bench_online(
    entities: Annotated[int, typer.Option(min=1000, max=10_000_000, help="Entities of each of the three views.")] = 30_000,
    as_json: AsJson = False,
) -> None:
    """The online store beside Feast's own Redis store: writing, reading, memory. Starts a Valkey of its own."""
    from mlplatform.local.bench_online import run_bench_online

    raise typer.Exit(run_bench_online(entities, as_json))


@bench.command("join")
def bench_join(
    rows: Annotated[int | None, typer.Option(min=1, max=1_000_000_000, help="Entity rows: 300,000, or 10,000,000 with --memory.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="The peak memory of a large join instead of the race.")] = False,
    rounds: Annotated[int, typer.Option(min=1, max=1_000, help="Rounds of the race, each in a fresh order.")] = 3,
    as_json: AsJson = False,
) -> None:
    """The training join beside bare Polars and Feast's own stores; or its memory."""
    from mlplatform.local.bench_join import run_bench_join, run_bench_join_memory

    if memory:
        raise typer.Exit(run_bench_join_memory(rows or 10_000_000, as_json))
    raise typer.Exit(run_bench_join(rows or 300_000, rounds, as_json))


@bench.command("rollback")
def bench_rollback(
    rollbacks: Annotated[int, typer.Option(min=1, help="How many, each after a promotion.")] = 20,
    connections: Annotated[int, typer.Option(min=1, help="That ask without a pause meanwhile.")] = 4,
    as_json: AsJson = False,
) -> None:
    """From the decision to roll back to the first answer of the old version, under load. Starts a platform of its own."""
    from mlplatform.local.bench_rollback import run_bench_rollback

    raise typer.Exit(run_bench_rollback(rollbacks, connections, as_json))


@bench.command("serving")
def bench_serving(
    model: Annotated[
        str, typer.Option(help="Models of the platform under --home, comma-separated; empty: a made-up one, 30 features in 3 views.")
    ] = "",
    peers: Annotated[
        str, typer.Option(help="Comma-separated: mlserver, tutorial, fastapi-hello, uvicorn-hello, mlflow-serve; or 'none'.")
    ] = "",
    cases: Annotated[
        str,
        typer.Option(
            help="Comma-separated of 1x1,1x16,1x64,100x64 (rows x connections) and open; empty: all, with --sink-dead 1x64 and open."
        ),
    ] = "",
    seconds: Annotated[float, typer.Option(callback=within(0, 3_600), help="Of each measurement; 0: 3, with --sink-dead 60.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, max=1_000, help="Turns of every service; medians are of these.")] = 3,
    scale: Annotated[bool, typer.Option(help="Two processes beside one; takes four cores, or root.")] = True,
    entities: Annotated[
        int, typer.Option(min=100, max=1_000_000, help="Of each view of the made-up model; many: few come again.")
    ] = 10_000,
    check: Annotated[bool, typer.Option("--check", help="Only compare answers with Booster.predict, bit by bit.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Only sample the service under the first load.")] = False,
    sink_dead: Annotated[bool, typer.Option("--sink-dead", help="Only what requests notice of a log whose Redis hangs.")] = False,
    overload: Annotated[bool, typer.Option("--overload", help="Only three times the load that the service can answer.")] = False,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """The prediction service under load, beside its peers: throughput, latency, CPU and memory. Needs wrk (`make bench-tools`)."""
    from mlplatform.local.bench_serving import overload as over
    from mlplatform.local.bench_serving import run
    from mlplatform.local.bench_serving import sink_dead as dead
    from mlplatform.local.bench_serving.cases import CASES
    from mlplatform.local.bench_serving.world import MODEL

    chosen = None if not peers else () if peers == "none" else _names(peers)
    served = home if model else None
    first, *more = _names(model) or (MODEL,)
    loads, length = (dead.LOADS, dead.SECONDS) if sink_dead else (tuple(CASES), 3.0)
    options = run.Options(home / "bench", first, served, chosen, _names(cases) or loads, seconds or length, rounds, scale, more, entities)
    if more and (check or profile or sink_dead or overload):
        raise typer.BadParameter("one model at a time, but for the table itself", param_hint="--model")
    asked = ((check, run.run_check), (profile, run.run_profile), (sink_dead, dead.run_sink_dead), (overload, over.run_overload))
    command = next((command for wanted, command in asked if wanted), run.run_bench_serving)
    raise typer.Exit(command(options, as_json))


def _names(given: str) -> tuple[str, ...]:
    return tuple(name for part in given.split(",") if (name := part.strip()))
