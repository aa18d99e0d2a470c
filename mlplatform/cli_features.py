"""Commands about features and the content of tables: `mlplatform features`, `mlplatform fingerprint`.

Belongs here: their options and how their answers look. Does not belong here: getting the answers (`queries_features`).
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any

import typer

from mlplatform.cli_options import HERE, AsJson, Home, now, settings_of
from mlplatform.printing import age, print_json, say, table

_BARS = " ▁▂▃▄▅▆▇█"


def features(
    view: Annotated[str | None, typer.Argument(help="One view: its features, their values and who uses them.")] = None,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """The declared feature views, or one of them with the distribution of its values."""
    from mlplatform import queries_features
    from mlplatform.queries import built_home

    # What is declared can be looked at in a checkout without a platform; a home that is named is one.
    settings = settings_of(home) if home == HERE else built_home(home)
    at = now(settings)
    if view is None:
        rows = queries_features.views(settings, at)
        if as_json:
            print_json(rows)
        else:
            table("feature views", [_view_line(row) for row in rows], empty="no view is declared")
        return
    found = queries_features.view(settings, view, at)
    if as_json:
        print_json(found)
    else:
        _show_view(found)


def fingerprint(
    name: Annotated[str, typer.Argument(metavar="TABLE", help="A table of the lake, as offline/origin_weather.")],
    version: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="A Delta version, instead of the newest.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the rows and compare: status 1 where they differ.")] = False,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """The exact fingerprint of a table's content, as its commits record it or as its rows give it."""
    from mlplatform import queries_features

    found = queries_features.fingerprint(settings_of(home), name, version, verify)
    if as_json:
        print_json(found)
    else:
        say(f"{found['table']} version {found['version']}: {found['fingerprint']}")
        say(_verdict(found))
    raise typer.Exit(1 if verify and not found["matches"] else 0)


def _verdict(found: Mapping[str, Any]) -> str:
    if found["recorded"] is None:
        return "nothing is recorded for this version: computed from its rows"
    place = f"recorded in the {'training manifest' if found['recorded_in'] == 'manifest' else 'commits'}"
    if found["matches"] is None:
        return f"{place}; --verify reads the rows and compares"
    return f"{place}, and its rows give the same" if found["matches"] else f"its rows differ from what is {place}: {found['recorded']}"


def _view_line(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "view": row["view"],
        "every": _span(row["every_s"]),
        "ttl": _span(row["ttl_s"]),
        "newest": _age(row),
        "used_by": [c["model"] or c["service"] for c in row["consumers"]],
    }


def _show_view(found: Mapping[str, Any]) -> None:
    inputs = ", ".join(f"{source} ({_span(s)} back)" for source, s in found["inputs_lookback_s"].items())
    users = "; ".join(f"{c['model'] or 'no model'} through {c['service']}{_left_out(c)}" for c in found["consumers"])
    for name, text in {
        "by": ", ".join(found["keys"]),
        "from": inputs,
        "every": f"{_span(found['every_s'])}; past {_span(found['ttl_s'])}: {found['when_stale']}",
        "newest": _age(found) + ("" if found["rows"] is None else f"; {found['rows']:,} rows in all"),
        "used by": users or "nobody",
        "owner": found["owner"],
    }.items():
        say(f"{name:<8} {text}")
    table(f"{found['view']}: {found['description']}", [_declared_line(f) for f in found["features"]], empty="no feature is declared")
    table("values of the last 7 days", [_value_line(f) for f in found["features"] if "rows" in f], empty=str(found["note"]))


def _left_out(consumer: Mapping[str, Any]) -> str:
    return f" (without {', '.join(consumer['left_out'])})" if consumer["left_out"] else ""


def _declared_line(feature: Mapping[str, Any]) -> dict[str, Any]:
    default = "" if feature["default"] is None else f", {feature['default']:g} where missing"
    unit = f" [{feature['unit']}]" if feature["unit"] else ""
    return {"feature": feature["feature"], "meaning": f"{feature['description']}{unit} ({feature['computed_as']}){default}"}


def _value_line(feature: Mapping[str, Any]) -> dict[str, Any]:
    quantiles = feature["quantiles"] or {}
    return {
        "feature": feature["feature"],
        "null": f"{feature['null_share']:.0%}",
        **{name: f"{quantiles[q]:.3g}" if quantiles else "-" for name, q in (("5 %", "0.05"), ("median", "0.5"), ("95 %", "0.95"))},
        "values": sparkline(feature["histogram"]["counts"] if feature["histogram"] else ()),
    }


def sparkline(counts: Sequence[int]) -> str:
    """One character for two bins, as high as its share of the largest; blank only where both are empty."""
    pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    top = max(pairs, default=0)
    return "".join(_BARS[-(-n * (len(_BARS) - 1) // top)] for n in pairs)


def _age(row: Mapping[str, Any]) -> str:
    if row["age_s"] is None:
        return str(row["note"])
    return f"{age(row['age_s'])} ago" + (", past its ttl" if row["age_s"] > row["ttl_s"] else "")


def _span(seconds: float) -> str:
    from mlplatform.features.plan import in_words

    return in_words(timedelta(seconds=round(seconds)))
