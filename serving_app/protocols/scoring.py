"""MLflow's scoring protocol: the bodies that `/invocations` of its model server takes.

Belongs here: its four JSON forms and CSV, as columns by name. Does not belong here: HTTP (`routes.scoring`).

Source: mlflow/pyfunc/scoring_server/__init__.py and mlflow/utils/proto_json_utils.py of the version below. Three things are
otherwise than there, and said so to the caller: Parquet is not read, `params` have no meaning here, and a column that is neither a
field nor a feature is refused and not left out. There is no pandas here: types follow from the contract and are not guessed.
"""

import csv
import io
from collections.abc import Callable
from typing import Any

from mlplatform.contracts import ServingContract
from serving_app.problems import FieldError, ProblemError, invalid_input
from serving_app.protocols.columns import feature_columns, read_json, rows_of

MLFLOW_VERSION = "3.17.2"  # whose protocol this is
CSV = "text/csv"
_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
# What `pandas.read_csv` takes for a missing value; in a column of text only the empty one is.
_MISSING = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"))
_MISSING |= {"NULL", "NaN", "None", "n/a", "nan", "null"}
_TRUTH = {"true": True, "false": False}
Columns = dict[str, list[Any]]


def inputs_of_json(body: bytes, contract: ServingContract) -> list[dict[str, Any]]:
    """The inputs as our own protocol has them. Raises a 422 problem."""
    told = read_json(body)
    forms = [form for form in _FORMS if isinstance(told, dict) and form in told]
    if len(forms) != 1:
        raise _refused(f"the body must be a JSON object with exactly one of {', '.join(_FORMS)}")
    if told.get("params"):
        raise _refused("this model takes no params", "params")
    if unknown := told.keys() - {"params", *forms}:
        raise _refused(f"'{min(unknown)[:64]}' is not known here", min(unknown)[:64])
    if forms == ["dataframe_split"]:
        columns = _split(told["dataframe_split"], contract)
    elif isinstance(told[forms[0]], dict) and forms != ["dataframe_records"]:
        columns = _by_name(told[forms[0]], forms[0])
    else:
        columns = _records(told[forms[0]], forms[0], contract)
    if not any(columns.values()):
        raise _refused(f"{forms[0]} must hold at least one row", forms[0])
    return rows_of(columns, contract)


def inputs_of_csv(body: bytes, contract: ServingContract) -> list[dict[str, Any]]:
    """A frame as `DataFrame.to_csv` writes it, with or without its index. Raises a 422 problem."""
    try:
        lines = [line for line in csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refused(f"the body is not CSV in UTF-8: {error}") from None
    if len(lines) < 2:
        raise _refused("a CSV body has a line of column names, and at least one of values")
    names, rows = lines[0], lines[1:]
    if len(set(names)) != len(names):
        raise _refused("a column's name stands twice in the CSV's first line")
    if wrong := [i for i, row in enumerate(rows) if len(row) > len(names)]:
        raise invalid_input([FieldError(f"has more than {len(names)} values", input=i) for i in wrong[:10]])
    readers = _readers(contract)
    columns: Columns = {}
    for place, name in enumerate(names):
        if not name and place == 0:
            continue  # the frame's index, which pandas writes under no name
        read = readers.get(name, str)
        columns[name] = [read(row[place]) if place < len(row) and row[place] else None for row in rows]
    return rows_of(columns, contract)


def _split(frame: object, contract: ServingContract) -> Columns:
    if not isinstance(frame, dict) or not isinstance(rows := frame.get("data"), list):
        raise _refused("dataframe_split must be an object with `columns` and `data`", "dataframe_split")
    names = frame.get("columns")
    if names is None:
        return feature_columns(rows, contract)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise _refused("`columns` of dataframe_split must be a list of different names", "dataframe_split")
    if wrong := [i for i, row in enumerate(rows) if not isinstance(row, list) or len(row) != len(names)]:
        raise invalid_input([FieldError(f"must be a list of {len(names)} values", input=i) for i in wrong[:10]])
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _records(rows: object, form: str, contract: ServingContract) -> Columns:
    """Rows as objects, or (not in `dataframe_records`) as lists of all features."""
    if not isinstance(rows, list) or not rows:
        raise _refused(f"{form} must be a non-empty list of rows", form)
    if all(isinstance(row, dict) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        # As in a frame: a name that only some rows have is a missing value in the others.
        return {name: [row.get(name) for row in rows] for name in names}
    if form == "dataframe_records":
        raise _refused(f"{form} must be a list of objects", form)
    return feature_columns(rows, contract)


def _by_name(columns: dict[str, Any], form: str) -> Columns:
    """Columns as lists of one length, also of shape [n, 1]; a single value is a column of one row."""
    found = {name: _unnested(values) if isinstance(values, list) else [values] for name, values in columns.items()}
    if len({len(values) for values in found.values()}) != 1:
        raise _refused(f"{form} must be columns of one length", form)
    return found


def _unnested(values: list[Any]) -> list[Any]:
    return [v[0] for v in values] if values and all(isinstance(v, list) and len(v) == 1 for v in values) else values


def _readers(contract: ServingContract) -> dict[str, Callable[[str], Any]]:
    kinds: dict[str, Callable[[str], Any]] = {"int": _number, "float": _number, "bool": lambda text: _TRUTH.get(text.lower(), text)}
    fields = {f.name: kinds.get(f.dtype, str) for f in contract.fields}
    features = {f.name: _number for f in contract.features}
    return features | fields


def _number(text: str) -> Any:
    """A number, None for a missing one; other text stays, for the check that names input and field (or as a category)."""
    if text in _MISSING:
        return None
    if "_" in text or not text.isascii():  # numbers to Python, and to no other reader of CSV
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _refused(detail: str, field: str | None = None) -> ProblemError:
    return invalid_input([FieldError(detail, field=field)])
