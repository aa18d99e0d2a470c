"""Who uses a view, from the declared services and models."""

from mlplatform.catalog.flights import CATALOG
from mlplatform.features.consumers import Consumer, consumers, services

DECLARED = {"orders_v1": {"shop_totals": ("orders_1h", "amount_1h")}, "weather_v1": {"weather": ("temp",)}}


def test_the_flights_service_takes_every_stored_view_and_its_models_are_named():
    declared = services("feature_definitions.flights")
    assert declared["flight_disruption_v1"]["origin_weather"][:2] == ("temp", "dewp")
    found = consumers("origin_weather", declared, CATALOG.models)
    assert {(each.service, each.model) for each in found} == {("flight_disruption_v1", model.name) for model in CATALOG.models}
    assert "flight_disruption (flight_disruption_v1)" in map(str, found)


def test_every_model_of_a_service_is_a_consumer_with_what_it_leaves_out():
    template = CATALOG.models[0]
    models = [
        template.model_copy(update={"name": name, "feature_service": "orders_v1", "left_out": left_out})
        for name, left_out in (("b", ("amount_1h", "temp")), ("a", ()))
    ]
    assert consumers("shop_totals", DECLARED, models) == (
        Consumer("orders_v1", "a", ("orders_1h", "amount_1h")),
        Consumer("orders_v1", "b", ("orders_1h", "amount_1h"), ("amount_1h",)),
    )


def test_a_service_without_a_model_is_told_and_a_view_without_a_service_has_no_consumer():
    assert consumers("weather", DECLARED, []) == (Consumer("weather_v1", None, ("temp",)),)
    assert consumers("other", DECLARED, CATALOG.models) == ()


def test_a_package_without_services_has_none():
    assert services("mlplatform.catalog") == {}
