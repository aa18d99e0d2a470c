"""The service as a process: `python -m serving_app`.

Belongs here: uvicorn's settings, TLS, what is looked after once a second, how the process ends. Does not belong here: the application
(`main`).

Told to end by SIGTERM, the service gives notice first: `/health/ready` answers 503 and every answer closes its connection, while
connections and requests are still taken. So whoever keeps connections open learns of the end by an answer, and not by a request that
nobody reads any more. The notice is over when nobody is connected, or after its time. Then the socket is closed, requests under way are
answered, the application ends (the prediction log writes what it holds), and the exit status is 0.
"""

import asyncio
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn
from pydantic import ValidationError

from serving_app.logs import configure_logs
from serving_app.settings import ServingSettings, unknown_settings, what_is_wrong
from serving_app.transport import BoundedHttp, HeadLimits, bounded, close_late

if TYPE_CHECKING:
    from serving_app.hot import HotRoute

_TICKS_PER_S = 10  # of uvicorn's main loop
_LAST_CALLERS = 4_096  # more than a listening socket holds
_LOOK_S = 0.01
_LAST_WORD_S = 0.25  # for who has connected and not yet asked
_USAGE = (
    "`python -m serving_app` takes no arguments; settings are environment variables, as MLPLATFORM_SERVING_PORT=8000 (docs/settings.md). "
    "A process uses one core; more are more processes, each with a port of its own."
)
_NEVER_STARTED = 3  # as uvicorn's own command ends then

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which also closes connections that never finish asking, takes up a renewed certificate, and gives notice before
    it ends. `drain` is called when the notice begins.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None], notice_s: float) -> None:
        super().__init__(config)
        self._certificate = _changed_at(config)
        self._drain = drain
        self._notice_s = notice_s
        self._told = False
        self._over_at: float | None = None  # monotonic seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's, which ends the process by the signal once more: to end when told to is a success. SIGTERM gives notice;
        SIGINT, or a second signal, ends at once; a third waits for nobody."""
        if self.should_exit:
            self.force_exit = True
        elif sig == signal.SIGINT or self._told:
            self.should_exit = True
        self._told = True

    async def on_tick(self, counter: int) -> bool:
        if self._told and not self.should_exit:
            self._give_notice(time.monotonic())
        if counter % _TICKS_PER_S == 0:
            close_late(self.server_state.connections, time.monotonic())
            self._renew_certificate()
        return await super().on_tick(counter)

    def _give_notice(self, now: float) -> None:
        if self._over_at is None:
            self._over_at = now + self._notice_s
            self._drain()
            log.info("service_ends", connections=len(self.server_state.connections), notice_s=self._notice_s)
        if now >= self._over_at or not self.server_state.connections:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, after the last callers. To close a socket that holds a connection nobody has accepted, or a request nobody has read,
        resets it: its caller does not learn whether he was answered.
        """
        self._drain()
        waiting = _accept_all([each for server in self.servers for each in server.sockets])
        for server in self.servers:
            server.close()
        loop, certificate = asyncio.get_running_loop(), self.config.ssl
        handshake_s = None if certificate is None else _LAST_WORD_S
        taken = (loop.connect_accepted_socket(self._protocol, each, ssl=certificate, ssl_handshake_timeout=handshake_s) for each in waiting)
        await asyncio.gather(*taken, return_exceptions=True)  # one that goes wrong is nobody's but its caller's
        until = time.monotonic() + _LAST_WORD_S
        await asyncio.sleep(_LOOK_S)
        while time.monotonic() < until and not self.force_exit and any(map(_never_asked, self.server_state.connections)):
            await asyncio.sleep(_LOOK_S)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn makes one for each connection."""
        made: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return protocol

    def _renew_certificate(self) -> None:
        """New connections get the new certificate; those that are open go on. A pair that does not fit leaves the old one."""
        if self.config.ssl is None or (changed := _changed_at(self.config)) == self._certificate:
            return
        self._certificate = changed
        try:
            self.config.ssl.load_cert_chain(str(self.config.ssl_certfile), str(self.config.ssl_keyfile))
            log.info("certificate_renewed")
        except (
            ssl.SSLError,
            OSError,
        ) as error:  # between the replacement of the two files, or for good; the next change is looked at again
            log.error("certificate_refused", reason=str(error))
            self._certificate = None


def configuration(settings: ServingSettings, app: Any, hot: "HotRoute | None" = None) -> uvicorn.Config:
    """`server_header` off: a version is an invitation. `proxy_headers` off: nothing here asks for a caller's address but `guard`,
    which wants the one that is connected. `ws` none: there is no WebSocket.
    """
    limits = HeadLimits(
        head_bytes=settings.serving_head_limit, head_s=settings.serving_head_timeout_s, connections=settings.serving_connections
    )
    return uvicorn.Config(
        app,
        host=settings.serving_host,
        port=settings.serving_port,
        loop="uvloop",
        http=bounded(limits, hot),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.serving_keep_alive_s,
        timeout_graceful_shutdown=settings.serving_stop_s,
        backlog=2048,
        ssl_certfile=settings.serving_tls_certificate,
        ssl_keyfile=settings.serving_tls_key,
    )


def run(arguments: Sequence[str] = ()) -> int:
    """Serves until told to stop (SIGTERM, SIGINT). Returns the process's exit status. It takes no `arguments`: who gives some, of uvicorn
    perhaps, is told so."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(f"{_USAGE}\n")
        return 0
    if arguments:
        _complain(f"{_USAGE} Got: {' '.join(arguments)[:100]}")
        return 2
    try:
        settings = ServingSettings()
    except ValidationError as fault:
        for each in what_is_wrong(fault):
            _complain(each)
        return 2
    # Here and not above: the settings are refused before anything heavy is imported.
    from serving_app.protection.service import CredentialsError, check_credentials

    try:
        check_credentials(settings)
        _check_certificate(settings)
    except (CredentialsError, OSError) as fault:
        _complain(str(fault))
        return 2
    configure_logs(settings.serving_log_level)
    for unknown, near in unknown_settings(os.environ).items():
        log.warning("setting_unknown", name=unknown, did_you_mean=near or None)
    from serving_app.main import create_app

    app = create_app(settings)
    server = Server(configuration(settings, app, app.hot), app.drain, settings.serving_notice_s)
    server.run()
    return 0 if server.started else _NEVER_STARTED


def _complain(why: str) -> None:
    sys.stderr.write(f"error: {why}\n")


def _check_certificate(settings: ServingSettings) -> None:
    """Raises OSError, in words of ours: OpenSSL's name no file."""
    certificate, key = settings.serving_tls_certificate, settings.serving_tls_key
    if certificate is None:
        return
    try:
        # With a password of its own choice OpenSSL does not ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        raise OSError(f"the certificate {certificate} and its key {key} cannot be used: {reason}") from error


def _accept_all(listening: Sequence[Any]) -> list[socket.socket]:
    """The connections that wait to be accepted: the event loop takes them one by one, and callers may come as fast as that."""
    accepted: list[socket.socket] = []
    for each in listening:
        with socket.socket(fileno=os.dup(each.fileno())) as own:  # not blocking, as the loop's
            while len(accepted) < _LAST_CALLERS:
                try:
                    accepted.append(own.accept()[0])
                except OSError:
                    break
                accepted[-1].setblocking(False)
    return accepted


def _never_asked(connection: Any) -> bool:
    return isinstance(connection, BoundedHttp) and connection.cycle is None


def _changed_at(config: uvicorn.Config) -> tuple[int, ...] | None:
    if not config.ssl_certfile:
        return None
    try:
        return tuple(Path(str(file)).stat().st_mtime_ns for file in (config.ssl_certfile, config.ssl_keyfile))
    except OSError:
        return ()
