"""Feast's feature store, with errors that name what is unknown and what there is instead.

Belongs here: what Feast's SDK says of a view or a feature nobody declared. Does not belong here: opening the store
(`features.open_store`), reading and writing values (`mlplatform.feature_store`).

Feast 0.67 answers an unknown feature with a bare KeyError, after it has looked at everything else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException


class UnknownFeatureError(LookupError):
    """A reference names a view or a feature that is not in the registry."""


class NamingFeatureStore(FeatureStore):  # type: ignore[misc]  # Feast is untyped here
    """`feast.FeatureStore`, whose two ways of asking for features raise UnknownFeatureError for one that is not there."""

    def get_historical_features(self, entity_df: Any = None, features: Any = None, *rest: Any, **options: Any) -> Any:
        asked = [] if features is None else features
        with self._named(asked):
            return super().get_historical_features(entity_df, asked, *rest, **options)

    def get_online_features(self, features: Any, *rest: Any, **options: Any) -> Any:
        with self._named(features):
            return super().get_online_features(features, *rest, **options)

    @contextmanager
    def _named(self, features: Any) -> Iterator[None]:
        try:
            yield
        except (KeyError, FeatureViewNotFoundException) as error:
            # Looked for only now: it reads every view of the registry.
            unknown = self._unknown(features) if isinstance(features, list) else []
            if not unknown:
                raise
            raise UnknownFeatureError("; ".join(unknown)) from error

    def _unknown(self, references: list[str]) -> list[str]:
        views = {view.name: sorted(f.name for f in view.features) for view in self.list_all_feature_views()}
        said: list[str] = []
        for reference in references:
            name, _, feature = reference.partition(":")
            view = name.partition("@")[0]  # `view@version:feature`
            if view not in views:
                said.append(f"no feature view '{view}' is declared: choose one of {', '.join(sorted(views))}")
            elif feature not in views[view]:
                said.append(f"feature view '{view}' has no feature '{feature}': choose of {', '.join(views[view])}")
        return list(dict.fromkeys(said))
