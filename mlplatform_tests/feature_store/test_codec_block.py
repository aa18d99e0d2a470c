"""A block of values decodes to what each value alone decodes to, however many there are and whatever their widths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.feature_store.codec import (
    Block,
    Decoded,
    Packed,
    SchemaMismatchError,
    decode,
    decode_block,
    decode_blocks,
    empty_block,
    encode_many,
    entity_part,
    entity_parts,
    schema_hash,
    unblock,
)

micros = st.integers(min_value=-(2**62), max_value=2**62)
# A number of each width, and those that look like another width.
numbers = st.one_of(
    st.integers(0, 255).map(float),
    st.sampled_from([-0.0, 0.5, -1.5, 65504.0, 1e-8, 2.0**24, float("nan"), float("inf"), -float("inf")]),
    st.floats(width=16),
    st.floats(width=32),
    st.floats(width=64),
)


def same(one: Decoded | None, other: Decoded | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.event_us, one.created_us, one.values.tobytes()) == (other.event_us, other.created_us, other.values.tobytes())


@settings(deadline=None)
@given(st.data(), st.integers(0, 9), st.sampled_from([1, 5, 39, 40, 41, 120]))
def test_a_block_is_its_values_one_by_one(data: st.DataObject, features: int, n: int) -> None:
    rows = data.draw(st.lists(st.lists(numbers, min_size=features, max_size=features), min_size=1, max_size=8))
    values = np.array([rows[i % len(rows)] for i in range(n)], dtype=np.float64).reshape(n, features)
    times = np.array(data.draw(st.lists(micros, min_size=n, max_size=n)), dtype=np.int64)
    schema = schema_hash("v", [str(i) for i in range(features)])
    packed: list[bytes | None] = [*encode_many(schema, times, times[::-1].copy(), values)]
    for gap in data.draw(st.sets(st.integers(0, n - 1), max_size=5)):
        packed[gap] = None
    block = decode_block(packed, schema, features)
    assert all(same(one, decode(raw, schema, features)) for one, raw in zip(unblock(block), packed, strict=True))
    assert block.held.tolist() == [raw is not None for raw in packed]
    assert np.isnan(block.values[~block.held]).all()


@pytest.mark.parametrize("n", [3, 100])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda raw: raw[:16] + b"\x00\x00\x00\x00" + raw[20:], SchemaMismatchError),
        (lambda raw: raw[:-1], ValueError),
        (lambda raw: raw + b"\x00", ValueError),
        (lambda raw: raw[:10], ValueError),
        (lambda raw: b"", ValueError),
    ],
)
def test_one_value_of_another_layout_refuses_the_block(n: int, spoil, error: type[Exception]) -> None:
    schema = schema_hash("v", ["a", "b"])
    times = np.zeros(n, np.int64)
    packed = encode_many(schema, times, times, np.arange(2.0 * n).reshape(n, 2))
    assert decode_block(packed, schema, 2).values[n - 1].tolist() == [2.0 * n - 2, 2.0 * n - 1]
    packed[n - 2] = spoil(packed[n - 2])
    with pytest.raises(error):
        decode_block(packed, schema, 2)


def view_of(name: str, features: int, n: int, seed: int) -> Packed:
    """Values of all widths, one of them missing."""
    rng = np.random.default_rng(seed)
    values = np.stack([rng.integers(0, 9, n), rng.integers(0, 9, n) / 4, rng.random(n).astype(np.float32), rng.random(n)] * 3, axis=1)
    times = rng.integers(0, 2**50, n)
    schema = schema_hash(name, [str(i) for i in range(features)])
    packed: list[bytes | None] = [*encode_many(schema, times, times + 1, values[:, :features])]
    packed[n // 2] = None
    return Packed(packed, schema, features)


@pytest.mark.parametrize("n", [3, 100])
def test_views_of_different_widths_decode_together_to_what_each_alone_does(n: int) -> None:
    views = [view_of("a", 3, n, 1), view_of("b", 12, n + 1, 2), view_of("c", 0, n, 3), view_of("d", 5, 2, 4)]
    views.append(views[1]._replace(places=np.array([7, 0])))
    together = decode_blocks(views)
    for view, block in zip(views, together, strict=True):
        assert isinstance(block, Block)
        alone = decode_block(*view)
        assert all(same(one, other) for one, other in zip(unblock(block), unblock(alone), strict=True))


@pytest.mark.parametrize("n", [3, 100])
def test_a_view_that_cannot_be_read_leaves_the_others_as_they_are(n: int) -> None:
    views = [view_of("a", 3, n, 1), view_of("b", 4, n, 2), view_of("c", 5, n, 3)]
    views[1] = views[1]._replace(schema=7)
    first, spoilt, last = decode_blocks(views)
    assert isinstance(spoilt, SchemaMismatchError)
    assert isinstance(first, Block)
    assert isinstance(last, Block)
    assert np.array_equal(last.values, decode_block(*views[2]).values, equal_nan=True)


def test_values_are_picked_in_the_order_asked() -> None:
    schema = schema_hash("v", ["a", "b", "c"])
    times = np.zeros(50, np.int64)
    packed = encode_many(schema, times, times, np.tile([1.0, 2.0, 3.0], (50, 1)))
    for count in (2, 50):
        block = decode_block(packed[:count], schema, 3, np.array([2, 0, 1]))
        assert block.values.tolist() == [[3.0, 1.0, 2.0]] * count


def test_nothing_held_is_an_empty_block() -> None:
    for block in (empty_block(2, 3), decode_block([None, None], 7, 3)):
        assert (block.held.tolist(), block.values.shape) == ([False, False], (2, 3))
        assert unblock(block) == [None, None]


@given(st.lists(st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1)), max_size=8))
def test_entities_of_one_key_are_written_alike_alone_and_together(values: list) -> None:
    assert entity_parts("v", values) == [entity_part("v", (value,)) for value in values]


def test_a_boolean_is_no_entity() -> None:
    with pytest.raises(TypeError, match="bool"):
        entity_parts("v", [True])
