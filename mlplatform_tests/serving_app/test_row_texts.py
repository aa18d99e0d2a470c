"""What answers and log records say of each row is the JSON of the figures themselves, whatever they are."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from serving_app.features import Assembled
from serving_app.row_texts import RowWriter, members

PREDICTIONS = [0.1, float(np.float32(0.7)), 1e-30, 0.5]
AGES = [np.array([1.0, np.nan, 1e9 / 3, 0.0]), np.array([0.25, 2.0, np.nan, 3.5])]


def contract(threshold: float | None = None, levels: tuple[float, ...] = ()) -> Any:
    views = (SimpleNamespace(name='100 % "odd"'), SimpleNamespace(name="plain"))
    return SimpleNamespace(views=views, threshold=threshold, quantiles=levels, quantile_names=tuple(f"p{100 * q:g}" for q in levels))


def assembled() -> Assembled:
    out = Assembled(0, np.zeros((4, 1)), AGES)
    out.imputed = {1: ["plain"]}
    out.shortfalls = {1: {"plain": "missing"}, 3: {'100 % "odd"': "expired"}}
    return out


def read(texts: Any) -> list[dict[str, Any]]:
    return [json.loads(b"{%b}" % text) for text in texts]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_every_row_has_its_own_figures(threshold: float | None) -> None:
    texts = RowWriter(contract(threshold)).write(assembled(), PREDICTIONS, None)
    wanted = [
        {
            "prediction": prediction,
            "feature_ages_s": {'100 % "odd"': first, "plain": second},
            "imputed": ["plain"] if row == 1 else [],
            "shortfalls": {1: {"plain": "missing"}, 3: {'100 % "odd"': "expired"}}.get(row, {}),
        }
        for row, (prediction, first, second) in enumerate(zip(PREDICTIONS, [1.0, None, 1e9 / 3, 0.0], [0.25, 2.0, None, 3.5], strict=True))
    ]
    assert read(texts.logged) == wanted
    decisions = [None] * 4 if threshold is None else [False, True, False, True]
    assert read(texts.answered) == [row | {"decision": decision} for row, decision in zip(wanted, decisions, strict=True)]


def test_quantiles_stand_by_place_in_the_log_and_by_name_in_the_answer() -> None:
    quantiles = [[-1.0, p, 5.5] for p in PREDICTIONS]
    texts = RowWriter(contract(levels=(0.1, 0.5, 0.9))).write(assembled(), PREDICTIONS, quantiles)
    assert [row["quantiles"] for row in read(texts.logged)] == quantiles
    assert [row["quantiles"] for row in read(texts.answered)] == [{"p10": -1.0, "p50": p, "p90": 5.5} for p in PREDICTIONS]


def test_a_model_without_views_has_no_ages() -> None:
    bare = SimpleNamespace(views=(), threshold=None, quantiles=(), quantile_names=())
    texts = RowWriter(bare).write(Assembled(0, np.zeros((1, 1)), []), [0.5], None)  # type: ignore[arg-type]  # what it reads of a contract
    assert read(texts.logged) == [{"prediction": 0.5, "feature_ages_s": {}, "imputed": [], "shortfalls": {}}]


def test_members_are_an_object_without_its_braces() -> None:
    assert b"{%b}" % members({"a": "x", "b": 1}) == orjson.dumps({"a": "x", "b": 1})
