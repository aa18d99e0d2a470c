"""Options every command of the command line shares, what follows from them (settings, the platform's time), and their bounds.

Belongs here: what more than one module of commands needs. Does not belong here: a command.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mlplatform.settings import Settings

Home = Annotated[
    Path, typer.Option("--home", envvar="MLPLATFORM_HOME", file_okay=False, help="Folder of everything the local platform writes.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Model = Annotated[str, typer.Argument(help="Name of the model, as flight_disruption.")]
Actor = Annotated[str, typer.Option("--actor", help="Who decides, for the history. Default: MLPLATFORM_ACTOR, else the system's user.")]
HERE = Path(".mlplatform")
NEWEST_VERSION = 2**31 - 1  # MLflow keeps a version's number in 32 bits


def within(low: float, high: float, *, above: bool = False) -> Callable[[float | None], float | None]:
    """A callback for an option whose number lies in [low, high], with `above` in (low, high]. Click's own ranges let `nan` pass."""

    def check(value: float | None) -> float | None:
        if value is not None and not (low < value <= high if above else low <= value <= high):
            raise typer.BadParameter(f"{value:g} is not {'above' if above else 'at least'} {low:g} and at most {high:g}")
        return value

    return check


def settings_of(home: Path) -> "Settings":
    from mlplatform.queries import use_home

    return use_home(home)


def now(settings: "Settings") -> datetime:
    from mlplatform.clock import SystemClock, clock_from

    simulated = settings.clock != "system" and Path(settings.clock).is_file()
    return (clock_from(settings.clock) if simulated else SystemClock()).now()
