"""`make pictures`: the guide's pictures, taken by a headless Chromium of a running local platform.

Belongs here: which pages, when each is drawn, and talking to the browser. Does not belong here: starting the platform
(`up`, `demo`), or anything about what the pages show.

The browser is driven through its DevTools protocol: a page is pictured when a condition on its own content holds, not
after a guessed time (the Dagster UI loads its graph, then lays it out in a worker).
"""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlplatform.local.processes import end_groups

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

    `act` is JavaScript run then, before the picture is taken. `scale` is pixels of the picture per pixel of the page.
    """

    name: str
    url: str
    drawn: str
    width: int = 1440
    height: int = 900
    scale: float = 1.0
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
            self._socket: ClientConnection = connect(self._address(), max_size=None, proxy=None)
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._page: str = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self._end()

    def _end(self) -> None:
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

    def _call(self, method: str, page: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer. Events that come before it are not of interest."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | ({"sessionId": page} if page else {})
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=_PAGE_S))
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise PictureError(f"{method}: {answer['error'].get('message')}")
                result: dict[str, Any] = answer["result"]
                return result

    def _evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", self._page, expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def take(self, picture: Picture) -> bytes:
        """The page as PNG, once it is drawn. Raises PictureError where it isn't in time."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            self._page,
            width=picture.width,
            height=picture.height,
            deviceScaleFactor=picture.scale,
            mobile=False,
        )
        self._call("Page.navigate", self._page, url=picture.url)
        deadline = time.monotonic() + _PAGE_S
        while not self._evaluate(f"!!({picture.drawn})"):
            if time.monotonic() > deadline:
                raise PictureError(f"{picture.name}: {picture.url} did not show what was waited for within {_PAGE_S:.0f} s")
            time.sleep(_LOOK_EVERY_S)
        if picture.act:
            self._evaluate(picture.act)
        time.sleep(_SETTLE_S)
        return base64.b64decode(self._call("Page.captureScreenshot", self._page, format="png")["data"])
