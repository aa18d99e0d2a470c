import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from mlplatform import catalog
from mlplatform.catalog.discover import CatalogError, catalogs, checked
from mlplatform.specs import Catalog, Column, Contract, Coverage, FileReader, Reference, SourceSpec


def source(name: str, **contract: object) -> SourceSpec:
    columns = (Column(name="id", dtype="string"),)
    reader = FileReader(connection="files", path="x.csv", format="csv")
    declared = Contract.model_validate({"columns": columns, "key": ("id",), **contract})
    return SourceSpec(name=name, description="", reader=reader, contract=declared)


def declared(name: str, *sources: SourceSpec) -> Catalog:
    return Catalog(name=name, sources=sources, models=(), feature_package=f"feature_definitions.{name}", start=date(2024, 1, 1))


def test_the_flights_catalog_is_found() -> None:
    assert "flights" in [c.name for c in catalogs()]


def test_a_new_module_is_found_without_naming_it_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop.py").write_text(
        "from datetime import date\nfrom mlplatform.specs import Catalog\n"
        "CATALOG = Catalog(name='shop', sources=(), models=(), feature_package='feature_definitions.shop', start=date(1997, 1, 1))\n"
    )
    (tmp_path / "helpers.py").write_text("BINS = 10\n")
    monkeypatch.setattr(catalog, "__path__", [*catalog.__path__, str(tmp_path)])
    try:
        assert {"flights", "shop"} <= {c.name for c in catalogs()}
    finally:
        for name in ("shop", "helpers"):
            sys.modules.pop(f"mlplatform.catalog.{name}", None)


def test_a_catalog_of_another_type_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typo.py").write_text("CATALOG = {'name': 'typo'}\n")
    monkeypatch.setattr(catalog, "__path__", [str(tmp_path)])
    try:
        with pytest.raises(CatalogError, match="dict, not a Catalog"):
            catalogs()
    finally:
        sys.modules.pop("mlplatform.catalog.typo", None)


def test_a_source_declared_twice_is_refused_with_both_places() -> None:
    with pytest.raises(CatalogError, match=r"source 'users' \(in one, two\)"):
        checked([declared("one", source("users")), declared("two", source("users"))])


def test_two_catalogs_of_one_name_are_refused() -> None:
    with pytest.raises(CatalogError, match="catalog 'one'"):
        checked([declared("one"), declared("one")])


def test_a_reference_to_nowhere_is_refused() -> None:
    orders = source("orders", references=(Reference(columns=("id",), source="users", to=("id",)),))
    with pytest.raises(CatalogError, match="'orders' refers to 'users'"):
        checked([declared("shop", orders)])


def test_a_reference_to_an_unknown_column_is_refused() -> None:
    orders = source("orders", references=(Reference(columns=("id",), source="users", to=("user_id",)),))
    with pytest.raises(CatalogError, match="does not have: user_id"):
        checked([declared("shop", orders, source("users"))])


def test_coverage_by_an_unknown_column_is_refused() -> None:
    answers = source("answers", coverage=(Coverage(source="questions", columns=("id",), at="asked", every=timedelta(hours=1)),))
    with pytest.raises(CatalogError, match="does not have: asked"):
        checked([declared("shop", answers, source("questions"))])


def test_catalogs_may_refer_to_each_others_sources() -> None:
    orders = source("orders", references=(Reference(columns=("id",), source="users", to=("id",)),))
    assert len(checked([declared("shop", orders), declared("base", source("users"))])) == 2
