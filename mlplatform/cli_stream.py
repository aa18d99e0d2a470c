"""`mlplatform stream` and `mlplatform bench stream`.

Belongs here: options and printing. Does not belong here: any work of the worker. Nothing heavy is imported before a
command runs.
"""

from typing import Annotated

import typer

from mlplatform.cli_options import HERE, Home
from mlplatform.printing import table


def stream(
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Serve Prometheus metrics on this loopback port.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Say which views would be kept, and why not the others.")] = False,
    home: Home = HERE,
) -> None:
    """Keep the windowed views up to date from their event streams, until stopped (SIGTERM ends the round under way)."""
    # Before Feast, which at its import puts this library into multi-process mode for good.
    import prometheus_client  # noqa: F401

    from mlplatform.orchestration import streaming
    from mlplatform.queries import use_home

    settings = use_home(home)

    plans, sources = streaming.declared()
    chosen, against = streaming.choose(plans, sources)
    rows = [{"view": p.name, "kept": "yes", "because": f"independent by {p.recipe.independent_by}"} for p in chosen]
    rows += [{"view": name, "kept": "no", "because": reason} for name, reason in against.items()]
    table("streaming", rows, empty="no view is declared")
    if not list_only:
        streaming.serve(streaming.worker(settings, chosen, sources), metrics_port)


def bench_stream(
    seconds: Annotated[int, typer.Option(min=5, help="How long events flow, per run.")] = 30,
    rate: Annotated[int, typer.Option(min=1, help="Events a second.")] = 5_000,
    kills: Annotated[int, typer.Option(min=0, help="Kill so many workers at random points instead, and compare with a batch.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Streaming features: from an event to its values in Redis, what an event costs, and what a killed worker leaves."""
    from mlplatform.local.bench_stream import run_bench_stream

    raise typer.Exit(run_bench_stream(seconds, rate, kills, as_json))
