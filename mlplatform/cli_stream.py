"""`mlplatform stream` and `mlplatform bench stream`.

Belongs here: options and printing. Does not belong here: any work of the worker. Nothing heavy is imported before a
command runs.
"""

from typing import TYPE_CHECKING, Annotated

import typer

from mlplatform.cli_faults import AwayError
from mlplatform.cli_options import HERE, Home
from mlplatform.printing import say, table

if TYPE_CHECKING:
    from mlplatform.settings import Settings


def stream(
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Serve Prometheus metrics on this loopback port.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Say which views would be kept, and why not the others.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Say which worker keeps the views. Status 1 where none does.")] = False,
    home: Home = HERE,
) -> None:
    """Keep the windowed views up to date from their event streams, until stopped (SIGTERM ends the round under way)."""
    from mlplatform.queries import built_home

    settings = built_home(home)
    if status:
        raise typer.Exit(_tell_worker(settings))
    if metrics_port is not None and not list_only:
        from mlplatform.orchestration.stream_metrics import check_port

        check_port(metrics_port)  # before the seconds that Feast takes
    # Before Feast, which at its import puts this library into multi-process mode for good.
    import prometheus_client  # noqa: F401

    from mlplatform.orchestration import streaming

    plans, sources = streaming.declared()
    chosen, against = streaming.choose(plans, sources)
    rows = [{"view": p.name, "kept": "yes", "because": f"independent by {p.recipe.independent_by}"} for p in chosen]
    rows += [{"view": name, "kept": "no", "because": reason} for name, reason in against.items()]
    table("streaming", rows, empty="no view is declared")
    if not list_only:
        streaming.serve(streaming.worker(settings, chosen, sources), metrics_port)


def _tell_worker(settings: "Settings") -> int:
    """Says who works. Returns 0 where somebody does, and all views are kept. Raises AwayError."""
    from mlplatform.queries_stream import told, worker

    found = worker(settings)
    if found is None:
        raise AwayError(told(found), "redis", "online store")
    say(told(found))
    for view, reason in found["stopped"].items():
        say(f"  {view}: {reason}")
    return 0 if found["works"] and not found["stopped"] else 1


def bench_stream(
    seconds: Annotated[int, typer.Option(min=5, max=86_400, help="How long events flow, per run.")] = 30,
    rate: Annotated[int, typer.Option(min=1, max=1_000_000, help="Events a second.")] = 5_000,
    kills: Annotated[
        int, typer.Option(min=0, max=10_000, help="Kill so many workers at random points instead, and compare with a batch.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Streaming features: from an event to its values in Redis, what an event costs, and what a killed worker leaves."""
    from mlplatform.local.bench_stream import run_bench_stream

    raise typer.Exit(run_bench_stream(seconds, rate, kills, as_json))
