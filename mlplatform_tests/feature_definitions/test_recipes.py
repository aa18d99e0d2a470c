"""What the flights' recipes declare together."""

from datetime import timedelta

from feature_definitions.flights.recipes import RECIPES


def test_a_streamed_value_that_is_lost_is_noticed_within_minutes_and_not_after_a_cadence():
    streamed = {recipe.view: recipe.propagation_budget for recipe in RECIPES if recipe.independent_by}
    assert len(streamed) == 7
    assert set(streamed.values()) == {timedelta(minutes=5)}
