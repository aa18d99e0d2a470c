"""Plans read from Feast declarations, and the declarations that are refused."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from pydantic import ValidationError

from mlplatform.features.declared import DeclarationError
from mlplatform.features.plan import ViewPlan

VIEWS = """
from datetime import timedelta
from feast import Entity, FileSource, PushSource, StreamFeatureView, ValueType
from feast.aggregation import Aggregation
from feast.field import Field
from feast.types import Float64, String

HOUR = timedelta(hours=1)
shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.STRING)
source = PushSource(name="push", batch_source=FileSource(path="x", timestamp_field="event_timestamp"))
sales = StreamFeatureView(
    name="sales",
    entities=[shop],
    schema=[Field(name="shop", dtype=String), Field(name="amount_3h", dtype=Float64, description="Sold", tags={"unit": "EUR"})],
    aggregations=[Aggregation(column="amount", function="sum", time_window=3 * HOUR, name="amount_3h")],
    source=source,
    timestamp_field="event_timestamp",
    enable_tiling=True,
    tiling_hop_size=HOUR,
    ttl=6 * HOUR,
    owner="shop@example.com",
)
"""
RECIPES = """
from datetime import timedelta
from mlplatform.specs import FeatureRecipe

HOUR = timedelta(hours=1)
RECIPES = (FeatureRecipe(view="sales", inputs={"till": 3 * HOUR}, cadence=HOUR, events=lambda tables: tables["till"]),)
"""
Declare = Callable[[str, str], dict[str, ViewPlan]]


def test_a_declaration_becomes_a_plan(declare: Declare) -> None:
    plan = declare(VIEWS, RECIPES)["sales"]
    assert (plan.join_keys, plan.features, plan.owner) == (("shop",), ("amount_3h",), "shop@example.com")
    assert (plan.ttl, plan.cadence, plan.hop, plan.longest_window) == tuple(timedelta(hours=h) for h in (6, 1, 1, 3))
    assert plan.feature_units == {"amount_3h": "EUR"}
    assert plan.feature_descriptions == {"amount_3h": "Sold"}


def test_the_fingerprint_changes_with_the_declaration_and_with_the_recipes(declare: Declare) -> None:
    before = declare(VIEWS, RECIPES)["sales"].fingerprint
    assert len(before) == 64
    assert before == declare(VIEWS, RECIPES)["sales"].fingerprint
    assert before != declare(VIEWS.replace("3 * HOUR, name", "2 * HOUR, name"), RECIPES)["sales"].fingerprint
    assert before != declare(VIEWS, RECIPES + "\n# another line\n")["sales"].fingerprint


def test_the_fingerprint_tells_one_trigger_from_the_other_even_where_the_text_is_the_same(
    declare: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = "import os\n" + RECIPES.replace("cadence=HOUR", 'cadence=HOUR, trigger=os.environ["TRIGGER"]')
    monkeypatch.setenv("TRIGGER", "cadence")
    before = declare(VIEWS, recipes)["sales"]
    monkeypatch.setenv("TRIGGER", "event")
    after = declare(VIEWS, recipes)["sales"]
    assert (before.event_triggered, after.event_triggered) == (False, True)
    assert before.fingerprint != after.fingerprint


def test_only_ticks_have_to_be_multiples_of_the_hop(declare: Declare) -> None:
    recipes = RECIPES.replace("cadence=HOUR", 'cadence=HOUR / 2, trigger="event"')
    assert declare(VIEWS, recipes)["sales"].cadence == timedelta(minutes=30)


def test_a_value_may_take_one_cadence_to_be_readable_unless_the_recipe_says_otherwise(declare: Declare) -> None:
    assert declare(VIEWS, RECIPES)["sales"].recipe.propagation_budget == timedelta(hours=1)
    quicker = RECIPES.replace("cadence=HOUR", "cadence=HOUR, propagation=timedelta(seconds=2)")
    assert declare(VIEWS, quicker)["sales"].recipe.propagation_budget == timedelta(seconds=2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cadence=HOUR", "cadence=0 * HOUR", "greater than 0"),
        ("cadence=HOUR", "cadence=HOUR, propagation=0 * HOUR", "greater than 0"),
        ("cadence=HOUR", 'cadence=HOUR, trigger="sometimes"', "'cadence' or 'event'"),
        (
            "cadence=HOUR, events=lambda tables",
            'cadence=HOUR, trigger="event", compute=lambda tables, ticks',
            "trigger='event' speaks of events",
        ),
        (
            "cadence=HOUR, events=lambda tables",
            'cadence=HOUR, independent_by="id", compute=lambda tables, ticks',
            "independent_by speaks of",
        ),
        ('events=lambda tables: tables["till"]', "compute=None", "exactly one of events and compute"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(declare: Declare, old: str, new: str, message: str) -> None:
    assert old in RECIPES
    with pytest.raises(ValidationError, match=message):
        declare(VIEWS, RECIPES.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name="amount_3h")]', 'name="sold")]', r"view sales: nobody computes \['amount_3h'\]"),
        ('function="sum"', 'function="count_distinct"', "uses 'count_distinct'; the engine computes sum"),
        ('"sum", time_window=3 * HOUR', '"mean"', "which only a sum may leave out"),
        ('"sum", time_window=3 * HOUR', '"sum"', "running sums only"),
        ("3 * HOUR", "2.5 * HOUR", "no multiple of the hop"),
        ("time_window=3 * HOUR", "time_window=9 * HOUR", "no input of its recipe looks back that far"),
        ("    ttl=6 * HOUR,\n", "", "declare a ttl"),
        ("ttl=6 * HOUR", "ttl=HOUR / 2", "shorter than its cadence"),
        ("enable_tiling=True", "enable_tiling=False", "declare enable_tiling=True"),
        ('Field(name="shop", dtype=String), ', "", "its schema must name each join key"),
        ('dtype=Float64, description="Sold"', 'dtype=String, description="Sold"', "every stored feature is a Float64"),
        ('name="amount_3h")]', 'name="amount_3h")] * 2', r"two aggregations are named \['amount_3h'\]"),
    ],
)
def test_a_view_that_cannot_be_computed_is_refused_with_the_mend(declare: Declare, old: str, new: str, message: str) -> None:
    assert old in VIEWS
    with pytest.raises(DeclarationError, match=message):
        declare(VIEWS.replace(old, new), RECIPES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('view="sales"', 'view="sale"', r"recipes for \['sale'\]"),
        ("RECIPES = (", "RECIPES = () and (", r"declares \['sales'\] without a recipe"),
        ("cadence=HOUR", "cadence=HOUR / 2", "its cadence 0:30:00 is no multiple of the hop"),
        ("cadence=HOUR", 'cadence=HOUR, defaults={"amont_3h": 0.0}', "defaults for"),
        ("events=lambda tables", "compute=lambda tables, ticks", "give the recipe events"),
        (",)\n", ",) * 2\n", "two recipes"),
    ],
)
def test_a_recipe_that_does_not_fit_its_view_is_refused(declare: Declare, old: str, new: str, message: str) -> None:
    assert old in RECIPES
    with pytest.raises(DeclarationError, match=message):
        declare(VIEWS, RECIPES.replace(old, new))


def test_two_views_may_not_share_a_feature_name(declare: Declare) -> None:
    again = VIEWS[VIEWS.index("sales = ") :].replace("sales = ", "more = ").replace('name="sales"', 'name="more"')
    recipes = (
        RECIPES
        + '\nRECIPES += (FeatureRecipe(view="more", inputs={"till": 3 * HOUR}, cadence=HOUR, events=lambda tables: tables["till"]),)\n'
    )
    with pytest.raises(DeclarationError, match="both have a feature amount_3h"):
        declare(VIEWS + again, recipes)
