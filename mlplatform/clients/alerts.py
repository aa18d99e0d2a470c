"""Alerts: a log line, a Slack-compatible webhook and an e-mail, as the settings say.

Belongs here: sending a message that is already worded. Does not belong here: what is worth an alert.

A sink that fails is logged and counted and changes nothing else: no deployment waits for a chat. Addresses, which hold secrets,
stand in no log.
"""

import json
import logging
import smtplib
import ssl
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import EmailMessage
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from mlplatform.settings import Settings

_TIMEOUT_S: Final = 5.0
# The library's own: a command line prints its answers where structlog would print its lines.
log = logging.getLogger("mlplatform.alerts")


@dataclass(frozen=True)
class Alert:
    """`kind`: rollback, refuse, reject, restore, undecided or ledger. `text` is one line; `facts` are shown below it."""

    kind: str
    model: str
    text: str
    facts: Mapping[str, str] = field(default_factory=dict)


class Alerts:
    """`sent` and `failed` count by sink."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.sent: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def send(self, alert: Alert) -> None:
        """To every sink there is; waits at most some seconds for each. Never raises."""
        log.warning("alert %s: %s %s", alert.kind, alert.text, json.dumps(dict(alert.facts)))
        self.sent["log"] += 1
        if self._settings.alert_webhook.get_secret_value():
            self._try("webhook", self._post, alert)
        if self._settings.alert_to and self._settings.alert_smtp.get_secret_value():
            self._try("mail", self._mail, alert)

    def _try(self, sink: str, send: Callable[[Alert], None], alert: Alert) -> None:
        try:
            send(alert)
        except Exception as fault:  # noqa: BLE001  # whatever a sink does, the deployment goes on
            self.failed[sink] += 1
            # Not its text: libraries put the address into it, and the address is the secret.
            log.error("alert %s of %s could not be sent by %s: %s", alert.kind, alert.model, sink, _named(fault))
        else:
            self.sent[sink] += 1

    def _post(self, alert: Alert) -> None:
        body = json.dumps({"text": _lines(alert)}).encode()
        address = self._settings.alert_webhook.get_secret_value()
        if not address.startswith(("http://", "https://")):
            raise ValueError("no http address")
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")  # noqa: S310  # looked at above
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                answer.read(1000)
        except urllib.error.HTTPError as refused:
            with refused:  # it holds the connection
                raise

    def _mail(self, alert: Alert) -> None:
        server = urlsplit(self._settings.alert_smtp.get_secret_value())
        message = EmailMessage()
        message["Subject"] = f"[mlplatform] {' '.join(alert.text.split())[:150]}"
        message["From"] = self._settings.alert_from
        message["To"] = self._settings.alert_to
        message.set_content(_lines(alert))
        safe = ssl.create_default_context()
        options: dict[str, Any] = {"host": server.hostname or "", "timeout": _TIMEOUT_S}
        if server.scheme == "smtps":
            client: smtplib.SMTP = smtplib.SMTP_SSL(port=server.port or 465, context=safe, **options)
        else:
            client = smtplib.SMTP(port=server.port or 25, **options)
        with client:
            client.ehlo()
            if server.scheme != "smtps" and client.has_extn("starttls"):
                client.starttls(context=safe)
                client.ehlo()
            if server.username:
                client.login(unquote(server.username), unquote(server.password or ""))
            client.send_message(message)


def _lines(alert: Alert) -> str:
    return "\n".join([alert.text, *(f"{name}: {value}" for name, value in alert.facts.items())])


def _named(fault: Exception) -> str:
    code = getattr(fault, "code", None) or getattr(fault, "smtp_code", None) or getattr(fault, "errno", None)
    return type(fault).__name__ + ("" if code is None else f" {code}")
