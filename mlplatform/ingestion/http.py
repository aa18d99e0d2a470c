"""A time window of a paged JSON API as one frame, read through dlt's `RESTClient`.

Belongs here: asking page by page, within time limits, and proving that every announced page came. Does not belong here:
choosing the window or keeping what was read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from dlt.common.configuration.specs.runtime_configuration import RuntimeConfiguration
from dlt.sources.helpers.requests import Client
from dlt.sources.helpers.rest_client import RESTClient
from dlt.sources.helpers.rest_client.client import PageData
from dlt.sources.helpers.rest_client.paginators import PageNumberPaginator
from requests import Response
from requests.exceptions import (
    ChunkedEncodingError,
    ContentDecodingError,
    HTTPError,
    InvalidSchema,
    InvalidURL,
    JSONDecodeError,
    MissingSchema,
    RequestException,
    Timeout,
)

from mlplatform.addresses import without_password
from mlplatform.ingestion.cast import Reading, cast_records, empty_rows
from mlplatform.ingestion.deadline import Deadline, DeadlineError, WatchedAdapter
from mlplatform.ingestion.errors import (
    SourceDownError,
    SourceError,
    SourceNonsenseError,
    SourceRefusedError,
    SourceTruncatedError,
    missing_column,
    shown,
)
from mlplatform.specs import Contract, HttpReader


@dataclass(frozen=True)
class HttpLimits:
    """How long to wait, in seconds, and how often to ask again for a page that failed (429, 5xx, connection cut).

    `deadline_s` bounds the whole window, however slowly bytes trickle in.
    """

    connect_s: float = 5.0
    read_s: float = 30.0
    attempts: int = 4
    longest_pause_s: float = 10.0
    backoff_factor: float = 0.5
    deadline_s: float = 300.0
    # A window whose page count changed while it was read is read again from its first page, this many times in all.
    window_attempts: int = 3


class _WindowChangedError(Exception):
    """The number of pages changed between two pages: items may have moved across a boundary already read."""


def read_window(
    reader: HttpReader, base_url: str, contract: Contract, start: datetime, end: datetime, limits: HttpLimits | None = None
) -> Reading:
    """Every item of [start, end), in the API's order; no row at all rather than some.

    Asks `GET {base_url}{path}?from=…&to=…&page=1…n&page_size=…` for `{"items": […], "page": k, "total_pages": n}`; an
    API that also announces `total_items` is held to it. Raises SourceDownError, SourceTruncatedError,
    SourceRefusedError or SourceNonsenseError.
    """
    if start.tzinfo is None or end.tzinfo is None or end <= start:
        raise ValueError(f"a window needs zoned times in order, got {start} … {end}")
    limits = limits or HttpLimits()
    source = f"http source '{reader.connection}' ({without_password(base_url)}{reader.path})"
    with _client(base_url, limits, source) as client:
        items = _all_items(client, reader, {"from": _iso(start), "to": _iso(end), "page_size": reader.page_size}, source, limits)
    return _frame(items, contract, source)


def _all_items(client: RESTClient, reader: HttpReader, params: dict[str, Any], source: str, limits: HttpLimits) -> list[Any]:
    for _ in range(limits.window_attempts):
        try:
            return _one_pass(client, reader, params, source)
        except _WindowChangedError as changed:
            change = str(changed)
    raise SourceTruncatedError(
        source, f"the number of pages kept changing while it was read ({change})", "Read a window that is closed, or run again later"
    )


def _one_pass(client: RESTClient, reader: HttpReader, params: dict[str, Any], source: str) -> list[Any]:
    """All pages once. Each must announce itself and the same total; all but the last must be equally full."""
    items: list[Any] = []
    sizes: list[int] = []
    total: int | None = None
    announced: Any = None
    try:
        for number, page in enumerate(_pages(client, reader.path, params), start=1):
            body = page.response.json()
            if total is not None and body["total_pages"] != total:
                raise _WindowChangedError(f"{total} pages at first, {body['total_pages']} on page {number}")
            total = body["total_pages"]
            announced = body.get("total_items")
            _check_page(page, body, number, source)
            items.extend(page)
            sizes.append(len(page))
    except (RequestException, ValueError, DeadlineError) as error:
        raise _told(error, source) from error
    short = next((n for n, size in enumerate(sizes[:-1], start=1) if size < sizes[0] or size == 0), None)
    if short is not None or (len(sizes) > 1 and not 0 < sizes[-1] <= sizes[0]):
        number = short or len(sizes)
        happened = f"page {number} of {total} has {sizes[number - 1]} items where {sizes[0]} were due"
        raise SourceTruncatedError(source, happened, "Run again; the next run reads it whole")
    if isinstance(announced, int) and announced != len(items):
        raise SourceTruncatedError(source, f"sent {len(items)} of {announced} announced items", "Run again; the next run reads it whole")
    return items


def _pages(client: RESTClient, path: str, params: dict[str, Any]) -> Iterator[PageData[Any]]:
    # A copy of the parameters: the paginator writes the page number into them.
    yield from client.paginate(path, params=dict(params), hooks={"response": [_check_shape]})


def _check_page(page: PageData[Any], body: dict[str, Any], number: int, source: str) -> None:
    if body.get("page", number) != number:
        raise SourceTruncatedError(
            source, f"sent page {body['page']} where page {number} was asked for", "Look at the API's paging, then run again"
        )
    for item in page:
        if not isinstance(item, dict):
            raise SourceNonsenseError(
                source, f"an item on page {number} is no JSON object: {shown(item)}", "Look at the API's answer", example=shown(item)
            )


def _check_shape(response: Response, *args: object, **kwargs: object) -> None:
    """Runs on each answer before dlt's paginator sees it, which would guess where this says what is wrong."""
    if response.is_redirect:
        return
    content = response.content  # read to its end, whatever it says, so that its connection is free again
    response.raise_for_status()
    body = response.json()
    if not isinstance(body, dict) or not isinstance(body.get("items"), list) or type(body.get("total_pages")) is not int:
        raise ValueError(f"answers JSON without 'items' (a list) and 'total_pages' (an integer): {shown(content.decode(errors='replace'))}")


def _frame(items: list[Any], contract: Contract, source: str) -> Reading:
    if not items:
        return Reading(empty_rows(contract))
    try:
        records = cast_records(items, contract)
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and no table can hold
        raise SourceNonsenseError(source, f"a text is not valid Unicode ({error.reason})", "Mend the source") from error
    if records.absent:
        raise missing_column(source, records.absent[0], sorted({name for item in items for name in item}))
    if records.faults:
        row, fault = min(records.faults.items())
        column = fault.split("'")[1]
        raise SourceNonsenseError(
            source,
            f"{len(records.faults)} of {len(items)} items do not fit the contract, such as item {row}: {fault}",
            "Mend the source, or declare the column as what it is in the contract",
            column=column,
            example=shown(items[row].get(column)),
        )
    return Reading(records.rows, records.dropped)


# --- the connection -----------------------------------------------------------------------------------------------


@contextmanager
def _client(base_url: str, limits: HttpLimits, source: str) -> Iterator[RESTClient]:
    deadline = Deadline(limits.deadline_s)
    session = Client(
        request_timeout=(limits.connect_s, limits.read_s),
        raise_for_status=False,
        request_max_attempts=limits.attempts,
        retry_condition=lambda _, error: isinstance(error, JSONDecodeError) and _is_cut_short(error.doc),
        request_backoff_factor=limits.backoff_factor,
        request_max_retry_delay=limits.longest_pause_s,
    ).session
    for scheme in ("http://", "https://"):
        session.mount(scheme, WatchedAdapter(deadline))
    # A proxy of the environment cannot reach this machine's own loopback.
    session.trust_env = not _is_loopback(base_url)
    paginator = PageNumberPaginator(base_page=1, total_path="total_pages", stop_after_empty_page=False)
    # A configuration given here keeps dlt from looking for one in the environment and the working directory.
    client = RESTClient(base_url, paginator=paginator, data_selector="items", session=session, config=RuntimeConfiguration())
    try:
        yield client
    except SourceError as error:
        # A cut connection shows in many ways, even as an empty answer.
        if not deadline.passed:
            raise
        raise SourceDownError(
            source, f"did not send the whole window within {limits.deadline_s:g} s", "See what slows it, or raise the deadline"
        ) from error
    finally:
        session.close()
        deadline.end()


def _told(error: Exception, source: str) -> SourceError:
    """What requests and dlt raised, in the platform's words."""
    match error:
        case HTTPError(response=Response() as response):
            return _bad_status(response, source)
        case JSONDecodeError():
            return _not_json(error.doc, source)
        case InvalidURL() | MissingSchema() | InvalidSchema():
            return SourceRefusedError(source, "its address is no http(s) URL", "Write it as https://host/prefix")
        case ChunkedEncodingError() | ContentDecodingError():
            return SourceTruncatedError(
                source, "the connection was cut in the middle of an answer", "Run again; the next run reads it whole"
            )
        case RequestException() | DeadlineError():
            happened = "did not answer in time" if isinstance(error, Timeout) else f"cannot be reached ({type(error).__name__})"
            return SourceDownError(source, happened, "Check that it runs and that the address is right, then run again")
    return SourceNonsenseError(source, str(error), "Check that the address is the API's and that its version is the expected one")


def _bad_status(response: Response, source: str) -> SourceError:
    status = f"{response.status_code} {response.reason}"
    if response.status_code == 429 or response.status_code >= 500:
        return SourceDownError(source, f"kept answering {status}", "Check the service's own logs, then run again")
    return SourceRefusedError(source, f"answered {status}", "Check the path and the credentials")


def _not_json(text: str, source: str) -> SourceError:
    if _is_cut_short(text):
        return SourceTruncatedError(source, f"an answer ends in the middle of its JSON ({len(text)} characters)", "Run again")
    example = shown(text)
    mend = "Check that the address is the API's, not a login or error page"
    return SourceNonsenseError(source, f"answers something that is not JSON: {example}", mend, example=example)


def _is_cut_short(text: str) -> bool:
    stripped = text.strip()
    return stripped.startswith("{") and not stripped.endswith("}")


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _is_loopback(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
