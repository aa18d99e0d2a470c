"""Raw rows as the contract describes them: its columns, in its order and types.

Belongs here: telling that a table is not the one the contract speaks of. Does not belong here: reading values out of text
(ingestion does, before a row is stored), or judging values (`rules`).
"""

import polars as pl

from mlplatform.specs import Contract, DType

POLARS_TYPES: dict[DType, pl.DataType] = {
    "string": pl.String(),
    "int": pl.Int64(),
    "float": pl.Float64(),
    "bool": pl.Boolean(),
    "date": pl.Date(),
    "timestamp": pl.Datetime("us", "UTC"),
}


class SchemaError(ValueError):
    """The table itself is not what the contract describes: a column is missing or is of another type."""


def typed(rows: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """The contract's columns of `rows`, widened where that loses nothing (integers to float, milliseconds to microseconds).

    Raises `SchemaError` naming every column that is missing or of another type: the table was written under another
    contract, or never went through a reader.
    """
    if missing := [c.name for c in contract.columns if c.name not in rows.columns]:
        raise SchemaError(f"columns are missing: {', '.join(missing)} (there are: {', '.join(rows.columns)})")
    wrong = [
        f"{c.name} is {rows.schema[c.name]}, declared {c.dtype}" for c in contract.columns if not _widens(rows.schema[c.name], c.dtype)
    ]
    if wrong:
        raise SchemaError(f"columns are of another type: {'; '.join(wrong)}")
    return rows.select(pl.col(c.name).cast(POLARS_TYPES[c.dtype]) for c in contract.columns)


def _widens(stored: pl.DataType, dtype: DType) -> bool:
    if isinstance(stored, pl.Null) or stored == POLARS_TYPES[dtype]:
        return True
    match dtype:
        case "int":
            return bool(stored.is_integer()) and stored != pl.UInt64()
        case "float":
            return bool(stored.is_numeric()) and not stored.is_decimal()
        case "string":
            return isinstance(stored, pl.Categorical | pl.Enum)
        case "timestamp":
            return isinstance(stored, pl.Datetime) and stored.time_zone == "UTC" and stored.time_unit == "ms"
        case _:
            return False
