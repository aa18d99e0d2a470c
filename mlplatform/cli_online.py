"""`mlplatform online …`: the generations of the online store.

Belongs here: commands, options, printing. Does not belong here: what a generation is (`feature_store.generations`), which rows one
is built from (`orchestration.assets.online`).
"""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlplatform.cli_options import HERE, AsJson, Home
from mlplatform.printing import age, print_json, say, table

if TYPE_CHECKING:
    from mlplatform.orchestration.resources import Clients

online = typer.Typer(help="The online store: which generation of each view is read.", no_args_is_help=True, rich_markup_mode=None)

ViewName = Annotated[str, typer.Argument(metavar="VIEW", help="Name of the feature view; `mlplatform features` lists them.")]


@online.command()
def status(home: Home = HERE, as_json: AsJson = False) -> None:
    """The live generations of every view: which is read, which can be restored, which is being built.

    Entities are those of the build; the newest event is of what is stored by now, with everything pushed since.
    """
    from mlplatform.contracts import ONLINE_PROJECT
    from mlplatform.feature_store.reclaim import manifest_of, newest_events, pointers

    clients = _clients(home)
    newest = newest_events(clients.online)
    rows: list[dict[str, Any]] = []
    for (_, view), pointer in pointers(clients.online, ONLINE_PROJECT).items():
        roles = {"current": pointer.current, "building": pointer.building, "previous": pointer.previous}
        for role, generation in roles.items():
            if generation is not None:
                rows.append(_row(view, role, generation.number, manifest_of(clients.online, generation.number), newest))
    if as_json:
        print_json(rows)
        return
    at = clients.clock.now()
    table("online", [_line(row, at) for row in rows], empty="nothing is online: materialize online/<view>")


def _line(row: dict[str, Any], now: datetime) -> dict[str, Any]:
    """What fits 80 columns."""

    def ago(time: str | None) -> str:
        return "-" if time is None else f"{age((now - datetime.fromisoformat(time)).total_seconds())} ago"

    return {
        "view": row["view"],
        "generation": f"{row['generation']} {row['role']}",
        "entities": row["entities"],
        "built": ago(row["built_at"]),
        "newest event": ago(row["newest_event"]),
    }


def _row(view: str, role: str, generation: int, manifest: Any, newest: dict[int, datetime]) -> dict[str, Any]:
    event = newest.get(generation)
    row: dict[str, Any] = {
        "view": view,
        "role": role,
        "generation": generation,
        "newest_event": None if event is None else event.isoformat(),
    }
    if manifest is None:
        return row | dict.fromkeys(
            ("state", "features", "entities", "carried_over", "sample", "built_at", "built_by", "built_newest_event", "restored")
        )
    return row | {
        "state": manifest.state,
        "features": list(manifest.features),
        "entities": manifest.entities,
        "carried_over": manifest.carried_over,
        "sample": manifest.sample,
        "built_at": manifest.built_at,
        "built_by": manifest.built_by,
        "built_newest_event": manifest.newest_event,
        "restored": [list(move) for move in manifest.restored],
    }


@online.command()
def rebuild(view: ViewName, home: Home = HERE) -> None:
    """Build a new generation of a view from Delta, verify it, and let it be read."""
    from mlplatform.orchestration.assets.online import rebuild_online
    from mlplatform.queries_features import plan_of

    clients = _clients(home)
    built = rebuild_online(clients, plan_of(clients.settings, view), by=f"{clients.settings.acts_as}: mlplatform online rebuild")
    say(f"{view}: generation {built.generation} is read now: {built.entities} entities, {built.sample} compared bit by bit")


@online.command()
def restore(view: ViewName, home: Home = HERE) -> None:
    """Let the previous generation of a view be read again; once more takes it back. Recorded in its manifest."""
    from mlplatform.contracts import ONLINE_PROJECT
    from mlplatform.feature_store.generations import restore as move
    from mlplatform.feature_store.reclaim import pointer_of

    clients = _clients(home)
    manifest = move(clients.online, ONLINE_PROJECT, view, at=clients.clock.now(), by=clients.settings.acts_as)
    now = pointer_of(clients.online, ONLINE_PROJECT, view)
    before = now.previous.number if now.previous else "none"
    say(f"{view}: generation {now.current.number if now.current else 'none'} is read now, instead of {before}; built {manifest.built_at}")


@online.command()
def reclaim(home: Home = HERE) -> None:
    """Remove the values of generations that are not live any more, a minute after they ceased to be."""
    from mlplatform.feature_store.reclaim import reclaim as remove
    from mlplatform.feature_store.writer import GRACE_S

    done = remove(_clients(home).online)
    waiting = f"; {done.retiring} more can go in {GRACE_S} s at most" if done.retiring else ""
    say(f"{done.keys} values removed{waiting}")


def _clients(home: Path) -> "Clients":
    from mlplatform.orchestration.resources import Clients
    from mlplatform.queries import use_home

    clients = Clients(use_home(home))
    clients.online.ping()
    return clients
