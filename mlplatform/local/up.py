"""`mlplatform up` and `down`: the whole platform on one machine, left running.

Belongs here: what runs and from when. Does not belong here: how services are started (`profile`, `services`).
"""

from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from mlplatform.clock import SimulatedClock
from mlplatform.local.profile import LocalPlatform
from mlplatform.local.report import Report, down_command
from mlplatform.local.revive import revive
from mlplatform.local.service_state import read_state, stop_recorded


def run_up(home: Path, speed: float = 1.0) -> int:
    """Starts everything under `home` and returns with it running. A home without a model is built first, as the demo does.

    Where only some services have ended, these are started again; the others and the clock are left alone.

    Otherwise the simulated clock goes on from where it stood, `speed` times as fast as the wall clock.
    """
    console = Console()
    services = read_state(home.absolute()).services
    ended = [service.name for service in services if not service.running]
    if services and not ended:
        console.print(f"Already running under {home} ({', '.join(s.name for s in services)}); `{down_command(home)}` stops it.")
        return 0
    if len(ended) < len(services):
        console.print(f"Of the platform under {home}, {', '.join(ended)} has ended: starting it again, nothing else.")
        with console.status("starting the services"):
            for service in revive(home):
                console.print(f"  [bold]{service.name:<18}[/bold] {service.url}", highlight=False)
        return 0
    if not (home / "lake" / "deployment").exists():
        console.print("Nothing is built yet: building January to August first, as `make demo` does.")
        return _build_and_keep(home, speed)
    with LocalPlatform(home=home) as platform, console.status("starting the services"):
        platform.start_serving()
        platform.start_automation()
        platform.start_clock(speed)
        platform.supervisor.detach()
    _say_where(console, platform, speed)
    return 0


def _build_and_keep(home: Path, speed: float) -> int:
    from mlplatform.local.demo import Demo

    report = Report(home, "[bold]mlplatform up[/bold]: January to August 2013 from the source systems to a serving model")
    with report.live(), LocalPlatform(home=home) as platform:
        Demo.open(platform, report, None).build()
        platform.start_automation()
        platform.start_clock(speed)
        platform.supervisor.detach()
    _say_where(report.console, platform, speed)
    return 0


def _say_where(console: Console, platform: LocalPlatform, speed: float) -> None:
    for service in platform.supervisor.services:
        if service.url:
            console.print(f"  [bold]{service.name:<18}[/bold] {service.url}{'/docs' if service.name == 'serving' else ''}", highlight=False)
    console.print(f"The simulated clock stands at {platform.clock.now():%Y-%m-%d %H:%M} UTC, {speed:g} times as fast as the wall's.")
    console.print(f"`{down_command(platform.home)}` stops everything.", soft_wrap=True)


def run_down(home: Path) -> int:
    """Stops what `up` or `demo --keep` left running under `home`."""
    console = Console()
    services = read_state(home.absolute()).services
    stop_recorded(home.absolute())
    # Nothing happens while nothing runs: the clock stands until the next `up`.
    clock = SimulatedClock(home.absolute() / "clock.json")
    if services and clock.path.exists():
        clock.set(clock.now())
    if services:
        console.print(f"Stopped {', '.join(s.name for s in services)} at {datetime.now(UTC):%H:%M:%S} UTC.")
    else:
        console.print(f"Nothing was running under {home}.")
    return 0
