"""`mlplatform rebuild`: a model version made again from its record, and compared.

Belongs here: options and printing. Does not belong here: the rebuild (`orchestration.rebuild`).
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlplatform.cli_options import HERE, NEWEST_VERSION, AsJson, Home, Model, settings_of
from mlplatform.printing import print_json, say, table

if TYPE_CHECKING:
    from mlplatform.orchestration.rebuild import Rebuilt

_WIDEST = 40


def rebuild(
    model: Model,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, max=NEWEST_VERSION, help="Number of the version.")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Also train it again, from the tables as they were, and compare the models. Takes as long as its fit did."
        ),
    ] = False,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """What a version was made of, and what of it has changed since; registers nothing.

    Status 1 where the version does not come out again.
    """
    settings = settings_of(home)
    from mlplatform.catalog.discover import catalogs
    from mlplatform.features.declared import plans
    from mlplatform.orchestration import rebuild as again
    from mlplatform.orchestration.resources import Clients
    from mlplatform.queries import require_known, require_registry

    require_known(settings, model)
    require_registry(settings, home)
    catalog, spec = next((catalog, spec) for catalog in catalogs() for spec in catalog.models if spec.name == model)
    if verify and not as_json:
        say(f"{model} version {version}: reading its tables as they were, and training it again …")
    told = again.rebuild(Clients(settings), catalog, spec, plans(catalog.feature_package), version, verify)
    if as_json:
        outcome = None if told.outcome is None else {**asdict(told.outcome), "same": told.outcome.same}
        rows = [{**asdict(i), "same": i.same} for i in told.ingredients]
        print_json({"model": model, "version": version, "outcome": outcome, "ingredients": rows})
    else:
        _show(told)
    if told.outcome is not None and not told.outcome.same:
        raise typer.Exit(1)


def _show(told: "Rebuilt") -> None:
    title = f"{told.model} version {told.version}: what differs of its {len(told.ingredients)} ingredients"
    table(title, [_row(i) for i in told.changed], empty="nothing differs")
    if (outcome := told.outcome) is None:
        say("--verify trains it again and compares")
    elif outcome.identical:
        say("identical: the rebuilt model file is the same, byte for byte")
    elif outcome.same:
        say(f"same: predictions differ by {outcome.difference:.3g} at most, within the declared tolerance {outcome.tolerance:.3g}")
    else:
        why = ", ".join(i.name for i in told.changed) or "nothing that is recorded: another machine, or a library that is not deterministic"
        say(f"DIFFERENT: predictions differ by {outcome.difference:.3g} (allowed {outcome.tolerance:.3g}); changed since: {why}")


def _row(i: Any) -> dict[str, Any]:
    return {"ingredient": i.name, "recorded": i.recorded[:_WIDEST], "now": i.now[:_WIDEST], "decides": "no" if i.circumstance else "yes"}
