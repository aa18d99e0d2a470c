"""Alerts against a real HTTP server and a real SMTP server; sinks that fail change nothing and tell no secret."""

import http.server
import json
import logging
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
from pydantic import SecretStr

from mlplatform.clients.alerts import Alert, Alerts
from mlplatform.settings import Settings

ALERT = Alert("rollback", "m", "m: version 1 serves again, instead of version 2 (worse)", {"by": "judge"})


class Hook(http.server.BaseHTTPRequestHandler):
    got: ClassVar[list[tuple[str, dict[str, str]]]] = []
    status: ClassVar[int] = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((self.path, json.loads(body)))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Mail(socketserver.StreamRequestHandler):
    got: ClassVar[list[str]] = []

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            word = line.split()[0].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = []
                while (part := self.rfile.readline()) != b".\r\n":
                    lines.append(part.decode())
                self.got.append("".join(lines))
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 fine\r\n")
            if word == b"QUIT":
                return


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hook, "got", [])
    monkeypatch.setattr(Mail, "got", [])


def test_an_alert_goes_to_the_log_the_webhook_and_the_mail_server(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Hook) as web, serving(Mail) as mail, caplog.at_level(logging.WARNING, "mlplatform.alerts"):
        alerts = Alerts(
            Settings(
                alert_webhook=SecretStr(f"http://127.0.0.1:{web}/services/T/hush"),
                alert_smtp=SecretStr(f"smtp://127.0.0.1:{mail}"),
                alert_to="ops@example.org, ml@example.org",
            )
        )
        alerts.send(ALERT)
    assert Hook.got == [("/services/T/hush", {"text": f"{ALERT.text}\nby: judge"})]
    assert f"Subject: [mlplatform] {ALERT.text}" in Mail.got[0].replace("\r\n ", " ")
    assert "To: ops@example.org, ml@example.org" in Mail.got[0]
    assert "by: judge" in Mail.got[0]
    assert ALERT.text in caplog.text
    assert alerts.sent == {"log": 1, "webhook": 1, "mail": 1}
    assert not alerts.failed


def test_a_line_break_in_a_reason_forges_no_mail_header() -> None:
    with serving(Mail) as mail:
        alerts = Alerts(Settings(alert_smtp=SecretStr(f"smtp://127.0.0.1:{mail}"), alert_to="ops@example.org"))
        alerts.send(Alert("reject", "m", "bad\r\nBcc: eve@example.org"))
    assert alerts.sent["mail"] == 1
    assert not [line for line in Mail.got[0].split("\r\n\r\n")[0].splitlines() if line.startswith("Bcc")]


def test_sinks_that_refuse_or_are_away_or_misspelt_are_counted_and_nothing_is_raised_or_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hook, "status", 500)
    with serving(Hook) as web:
        for address in (f"http://127.0.0.1:{web}/hush", "http://127.0.0.1:1/hush", "file:///hush", "hush"):
            alerts = Alerts(
                Settings(alert_webhook=SecretStr(address), alert_smtp=SecretStr("smtp://me:hush@127.0.0.1:1"), alert_to="ops@example.org")
            )
            alerts.send(ALERT)
            assert alerts.failed == {"webhook": 1, "mail": 1}
            assert alerts.sent == {"log": 1}
    assert "could not be sent by webhook: HTTPError 500" in caplog.text
    assert "hush" not in caplog.text


def test_without_settings_there_is_the_log_alone() -> None:
    alerts = Alerts(Settings())
    alerts.send(ALERT)
    assert alerts.sent == {"log": 1}
