"""The byte layout: keys never collide, packed values come back exactly and compare in time order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform.feature_store.codec import (
    BUCKETS,
    COUNTER_KEY,
    HEADER_BYTES,
    PREFIX_BYTES,
    RETIRED_KEY,
    SchemaMismatchError,
    decode,
    encode,
    encode_many,
    entity_part,
    generation_of,
    join_order,
    manifest_key,
    pointer_key,
    schema_hash,
    value_keys,
)

micros = st.integers(min_value=-(2**62), max_value=2**62)
floats = st.floats(width=64, allow_nan=True, allow_infinity=True)
text = st.text(max_size=6)
join_values = st.lists(st.one_of(text, st.integers(-(2**63), 2**63 - 1), st.sampled_from(["a", "bc", "ab", "c", "1", "i1;"])), max_size=3)


generations = st.integers(1, 10**9)


@given(generations, join_values, generations, join_values, st.booleans())
def test_two_entities_never_share_a_key(generation: int, values: list, generation2: int, values2: list, clustered: bool) -> None:
    same = (generation, values) == (generation2, values2)
    (one,), (two,) = (value_keys(g, [entity_part("v", v)], clustered) for g, v in ((generation, values), (generation2, values2)))
    assert (one == two) is same
    assert generation_of(one) == (generation, entity_part("v", values))


@given(text, text, text, text)
def test_two_views_never_share_a_pointer(project: str, view: str, project2: str, view2: str) -> None:
    assert (pointer_key(project, view) == pointer_key(project2, view2)) is ((project, view) == (project2, view2))


@given(text, text, generations)
def test_no_other_key_is_taken_for_a_value(project: str, view: str, generation: int) -> None:
    for key in (pointer_key(project, view), manifest_key(generation), COUNTER_KEY, RETIRED_KEY, b"fs:x", b"other"):
        assert generation_of(key) is None


@given(join_values, generations, generations)
def test_an_entity_keeps_its_slot_in_every_generation(values: list, generation: int, generation2: int) -> None:
    from redis.crc import key_slot

    entity = entity_part("v", values)
    (one,), (two,) = (value_keys(g, [entity], clustered=True) for g in (generation, generation2))
    assert key_slot(one) == key_slot(two)
    assert len({key_slot(b"fs{%d}:" % bucket) for bucket in range(BUCKETS)}) == BUCKETS


@given(st.lists(st.sampled_from(["a", "ab", "abc", "b", "bc", "c", "1:", ":1", "s1:"]), min_size=1, max_size=4), st.data())
def test_values_cannot_lean_on_their_neighbours(values: list[str], data: st.DataObject) -> None:
    joined = "".join(values)
    cut = data.draw(st.integers(0, len(joined)))
    other = [joined[:cut], joined[cut:]]
    assert (entity_part("v", values) == entity_part("v", other)) is (values == other)


def test_an_integer_is_not_its_decimal_string() -> None:
    assert entity_part("v", [1]) != entity_part("v", ["1"])
    assert entity_part("v", [np.int32(7)]) == entity_part("v", [7])


@pytest.mark.parametrize("value", [1.0, None, True, b"x"])
def test_other_types_of_join_values_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="view v"):
        entity_part("v", [value])


def test_join_values_stand_in_the_order_of_the_sorted_names() -> None:
    assert join_order(["origin", "carrier", "dest"]) == ("carrier", "dest", "origin")


@given(micros, micros, st.lists(floats, max_size=8))
def test_a_packed_value_comes_back_exactly(event: int, created: int, values: list[float]) -> None:
    schema = schema_hash("v", [f"f{i}" for i in range(len(values))])
    packed = encode(schema, event, created, np.array(values, np.float64))
    assert len(packed) <= HEADER_BYTES + (len(values) + 3) // 4 + 8 * len(values)
    back = decode(packed, schema, len(values))
    assert back is not None
    assert (back.event_us, back.created_us) == (event, created)
    given_values = np.where(np.isnan(values), np.nan, np.array(values, np.float64))
    assert back.values.tobytes() == given_values.tobytes()


@given(micros, micros, micros, micros)
def test_the_first_sixteen_bytes_compare_in_time_order(event: int, created: int, event2: int, created2: int) -> None:
    one, two = (encode(0, e, c, np.zeros(1))[:PREFIX_BYTES] for e, c in ((event, created), (event2, created2)))
    assert (one < two) is ((event, created) < (event2, created2))
    assert (one == two) is ((event, created) == (event2, created2))


def test_many_rows_are_packed_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 3))
    values[rng.random((50, 3)) < 0.3] = np.nan
    events, created = rng.integers(-(2**60), 2**60, 50), rng.integers(-(2**60), 2**60, 50)
    assert encode_many(9, events, created, values) == [
        encode(9, int(e), int(c), row) for e, c, row in zip(events, created, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("value", "width"),
    [
        (0.0, 1),
        (255.0, 1),
        (256.0, 2),
        (-0.0, 2),
        (-1.0, 2),
        (0.5, 2),
        (float("nan"), 2),
        (float("inf"), 2),
        (2049.0, 4),
        (2.0**24 + 1, 8),
        (0.1, 8),
    ],
)
def test_each_feature_takes_the_narrowest_form_that_keeps_every_bit(value: float, width: int) -> None:
    packed = encode(1, 0, 0, np.array([value, 0.1]))
    assert len(packed) == HEADER_BYTES + 1 + width + 8
    back = decode(packed, 1, 2)
    assert back is not None
    assert back.values.tobytes() == np.array([value, 0.1]).tobytes()


def test_every_nan_is_packed_alike() -> None:
    odd = np.array([0xFFF8000000000001], np.uint64).view(np.float64)
    assert encode(1, 0, 0, odd) == encode(1, 0, 0, np.array([np.nan]))


def test_nothing_stored_decodes_to_none() -> None:
    assert decode(None, 1, 3) is None


def test_a_changed_feature_list_is_detected() -> None:
    packed = encode(schema_hash("v", ["a", "b"]), 1, 2, np.zeros(2))
    for features in (["b", "a"], ["a"], ["a", "b", "c"], ["ab"]):
        with pytest.raises(SchemaMismatchError, match="materialize"):
            decode(packed, schema_hash("v", features), len(features))


@pytest.mark.parametrize("packed", [b"", b"x" * 19, encode(1, 0, 0, np.zeros(2)) + b"y"])
def test_a_foreign_or_cut_value_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="online value"):
        decode(packed, 1, 2)


def test_packing_needs_one_time_per_row() -> None:
    with pytest.raises(ValueError, match="rows of values"):
        encode_many(1, np.zeros(2, np.int64), np.zeros(3, np.int64), np.zeros((3, 1)))
