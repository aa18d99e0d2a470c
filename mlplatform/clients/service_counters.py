"""What a prediction service has counted of its requests, read from its Prometheus page.

Belongs here: asking, and finding the counters of a model's variants. Does not belong here: what follows from them, or keeping them.

One service is read. Where several stand behind a load balancer, each reading is one of them: its figures are its own (`process` tells them
apart), and what the others count is not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mlplatform.addresses import without_password

_COUNTER: Final = "mlplatform_requests_total"
_STARTED: Final = "process_start_time_seconds"
_TIMEOUT_S: Final = 5.0


class CountersUnreadError(RuntimeError):
    """The service did not tell its counters."""


@dataclass(frozen=True)
class Counted:
    """Since a process began (`process`, seconds since 1970): `errors` are the `requests` that failed or timed out (status 5xx)."""

    process: float
    variant: str
    version: int
    requests: int
    errors: int


def read_counters(url: str, model: str, variants: Sequence[str], api_key: str = "") -> list[Counted]:
    """Of a service at `url`; the first one stands for the process itself, whatever it has counted. Raises CountersUnreadError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/metrics", headers=headers, timeout=_TIMEOUT_S, trust_env=False)
    except httpx.HTTPError as down:
        raise CountersUnreadError(f"the service at {without_password(url)} does not tell its counters: {down}") from down
    if answer.status_code != httpx.codes.OK:
        raise CountersUnreadError(f"the service at {without_password(url)} does not tell its counters: status {answer.status_code}")
    return counted(answer.text, model, variants)


def counted(text: str, model: str, variants: Sequence[str]) -> list[Counted]:
    """From a page in Prometheus' text format."""
    process, counts = 0.0, dict[tuple[str, int], list[int]]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels: Mapping[str, str] = sample.labels
            if sample.name == _STARTED:
                process = float(sample.value)
            if sample.name == _COUNTER and labels["model"] == model and labels["variant"] in variants:
                count = counts.setdefault((labels["variant"], int(labels["version"])), [0, 0])
                count[0] += int(sample.value)
                count[1] += int(sample.value) if labels["status"].startswith("5") else 0
    return [Counted(process, "", 0, 0, 0), *(Counted(process, *place, *count) for place, count in counts.items())]
