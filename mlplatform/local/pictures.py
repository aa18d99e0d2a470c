"""`make pictures`: the guide's pictures, taken by a headless Chromium of a running local platform.

Belongs here: which pages, when each is drawn, and talking to the browser. Does not belong here: starting the platform
(`up`, `demo`), or anything about what the pages show.

The browser is driven through its DevTools protocol: a page is pictured when a condition on its own content holds, not
after a guessed time (the Dagster UI loads its graph, then lays it out in a worker).
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from rich.console import Console

from mlplatform.local.processes import end_groups
from mlplatform.local.service_state import recorded_services

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
MAC_CHROMIUMS = (
    Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),
    Path("/Applications/Chromium.app/Contents/MacOS/Chromium"),
)
_START_S, _PAGE_S, _LOOK_EVERY_S = 60.0, 90.0, 0.2
# A page may move on for a moment after its condition holds: fonts, a last layout.
_SETTLE_S = 1.0


class PictureError(RuntimeError):
    """A page was not drawn in time, or the browser failed; says which."""


@dataclass(frozen=True)
class Picture:
    """One page and its file. `drawn` is JavaScript, true once the page shows what the picture is about.

    `prepare` is JavaScript run then, after which the page is loaded once more: for what a page remembers. `act` is run
    right before the picture is taken.
    """

    name: str
    url: str
    drawn: str
    width: int = 1440
    height: int = 900
    prepare: str = ""
    act: str = ""


def find_chromium() -> Path | None:
    """The first Chromium on the path, or macOS's; None where there is none."""
    named = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    return Path(named) if named else next((path for path in MAC_CHROMIUMS if path.exists()), None)


class Browser(AbstractContextManager["Browser"]):
    """A headless Chromium with a profile of its own, gone without a trace when left."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self._profile = tempfile.TemporaryDirectory(prefix="mlplatform-chromium-", ignore_cleanup_errors=True)
        self._sent = 0
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        from websockets.sync.client import connect

        self._process = subprocess.Popen(
            [
                str(self.program),
                "--headless",
                "--no-sandbox",  # it cannot be set up by root, as in most containers; the pages are our own
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--no-proxy-server",  # everything pictured is on this machine
                "--hide-scrollbars",
                "--force-color-profile=srgb",
                f"--user-data-dir={self._profile.name}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._socket: ClientConnection = self._closing.enter_context(connect(self._address(), max_size=None, proxy=None))
        except BaseException:  # Ctrl-C too: the browser must not outlive a start that failed
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            # Asked to, it removes what it keeps outside its profile; a signal leaves that lying.
            self._call("Browser.close")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._end()

    def _end(self) -> None:
        self._closing.close()
        end_groups([self._process.pid], grace_s=5.0)
        self._process.wait()
        self._profile.cleanup()

    def _address(self) -> str:
        """Where the browser listens, from the file it writes once it does."""
        told = Path(self._profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = told.read_text().splitlines() if told.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(_LOOK_EVERY_S)
        raise PictureError(f"{self.program} did not start within {_START_S:.0f} s")

    def _call(self, method: str, tab: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer. Events that come before it are not of interest."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | ({"sessionId": tab} if tab else {})
        self._socket.send(json.dumps(message))
        while True:
            try:
                answer = json.loads(self._socket.recv(timeout=_PAGE_S))
            except TimeoutError as late:
                raise PictureError(f"{method}: no answer from the browser within {_PAGE_S:.0f} s") from late
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise PictureError(f"{method}: {answer['error'].get('message')}")
                result: dict[str, Any] = answer["result"]
                return result

    def take(self, picture: Picture) -> bytes:
        """The page as PNG, once it is drawn. Raises PictureError where it isn't in time."""
        if picture.prepare:
            with self.tab(picture) as tab:
                self.evaluate(tab, picture.prepare)
                time.sleep(_SETTLE_S)
        with self.tab(picture) as tab:
            if picture.act:
                self.evaluate(tab, picture.act)
            time.sleep(_SETTLE_S)
            return base64.b64decode(self._call("Page.captureScreenshot", tab, format="png")["data"])

    @contextmanager
    def tab(self, picture: Picture) -> Iterator[str]:
        """A tab with the page, drawn. Each page has a tab of its own: pages left behind in one tab keep their connections."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab: str = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": picture.width, "height": picture.height}
        self._call("Emulation.setDeviceMetricsOverride", tab, **size, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", tab, url=picture.url)
        deadline = time.monotonic() + _PAGE_S
        while not self.evaluate(tab, f"!!({picture.drawn})"):
            if time.monotonic() > deadline:
                raise PictureError(f"{picture.name}: {picture.url} did not show what was waited for within {_PAGE_S:.0f} s")
            time.sleep(_LOOK_EVERY_S)
        yield tab
        self._call("Target.closeTarget", targetId=target)

    def evaluate(self, tab: str, script: str) -> Any:
        """What the script gives, as a plain value; a promise is awaited."""
        answer = self._call("Runtime.evaluate", tab, expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")


# --- which pages -----------------------------------------------------------------------------------------------------

MODEL_STAGES = ("training", "evaluation", "deployment", "monitoring")

# What the Dagster UI remembers between two loads of a page.
_NARROW_MENU = "localStorage.setItem('dagster-nav-collapsed', 'true');"
# Every asset of a model has the model's name: what it is stands in its description.
_NODE_TEXTS = "localStorage.setItem('asset-node-facets', JSON.stringify(['description', 'checks', 'latest-event', 'status', 'kind-tag']));"
_TOP_TO_BOTTOM = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'o', code: 'KeyO', altKey: true, bubbles: true}));"
_NO_GREETING = "[...document.querySelectorAll('button')].find((button) => button.innerText === 'Skip')?.click();"
# The side panel is folded on the way, so that the whole width is laid out; the nodes come before what they say.
_GRAPH = """(() => {
  const panel = document.querySelector('[aria-label=panel_show_right]');
  if (panel) { panel.closest('button').click(); return false; }
  const text = document.body.innerText;
  return document.querySelectorAll('svg foreignObject').length >= 10 && !text.includes('fetching statuses') && !text.includes('Loading');
})()"""

_ASSET = "document.body.innerText.includes('Latest materialization') && document.querySelectorAll('table tr').length > 8"
_SHOW = "[...document.querySelectorAll('td')].find((cell) => cell.innerText === '%s').parentElement.querySelector('a, button').click();"


def pictures(services: dict[str, str], home: Path) -> Iterator[Picture]:
    """Every picture of the guide, of the services by name and address."""
    dagster, serving = services["dagster-webserver"], services["serving"]
    graph = lineage(dagster, MODEL_STAGES, _other_models())
    yield Picture("lineage", graph, _GRAPH, 3300, 1400, _NO_GREETING + _NARROW_MENU + _NODE_TEXTS)
    yield Picture("lineage-model", graph, _GRAPH, 2500, 2100, _NARROW_MENU + _NODE_TEXTS + _TOP_TO_BOTTOM)
    yield Picture("asset-columns", f"{dagster}/assets/validated/weather", _ASSET, 1440, 1000)
    yield Picture("asset-evaluation", f"{dagster}/assets/evaluation/flight_disruption", _ASSET, 1440, 1000, act=_SHOW % "reliability")
    if (home / "lake" / "canary" / "flight_disruption").exists():  # after `demo --release`
        yield Picture("asset-canary", f"{dagster}/assets/canary/flight_disruption", _ASSET, 1440, 1000, _NARROW_MENU, _SHOW % "timeline")
    yield Picture("serving-docs", f"{serving}/docs", "document.querySelectorAll('article').length > 3", 1280, 1500)
    if (report := newest_report(home)) is not None:
        yield Picture("drift-report", report.as_uri(), "document.querySelectorAll('.js-plotly-plot, canvas, table').length > 0", 1280, 1300)


def lineage(url: str, groups: Sequence[str], without: Sequence[str] = ()) -> str:
    """The address of the global lineage with these groups opened, and no asset of the models `without`."""
    selection = " and ".join(f'not key:"*/{model}"' for model in without)
    chosen = f"~{quote(selection, safe='')}" if selection else ""
    return f"{url}/asset-groups{chosen}?expanded={','.join(f'global@global:{group}' for group in groups)}"


def _other_models() -> list[str]:
    """All but the first: beside each other they hide what one of them goes through."""
    from mlplatform.catalog.discover import catalogs

    return [spec.name for catalog in catalogs() for spec in catalog.models][1:]


def newest_report(home: Path) -> Path | None:
    """The newest report of data drift; None before the first."""
    found = (home.absolute() / "reports" / "data_drift").glob("*/*.html")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def take_pictures(home: Path, folder: Path, console: Console, only: Sequence[str] = ()) -> int:
    """Writes every picture (or those of `only`) into `folder`. Returns the exit status; 0 too where there is no Chromium."""
    program = find_chromium()
    if program is None:
        console.print("No Chromium was found: the pictures stay as they are. Install chromium to renew them.")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with _running(home) as services, Browser(program) as browser:
        for picture in pictures(services, home):
            if not only or picture.name in only:
                (folder / f"{picture.name}.png").write_bytes(browser.take(picture))
                console.print(f"{picture.name}.png: {picture.url}", highlight=False)
    return 0


@contextmanager
def _running(home: Path) -> Iterator[dict[str, str]]:
    """The addresses of the platform under `home`. One that does not run is started (built, where nothing is there) and ended again."""
    from mlplatform.local.up import run_down, run_up

    started = not recorded_services(home.absolute())
    try:
        if started and (home / "lake" / "predictions").exists():
            run_up(home, speed=0.0)
        elif started:
            from mlplatform.local.demo import run_demo

            if run_demo(home, days=1, keep=True) != 0:
                raise PictureError("the demo failed: there is nothing to take pictures of")
        services = {service.name: service.url for service in recorded_services(home.absolute())}
        if missing := {"dagster-webserver", "serving"} - set(services):
            raise PictureError(
                f"{' and '.join(sorted(missing))} do not run under {home}: `make down`, then `make pictures` starts everything"
            )
        yield services
    finally:
        if started:
            run_down(home)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mlplatform.local.pictures", description="Take the guide's pictures of a running local platform.")
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("MLPLATFORM_HOME", ".mlplatform")))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "pictures")
    parser.add_argument("only", nargs="*", help="names of pictures; all of them if none is given")
    given = parser.parse_args()
    console = Console()
    try:
        return take_pictures(given.home, given.out, console, given.only)
    except PictureError as fault:
        console.print(f"[red]error:[/red] {fault}", highlight=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
