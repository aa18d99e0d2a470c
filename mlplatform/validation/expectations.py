"""The contract as a Great Expectations suite, its result on raw rows, and the page of Data Docs that shows it.

Belongs here: everything that touches Great Expectations (three seconds of import), and the turn to pandas it asks for.
Does not belong here: deciding about rows (`split`) or tables (`table`): the suite shows what was caught, it does not catch.

Great Expectations' pages load their style and scripts from the internet. Ours must be readable without it, so what is
external is left out and a small style sheet stands in.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import polars as pl
from great_expectations.core import ExpectationSuiteValidationResult
from great_expectations.core.run_identifier import RunIdentifier
from great_expectations.expectations.expectation import Expectation
from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from mlplatform.specs import Column, SourceSpec
from mlplatform.validation.conform import typed
from mlplatform.validation.rules import reference_flags, row_rule_flags, rules_of

# A rule that no stock expectation expresses becomes a boolean column of this name, which is expected to be false.
RULE_COLUMN = "rule {}"
CRITICAL, WARNING = "critical", "warning"

# Whatever a page would fetch, and its links to an index that is not there.
_EXTERNAL = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>|<iframe\b.*?</iframe>", re.IGNORECASE | re.DOTALL
)
_URL = re.compile(r"url\((?!['\"]?(?:#|data:))[^)]*\)", re.IGNORECASE)
_LINK = re.compile(r'href="(?!#)[^"]*"', re.IGNORECASE)
_STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{border:1px solid #ddd;padding:.35rem .6rem;text-align:left;vertical-align:top}
.badge{background:#eef;border-radius:.3rem;padding:0 .35rem}.collapse{display:block}.navbar,.modal,.btn,footer,.cloud-footer{display:none}
.fa-check-circle::before{content:"\\2714";color:#2a7d2a}.fa-times::before{content:"\\2718";color:#b3261e}
.fa-exclamation-triangle::before{content:"\\26A0";color:#b36b00}.fas{font-style:normal}
@media (prefers-color-scheme:dark){body{background:#16181c;color:#ddd}td,th{border-color:#444}.badge{background:#333}a{color:#8ab4f8}}
</style>"""


@dataclass(frozen=True)
class SuiteResult:
    """Outcome of a suite on one set of rows.

    `success`: every critical expectation holds. `statistics`: Great Expectations' own counts. `failed`: one short text per
    expectation that does not hold, critical ones first. `docs_path`: the written page, None where none was asked for.
    """

    success: bool
    statistics: Mapping[str, float]
    failed: tuple[str, ...]
    docs_path: Path | None = None


def suite_of(spec: SourceSpec) -> gx.ExpectationSuite:
    """The contract's suite: what must quarantine a row is `critical`, what is only counted is a `warning`.

    Row rules and references are expected of boolean columns named `rule <name>`, which `run_suite` adds.
    """
    contract = spec.contract
    expectations = [e for column in contract.columns for e in _column_expectations(column)]
    if len(contract.key) == 1:
        expectations.append(gxe.ExpectColumnValuesToBeUnique(column=contract.key[0], severity=CRITICAL))
    elif contract.key:
        expectations.append(gxe.ExpectCompoundColumnsToBeUnique(column_list=list(contract.key), severity=CRITICAL))
    for name, quarantines, description in _flagged_rules(spec):
        severity = CRITICAL if quarantines else WARNING
        column = RULE_COLUMN.format(name)
        expectations.append(gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[False], severity=severity, notes=description))
    return gx.ExpectationSuite(name=spec.name, expectations=expectations)


def run_suite(
    rows: pl.DataFrame,
    spec: SourceSpec,
    docs_dir: Path | None = None,
    references: Mapping[str, pl.DataFrame] | None = None,
    context: pl.DataFrame | None = None,
    run: str = "latest",
) -> SuiteResult:
    """Runs the suite on raw rows (entries that could not be read left out).

    `references` and `context` as in `split.split`; references that are not handed in are not expected. `docs_dir`: writes
    `<docs_dir>/<source>/<run>.html`, a page that needs no network; `run` names it (a partition, or a run id) and may hold
    letters, digits, `.`, `_` and `-`. Raises `SchemaError` as `split` does.
    """
    if not re.fullmatch(r"[\w.-]+", run):
        raise ValueError(f"'{run}' cannot name a page: use letters, digits, '.', '_' and '-'")
    if "payload" in rows.columns:
        rows = rows.filter(pl.col("payload").is_null())
    handed = references or {}
    present = spec.model_copy(
        update={
            "contract": spec.contract.model_copy(update={"references": tuple(r for r in spec.contract.references if r.source in handed)})
        }
    )
    values = typed(rows, spec.contract)
    neighbours = None if context is None else typed(context, spec.contract)
    flags = [row_rule_flags(values, spec.contract, neighbours), reference_flags(values, present.contract, handed)]
    frame = pl.concat([values, *(f.rename(RULE_COLUMN.format) for f in flags if f.width)], how="horizontal")
    result = _validated(frame, suite_of(present), present, run)
    failed = sorted((e for e in result.results if not e.success), key=lambda e: _severity(e) != CRITICAL)
    return SuiteResult(
        success=not any(_severity(e) == CRITICAL for e in failed),
        statistics={k: float(v) for k, v in result.statistics.items() if v is not None},
        failed=tuple(_told(e) for e in failed),
        docs_path=None if docs_dir is None else _page(result, docs_dir / spec.name / f"{run}.html"),
    )


def _validated(frame: pl.DataFrame, suite: gx.ExpectationSuite, spec: SourceSpec, run: str) -> ExpectationSuiteValidationResult:
    # Ephemeral: nothing is looked for or left on disk. 10 ms.
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    definition = context.data_sources.add_pandas("raw").add_dataframe_asset(spec.name).add_batch_definition_whole_dataframe(spec.name)
    batch = definition.get_batch(batch_parameters={"dataframe": frame.to_pandas()})
    # Not ValidationDefinition.run: it fails on the numpy booleans some expectations return.
    result = batch.validate(suite, result_format="BASIC")
    result.meta |= {"run_id": RunIdentifier(run_name=run)}
    return result


def _column_expectations(column: Column) -> Iterator[Expectation]:
    name = column.name
    if not column.nullable:
        yield gxe.ExpectColumnValuesToNotBeNull(column=name, severity=CRITICAL)
    elif column.max_null_share is not None:
        yield gxe.ExpectColumnValuesToNotBeNull(column=name, mostly=1 - column.max_null_share, severity=CRITICAL)
    if column.minimum is not None or column.maximum is not None:
        yield gxe.ExpectColumnValuesToBeBetween(
            column=name, min_value=column.minimum, max_value=column.maximum, severity=CRITICAL, notes=column.unit or None
        )
    if column.allowed is not None:
        yield gxe.ExpectColumnValuesToBeInSet(column=name, value_set=list(column.allowed), severity=CRITICAL)
    if column.pattern is not None:
        yield gxe.ExpectColumnValuesToMatchRegex(column=name, regex=column.pattern, severity=CRITICAL)


def _flagged_rules(spec: SourceSpec) -> Iterator[tuple[str, bool, str]]:
    own = {rule.name for rule in spec.contract.rules}
    for rule in rules_of(spec.contract):
        if rule.name in own or rule.name.startswith("reference:"):
            yield rule.name, rule.quarantines, rule.description


def _severity(result: Any) -> str:
    severity = result.expectation_config.severity
    return str(getattr(severity, "value", severity))


def _told(result: Any) -> str:
    """One line, such as `temp must be between: 1 of 72 rows are not (1048.4)`."""
    config, found = result.expectation_config, result.result
    if result.exception_info and result.exception_info.get("raised_exception"):
        return f"{config.type} could not be evaluated: {result.exception_info.get('exception_message')}"
    about = config.kwargs.get("column") or ", ".join(config.kwargs.get("column_list", ()))
    count = f"{found.get('unexpected_count', 0)} of {found.get('element_count', 0)} rows"
    kind = "" if _severity(result) == CRITICAL else " (warning)"
    if about.startswith(RULE_COLUMN.format("")):
        return f"{about}: broken by {count}{kind}"
    must = config.type.removeprefix("expect_").removeprefix("column_values_to_").removeprefix("compound_columns_to_").replace("_", " ")
    examples = ", ".join(str(v) for v in found.get("partial_unexpected_list", [])[:3] if v is not None)
    return f"{about} must {must}: {count} do not{f' ({examples})' if examples else ''}{kind}"


def _page(result: ExpectationSuiteValidationResult, path: Path) -> Path:
    html = _view().render(ValidationResultsPageRenderer().render(result))
    offline = _LINK.sub("", _URL.sub("none", _EXTERNAL.sub("", html))).replace("</head>", f"{_STYLE}</head>", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(offline, encoding="utf-8")
    return path


@functools.cache
def _view() -> DefaultJinjaPageView:
    # A view compiles its templates anew: 0.1 s, as long as a day's suite itself.
    return DefaultJinjaPageView()
