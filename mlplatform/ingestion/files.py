"""CSV or Parquet files of a folder or an S3 prefix as one frame.

Belongs here: finding the files of the days asked for, reading each whole, telling what went wrong. Does not belong here:
deciding which days are due.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import csv
from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector, FileSystem, FileType, LocalFileSystem, S3FileSystem

from mlplatform.addresses import without_password
from mlplatform.ingestion.cast import Reading, cast_frame, empty_rows
from mlplatform.ingestion.errors import (
    SourceDownError,
    SourceError,
    SourceNonsenseError,
    SourceRefusedError,
    SourceTruncatedError,
)
from mlplatform.records import DayRange
from mlplatform.specs import Column, Contract, FileReader

DATE = "{date}"
# An archive may keep when each event reached the platform the first time; it is worth more than the time of this reading.
RECEIVED_AT = Column(name="received_at", dtype="timestamp", nullable=True)
PARALLEL_READS = 8
CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 60
ATTEMPTS = 4


@dataclass(frozen=True)
class _Store:
    """A file system and the folder within it that the reader's path starts from."""

    files: FileSystem
    folder: str
    source: str


def read_files(
    reader: FileReader, root: str, contract: Contract, days: DayRange | None = None, storage_options: Mapping[str, str] | None = None
) -> Reading:
    """Rows of every file the reader's path names under `root` (a folder, `file://` or `s3://bucket/prefix`), day by day.

    With `{date}` in the path, the files of `days`; a day without a file is no error, it is missing in `Reading.days`.
    Without it the one file, which must be there. `received_at` is kept where a file has it. `storage_options` as
    deltalake and Polars take them (`AWS_…`). Raises SourceDownError, SourceTruncatedError, SourceRefusedError or
    SourceNonsenseError; no rows rather than some of them.
    """
    source = f"file source '{reader.connection}' ({without_password(root)}/{reader.path})"
    if (DATE in reader.path) != (days is not None):
        raise ValueError(f"{source}: days are asked for exactly where the path has {DATE}")
    try:
        store = _open(root, storage_options or {}, source)
        found = _dated(store, reader.path, days) if days else {None: _only(store, reader.path)}
        read = partial(_read_one, store, reader, contract)
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            parts = list(pool.map(read, found.values()))
    except (OSError, pa.ArrowException) as error:
        raise _told(error, source) from error
    rows = pl.concat([rows for rows, _ in parts], how="diagonal") if parts else empty_rows(contract)
    dropped = {name for _, names in parts for name in names}
    return Reading(rows, tuple(sorted(dropped)), tuple(day for day in found if day))


def _dated(store: _Store, path: str, days: DayRange) -> dict[date, str]:
    """Day → file, for the days that have one. One listing instead of a question per day."""
    folder = f"{store.folder}/{path[: path.index(DATE)]}".rpartition("/")[0]
    deep = "/" in path[path.index(DATE) :]
    listed = store.files.get_file_info(FileSelector(folder, recursive=deep, allow_not_found=True))
    present = {info.path for info in listed if info.type == FileType.File}
    wanted = ((day, f"{store.folder}/{path.replace(DATE, day.isoformat())}") for day in _each(days))
    return {day: file for day, file in wanted if file in present}


def _only(store: _Store, path: str) -> str:
    file = f"{store.folder}/{path}"
    if store.files.get_file_info(file).type != FileType.File:
        raise SourceDownError(store.source, "the file is not there", "Check the path, or that its volume is mounted")
    return file


def _read_one(store: _Store, reader: FileReader, contract: Contract, file: str) -> tuple[pl.DataFrame, set[str]]:
    source = f"file '{file}' of file source '{reader.connection}'"
    with store.files.open_input_file(file) as stream:
        content = stream.read()
    frame = _PARSERS[reader.format](content, source)
    rows = cast_frame(frame, contract, source, text=reader.format == "csv", keep=(RECEIVED_AT,))
    return rows, set(frame.columns) - set(rows.columns)


def _parse_parquet(content: bytes, source: str) -> pl.DataFrame:
    if len(content) < 8 or content[-4:] != b"PAR1":
        if content[:4] == b"PAR1" or not content:
            raise SourceTruncatedError(source, f"ends before its Parquet footer ({len(content)} bytes)", "Have it written again, whole")
        raise SourceNonsenseError(source, "is not a Parquet file", "Have it written again, or declare its format in the reader")
    try:
        return pl.read_parquet(BytesIO(content))
    except pl.exceptions.PolarsError as error:
        raise SourceNonsenseError(source, f"is not readable as Parquet ({_first_line(error)})", "Have it written again") from error


def _parse_csv(content: bytes, source: str) -> pl.DataFrame:
    if not content.strip():
        raise SourceTruncatedError(source, "is empty, without even a header", "Have it written again, whole")
    try:
        # Every column as text: what a value may be is the contract's to say, and an unquoted empty field is missing.
        header = csv.open_csv(BytesIO(content), read_options=csv.ReadOptions(block_size=max(len(content), 1))).schema.names
        table = csv.read_csv(
            BytesIO(content),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        kind = SourceTruncatedError if _stops_short(str(error), content) else SourceNonsenseError
        raise kind(source, f"is not readable as CSV ({_first_line(error)})", "Have it written again, whole") from error
    return pl.DataFrame(pl.from_arrow(table))


_PARSERS: Mapping[str, Callable[[bytes, str], pl.DataFrame]] = {"parquet": _parse_parquet, "csv": _parse_csv}


def _stops_short(error: str, content: bytes) -> bool:
    """Whether the row that does not parse is the last one, and ends without a line break: the file was cut."""
    return "Expected" in error and not content.endswith((b"\n", b"\r"))


def _open(root: str, options: Mapping[str, str], source: str) -> _Store:
    if root.startswith("s3://"):
        return _Store(_s3(options), root.removeprefix("s3://").rstrip("/"), source)
    folder = Path(root.removeprefix("file://"))
    if "://" in str(root.removeprefix("file://")):
        raise SourceRefusedError(source, "its address is neither a folder nor s3://", "Write it as /path or s3://bucket/prefix")
    if not folder.is_dir():
        raise SourceDownError(source, "the folder is not there", "Check the path, or that its volume is mounted")
    return _Store(LocalFileSystem(), str(folder.absolute()), source)


def _s3(options: Mapping[str, str]) -> S3FileSystem:
    endpoint = options.get("AWS_ENDPOINT_URL")
    return S3FileSystem(
        access_key=options.get("AWS_ACCESS_KEY_ID"),
        secret_key=options.get("AWS_SECRET_ACCESS_KEY"),
        session_token=options.get("AWS_SESSION_TOKEN"),
        region=options.get("AWS_REGION"),
        endpoint_override=endpoint.split("://", 1)[-1].rstrip("/") if endpoint else None,
        scheme="http" if endpoint and endpoint.startswith("http://") else "https",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _told(error: Exception, source: str) -> SourceError:
    text = _first_line(error)
    if isinstance(error, PermissionError) or re.search(r"ACCESS_DENIED|AccessDenied|InvalidAccessKey|SIGNATURE|HTTP status 403", text):
        return SourceRefusedError(source, f"may not be read ({text})", "Check the credentials and the rights on it")
    if isinstance(error, FileNotFoundError):
        return SourceDownError(source, f"vanished while it was read ({text})", "Run again; the next run reads what is there")
    return SourceDownError(source, f"cannot be read ({text})", "Check that the storage answers, then run again")


def _each(days: DayRange) -> Iterator[date]:
    return (days.first + timedelta(days=n) for n in range((days.last - days.first).days + 1))


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
