"""The cache of feature values: what was read last is found again, as the codec decodes it, within a bound."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.feature_store import codec
from mlplatform.feature_store.reader import ViewLayout
from serving_app.feature_cache import FeatureCache


def test_the_cache_stays_within_its_bound_and_keeps_the_newest() -> None:
    layout = ViewLayout.declare("v", ["k"], ["a"], None)

    def stored(first: int, n: int) -> codec.Packed:
        times = np.zeros(n, np.int64)
        return layout.packed(codec.encode_many(layout.schema, times, times, np.arange(first, first + n, dtype=np.float64)[:, None]))

    cache = FeatureCache(capacity=100, stale_s=5.0)
    for start in range(0, 1000, 10):
        asked = [(layout, codec.entity_parts("v", range(start, start + 10)))]
        cache.decode("p", float(start), asked, [stored(start, 10)])
    newest, gone = ([(layout, codec.entity_parts("v", [k]))] for k in (999, 5))
    assert cache.last("p", newest)[0].values.tolist() == [[999.0]]
    assert not cache.last("p", gone)[0].held.any()
    assert cache.last("other", newest)[0].held.tolist() == [False]
    assert cache.fresh("p", newest, now=995.0) is not None
    assert cache.fresh("p", newest, now=995.1) is None
    held = [k for k in range(1000) if cache.last("p", [(layout, codec.entity_parts("v", [k]))])[0].held.all()]
    assert 50 <= len(held) <= 100
    assert held == list(range(1000 - len(held), 1000))


class Reads:
    """What was read of one view, by the cache and by a plain dictionary."""

    def __init__(self, capacity: int, stale_s: float = 0.0) -> None:
        self.cache = FeatureCache(capacity, stale_s)
        self.stored: dict[int, bytes | None] = {}
        self.read: dict[int, bytes | None] = {}

    def layout(self, backwards: bool) -> ViewLayout:
        return ViewLayout.declare("v", ["k"], ["b", "a"] if backwards else ["a", "b"], None)

    def write(self, entity: int, value: float | None) -> None:
        schema = self.layout(False).schema
        self.stored[entity] = None if value is None else codec.encode(schema, entity, int(value), np.array([value, math.nan]))

    def same(self, entities: list[int], backwards: bool) -> None:
        """Reads, and compares with what the codec says."""
        layout = self.layout(backwards)
        asked = [(layout, codec.entity_parts("v", entities))]
        packed = layout.packed([self.stored.get(entity) for entity in entities])
        self.read |= dict(zip(entities, packed.values, strict=True))
        for found in (self.cache.decode("p", 0.0, asked, [packed]), self.cache.last("p", asked)):
            assert isinstance(found[0], codec.Block)
            for mine, wanted in zip(found[0], codec.decode_block(*packed), strict=True):
                assert mine.dtype == wanted.dtype
                assert np.array_equal(mine, wanted, equal_nan=mine.dtype == np.float64)


_steps = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 40), st.one_of(st.none(), st.integers(0, 3).map(float)), max_size=6),
        st.lists(st.integers(0, 40), min_size=1, max_size=30, unique=True),
        st.booleans(),
    ),
    max_size=20,
)


@given(st.integers(1, 60), _steps)
def test_what_the_cache_decodes_is_what_the_store_held_however_often_it_came_before(capacity, steps) -> None:
    reads = Reads(capacity)
    for written, entities, backwards in steps:
        for entity, value in written.items():
            reads.write(entity, value)
        reads.same(entities, backwards)
    everything = [(reads.layout(False), codec.entity_parts("v", [entity])) for entity in reads.read]
    for value, last in zip(reads.read.values(), reads.cache.last("p", everything), strict=True):
        if last.held[0]:  # forgotten, or what was read last
            assert value is not None
            assert last.values[0, 0] == codec.decode_block([value], reads.layout(False).schema, 2).values[0, 0]


def test_a_value_that_cannot_be_read_leaves_the_one_before_it() -> None:
    reads = Reads(100)
    for entity in range(4):
        reads.write(entity, 1.0)
    asked = [(reads.layout(False), codec.entity_parts("v", range(4)))]
    for _ in range(3):
        reads.same([0, 1, 2, 3], backwards=False)
        spoilt = reads.layout(False).packed([*(reads.stored[e] for e in range(3)), b"spoilt"])
        assert isinstance(reads.cache.decode("p", 0.0, asked, [spoilt])[0], ValueError)
        assert reads.cache.last("p", asked)[0].values[:, 0].tolist() == [1.0] * 4


@pytest.mark.parametrize("capacity", [6, 100])  # half of six are the three values: the shelves turn at every read
def test_the_cache_holds_what_was_read_last_also_that_there_was_nothing(capacity) -> None:
    layout = ViewLayout.declare("v", ["k"], ["a"], None)
    asked = [(layout, codec.entity_parts("v", range(3)))]
    cache = FeatureCache(capacity, stale_s=0.0)

    def keep(*values: float | None) -> list[float | None]:
        packed = [None if v is None else codec.encode(layout.schema, 0, 0, np.array([v])) for v in values]
        told, last = cache.decode("p", 0.0, asked, [layout.packed(packed)])[0], cache.last("p", asked)[0]
        assert isinstance(told, codec.Block)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(told, last, strict=True))
        return [float(v[0]) if held else None for held, v in zip(last.held, last.values, strict=True)]

    for values in ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, None, 4.0), (None, None, None), (None, 5.0, None)):
        assert keep(*values) == list(values)


def test_a_value_that_cannot_be_read_leaves_the_one_of_the_older_half() -> None:
    reads = Reads(20)
    for entity in range(12):
        reads.write(entity, 1.0)
    reads.same(list(range(10)), backwards=False)
    reads.same([10, 11], backwards=False)  # the shelves turn: what was read before is the older half
    layout = reads.layout(False)
    spoilt = layout.packed([reads.stored[10], reads.stored[11], b"spoilt"])
    assert isinstance(reads.cache.decode("p", 0.0, [(layout, codec.entity_parts("v", [10, 11, 0]))], [spoilt])[0], ValueError)
    assert reads.cache.last("p", [(layout, codec.entity_parts("v", [0]))])[0].values[:, 0].tolist() == [1.0]
