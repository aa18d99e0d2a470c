"""Options every command of the command line shares, and what follows from them: settings and the platform's time.

Belongs here: what more than one module of commands needs. Does not belong here: a command.
"""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mlplatform.settings import Settings

Home = Annotated[Path, typer.Option("--home", envvar="MLPLATFORM_HOME", help="Folder of everything the local platform writes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Model = Annotated[str, typer.Argument(help="Name of the model, as flight_disruption.")]
Actor = Annotated[str, typer.Option("--actor", help="Who decides, for the history. Default: MLPLATFORM_ACTOR, else the system's user.")]
HERE = Path(".mlplatform")


def settings_of(home: Path) -> "Settings":
    from mlplatform.queries import use_home

    return use_home(home)


def now(settings: "Settings") -> datetime:
    from mlplatform.clock import SystemClock, clock_from

    simulated = settings.clock != "system" and Path(settings.clock).is_file()
    return (clock_from(settings.clock) if simulated else SystemClock()).now()
